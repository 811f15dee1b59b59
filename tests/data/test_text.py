# SPDX-License-Identifier: Apache-2.0
"""Reading documents and packing them, against packing written out here."""

import gzip
import json

import datasets
import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fpmgm.data import load_text, pack


DOCUMENTS = ["one two  three", "a line\n\nand one after an empty line\n", "žluťoučký kůň 😀", "end"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def word_tokenizer(**special) -> PreTrainedTokenizerFast:
    """`w7` is token 7; `<eos>` 998, `<bos>` 999."""
    vocabulary = {f"w{i}": i for i in range(998)} | {"<eos>": 998, "<bos>": 999}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def token_documents(count: int) -> list[list[int]]:
    """Documents of 0 to 22 tokens."""
    return [[(7 * i + j) % 998 for j in range((5 * i) % 23)] for i in range(count)]


def as_text(documents: list[list[int]]) -> Dataset:
    return Dataset.from_dict({"text": [" ".join(f"w{token}" for token in ids) for ids in documents]})


def packed(documents: list[list[int]], length: int, bos: int, eos: int) -> list[list[int]]:
    """One block after another of a growing list, begun anew after 1,000 documents."""
    blocks, inner = [], []
    for i, ids in enumerate(documents):
        if i % 1000 == 0:
            inner = []
        for token in [*ids, eos] if ids else []:
            inner.append(token)
            if len(inner) == length - 2:
                blocks.append([bos, *inner, eos])
                inner = []
    return blocks


@pytest.mark.parametrize("count", [30, 1010])
@pytest.mark.parametrize("bos", [999, None])
@pytest.mark.parametrize("streaming", [False, True])
def test_blocks_are_bos_then_the_documents_joined_by_eos_then_eos(count, bos, streaming):
    documents, length = token_documents(count), 10
    tokenizer = word_tokenizer(eos_token="<eos>", **({"bos_token": "<bos>"} if bos else {}))
    data = as_text(documents)
    blocks = pack(data.to_iterable_dataset() if streaming else data, tokenizer, length)
    assert [row["input_ids"] for row in blocks] == packed(documents, length, bos or 998, 998)
    if not streaming:
        assert blocks.column_names == ["input_ids"]


def test_blocks_do_not_depend_on_the_other_columns_and_on_missing_texts():
    data = Dataset.from_dict({"text": ["w1 w2", None, "", "w3"], "id": [1, 2, 3, 4]})
    rows = list(pack(data, word_tokenizer(eos_token="<eos>"), 4))
    assert rows == [{"input_ids": [998, 1, 2, 998]}, {"input_ids": [998, 998, 3, 998]}]


def test_packing_refuses_what_it_cannot_pack():
    data, tokenizer = as_text([[1, 2, 3]]), word_tokenizer(eos_token="<eos>")
    with pytest.raises(ValueError, match="EOS"):
        pack(data, word_tokenizer(), 4)
    with pytest.raises(ValueError, match="`length`=2"):
        pack(data, tokenizer, 2)
    assert len(pack(data, tokenizer, 6)) == 1
    with pytest.raises(ValueError, match="`length`=7"):
        pack(data, tokenizer, 7)


def write(folder, kind: str, documents: list[str], column: str = "text") -> list[str]:
    """The files of one kind that hold `documents`."""
    if kind.startswith("txt"):
        paths = [folder / f"{i}.{kind}" for i in range(len(documents))]
        for path, document in zip(paths, documents, strict=True):
            data = document.encode()
            path.write_bytes(gzip.compress(data) if kind.endswith("gz") else data)
        return [str(path) for path in paths]
    path = folder / f"documents.{kind}"
    rows = [{column: document, "id": i} for i, document in enumerate(documents)]
    if kind == "parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        text = json.dumps(rows) if kind == "json" else "\n".join(json.dumps(row) for row in rows)
        path.write_bytes(gzip.compress(text.encode()) if kind.endswith("gz") else text.encode())
    return [str(path)]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["txt", "txt.gz", "jsonl", "jsonl.gz", "json", "parquet"])
def test_every_kind_of_file_gives_the_same_documents(tmp_path, kind, streaming):
    files = write(tmp_path, kind, DOCUMENTS)
    assert [row["text"] for row in load_text(files, streaming=streaming)] == DOCUMENTS


@pytest.mark.parametrize("kind", ["txt", "jsonl.gz", "parquet"])
def test_streamed_files_give_the_blocks_of_cached_ones(tmp_path, kind):
    documents = [row["text"] for row in as_text(token_documents(40)) if row["text"]]
    files, tokenizer = write(tmp_path, kind, documents), word_tokenizer(eos_token="<eos>")
    cached, streamed = (
        list(pack(load_text(files, streaming=streaming), tokenizer, 12)) for streaming in (False, True)
    )
    assert streamed == cached
    assert [row["input_ids"] for row in cached] == packed([ids for ids in token_documents(40) if ids], 12, 998, 998)


def test_another_column_and_a_single_file_are_read(tmp_path):
    (file,) = write(tmp_path, "jsonl", DOCUMENTS, column="content")
    data = load_text(file, column="content")
    assert data["text"][:] == DOCUMENTS
    assert "content" not in data.column_names


@pytest.mark.parametrize("streaming", [False, True])
def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path, streaming):
    files = write(tmp_path, "jsonl", DOCUMENTS, column="content")
    with pytest.raises(ValueError, match=r"`column`='text'.*content"):
        load_text(files, streaming=streaming)


def test_wrong_sources_are_refused(tmp_path):
    (good,) = write(tmp_path, "jsonl", DOCUMENTS)
    with pytest.raises(ValueError, match="give one of them"):
        load_text()
    with pytest.raises(ValueError, match="give one of them"):
        load_text(good, dataset_name="some/data")
    with pytest.raises(ValueError, match=r"nowhere\.txt.*does not exist"):
        load_text(str(tmp_path / "nowhere.txt"))
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"empty\.txt.*is empty"):
        load_text([str(tmp_path / "empty.txt")])
    (tmp_path / "table.csv").write_text("text\nhello\n")
    with pytest.raises(ValueError, match=r"\.csv.*\.parquet"):
        load_text(str(tmp_path / "table.csv"))
    with pytest.raises(ValueError, match="one kind"):
        load_text([good, *write(tmp_path, "parquet", DOCUMENTS)])
    with pytest.raises(ValueError, match="`text_files`"):
        load_text([])
