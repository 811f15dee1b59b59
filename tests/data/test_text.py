# SPDX-License-Identifier: Apache-2.0
"""Reading documents and packing them, against packing written out here."""

import gzip
import json
from functools import partial
from pathlib import Path

import datasets
import pytest
from datasets import Dataset

from fpmgm.data import load_text, pack, train_tokenizer
from tests.testing_utils import refused, word_tokenizer


DOCUMENTS = ["one two  three", "a line\n\nand one after an empty line\n", "žluťoučký kůň 😀", "end"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


numbered = partial(word_tokenizer, [*(f"w{i}" for i in range(998)), "<eos>", "<bos>"])  # `w7` is token 7


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
    tokenizer = numbered(eos_token="<eos>", **({"bos_token": "<bos>"} if bos else {}))
    data = as_text(documents)
    blocks = pack(data.to_iterable_dataset() if streaming else data, tokenizer, length)
    assert [row["input_ids"] for row in blocks] == packed(documents, length, bos or 998, 998)
    if not streaming:
        assert blocks.column_names == ["input_ids"]


def test_processes_of_few_documents_drop_none_of_their_text():
    documents, tokenizer = token_documents(25), numbered(eos_token="<eos>")
    blocks = pack(as_text(documents), tokenizer, 10, num_proc=5)
    assert blocks["input_ids"][:] == packed(documents, 10, 998, 998)


def test_blocks_do_not_depend_on_the_other_columns_and_on_missing_texts():
    data = Dataset.from_dict({"text": ["w1 w2", None, "", "w3"], "id": [1, 2, 3, 4]})
    rows = list(pack(data, numbered(eos_token="<eos>"), 4))
    assert rows == [{"input_ids": [998, 1, 2, 998]}, {"input_ids": [998, 998, 3, 998]}]


def test_packing_refuses_what_it_cannot_pack():
    data, tokenizer = as_text([[1, 2, 3]]), numbered(eos_token="<eos>")
    refused("EOS", pack, data, numbered(), 4)
    refused("`dataset` is of type list: give a `Dataset`", pack, ["w1 w2"], tokenizer, 4)
    with pytest.raises(ValueError, match=r"`dataset` has the columns \['content'\], and no \"text\""):
        pack(data.rename_column("text", "content"), tokenizer, 4)
    with pytest.raises(ValueError, match="`num_proc`=2 is for data that is read before training"):
        pack(data.to_iterable_dataset(), tokenizer, 4, num_proc=2)
    refused("`length`='8'", pack, data, tokenizer, "8")
    refused("`length`=2", pack, data, tokenizer, 2)
    assert len(pack(data, tokenizer, 6)) == 1
    refused("`length`=7", pack, data, tokenizer, 7)


@pytest.mark.parametrize("streaming", [False, True])
def test_the_mask_tokens_name_in_a_document_is_text(streaming):
    tokenizer = train_tokenizer(["a masked model fills masks"], 262)
    text = "a masked model fills <|mask|> tokens and <|endoftext|> ones"
    data = Dataset.from_dict({"text": [text]})
    (block,) = pack(data.to_iterable_dataset() if streaming else data, tokenizer, 2 + 43)
    inner = block["input_ids"][1:-1]
    assert not {tokenizer.mask_token_id, tokenizer.eos_token_id} & set(inner)
    assert text.startswith(tokenizer.decode(inner)) and "<|mask|>" in tokenizer.decode(inner)


def test_a_row_that_holds_no_text_is_named():
    data = Dataset.from_list([{"text": "w1 w2"}] * 1100).to_list()
    with pytest.raises(ValueError, match=r"row 1050 of the text is 1.5, of type float"):
        list(pack(floats(data, 1050), numbered(eos_token="<eos>"), 4))


def floats(rows: list[dict], at: int) -> datasets.IterableDataset:
    """Rows of which one holds a number."""
    rows[at] = {"text": 1.5}
    return datasets.IterableDataset.from_generator(lambda: iter(rows))


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
    files, tokenizer = write(tmp_path, kind, documents), numbered(eos_token="<eos>")
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
    rows = [{"text": "a title", "content": document} for document in DOCUMENTS]
    (tmp_path / "titled.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for streaming in (False, True):
        data = load_text(tmp_path / "titled.jsonl", column="content", streaming=streaming)
        assert [row["text"] for row in data] == DOCUMENTS


@pytest.mark.parametrize("streaming", [False, True])
def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path, streaming):
    files = write(tmp_path, "jsonl", DOCUMENTS, column="content")
    refused(r"`column`='text'.*content", load_text, files, streaming=streaming)


def test_wrong_sources_are_refused(tmp_path):
    (good,) = write(tmp_path, "jsonl", DOCUMENTS)
    refused("give one of them", load_text)
    refused("give one of them", load_text, good, dataset_name="some/data")
    refused(r"nowhere\.txt.*does not exist", load_text, str(tmp_path / "nowhere.txt"))
    (tmp_path / "empty.txt").touch()
    refused(r"empty\.txt.*is empty", load_text, [str(tmp_path / "empty.txt")])
    (tmp_path / "table.csv").write_text("text\nhello\n")
    refused(r"\.csv.*\.parquet", load_text, str(tmp_path / "table.csv"))
    refused("one kind", load_text, [good, *write(tmp_path, "parquet", DOCUMENTS)])
    refused("`text_files`", load_text, [])


# --- names of files --------------------------------------------------------------------------------------------------


LITERAL = ["books[1].txt", "a*.txt", "what?.txt", "run[1]/x.txt", ".hidden/x.txt", "TEXT.TXT", "with space.Txt"]
MATCHED = ["books1.txt", "ab.txt", "what1.txt", "run1/x.txt"]  # what the names match as patterns


def put(folder, names: list[str], text: str) -> list[str]:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"{name}: {text}", encoding="utf-8")
    return [str(folder / name) for name in names]


@pytest.mark.parametrize("streaming", [False, True])
def test_names_of_files_are_no_patterns(tmp_path, monkeypatch, streaming):
    files, _ = put(tmp_path, LITERAL, "right"), put(tmp_path, MATCHED, "wrong")
    data = load_text(map(tmp_path.__truediv__, LITERAL), streaming=streaming)  # a generator of paths
    assert [row["text"] for row in data] == [f"{name}: right" for name in LITERAL]
    for file, name in zip(files, LITERAL, strict=True):
        assert [row["text"] for row in load_text(file, streaming=streaming)] == [f"{name}: right"]
    monkeypatch.chdir(tmp_path / "run[1]")
    assert [row["text"] for row in load_text("x.txt", streaming=streaming)] == ["run[1]/x.txt: right"]


def test_a_folder_is_its_files(tmp_path):
    folder, empty = tmp_path / "books", tmp_path / "empty"
    folder.mkdir()
    empty.mkdir()
    put(folder, ["b.txt", "a.txt", "in[1]/c.TXT", ".git/d.txt", "notes.md"], "text")
    expected = ["a.txt: text", "b.txt: text", "in[1]/c.TXT: text"]
    assert load_text(folder)["text"][:] == load_text([str(folder)])["text"][:] == expected
    refused(r"the folder '.*/empty' has no files of \('\.txt',", load_text, empty)


def test_a_part_of_the_files_is_a_split(tmp_path):
    files = write(tmp_path, "jsonl", DOCUMENTS)
    assert load_text(files, split="train[1:3]")["text"][:] == DOCUMENTS[1:3]
    refused("validation", load_text, files, split="validation")
    refused("`dataset_config`='small' is of a `dataset_name`", load_text, files, dataset_config="small")


# --- what is in them -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "jsonl.gz"])
@pytest.mark.parametrize(
    ("encoding", "named"),
    [("latin-1", r"byte 0xe9 at position \d+\), probably latin-1"), ("utf-16", "UTF-16"), ("utf-16-le", "UTF-16")],
)
def test_another_encoding_is_named_with_its_file(tmp_path, kind, encoding, named, streaming):
    good, bad = tmp_path / f"good.{kind}", tmp_path / f"bad.{kind}"
    for path, name in ((good, "utf-8"), (bad, encoding)):
        data = (json.dumps({"text": "a cafe and a café " * 20}, ensure_ascii=False) + "\n").encode(name)
        path.write_bytes(gzip.compress(data) if kind.endswith("gz") else data)
    refused(rf"bad\.{kind}' is not UTF-8.*{named}.*iconv", load_text, [good, bad], streaming=streaming)


def test_a_bad_byte_far_behind_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr("fpmgm.data.text_files.AT_ONCE", 5)
    path = tmp_path / "long.txt"
    path.write_bytes("žluťoučký ".encode() * 3 + b"\xff")
    for streaming in (True, False):
        refused(r"long\.txt' is not UTF-8 \(byte 0xff at position 42\)", load_text, path, streaming=streaming)
    path.write_bytes("cut in a ů".encode()[:-1])
    refused(r"long\.txt' is not UTF-8 \(byte 0xc5 at position 9\)", load_text, path)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path, kind, streaming):
    files = write(tmp_path, kind, ["one", "two"])
    for file in map(Path, files):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert [row["text"] for row in load_text(files, streaming=streaming)] == ["one", "two"]


def test_rows_without_text_are_left_out(tmp_path):
    lines = ['{"id": 1}', '{"text": "the cat sat"}', "null", "", '{"text": null, "id": 2}', '{"text": "on the mat"}']
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    data = load_text(tmp_path / "rows.jsonl")
    tokenizer = train_tokenizer(data["text"], 258)
    joined = [token for row in pack(data, tokenizer, 3) for token in row["input_ids"][1:-1]]
    assert tokenizer.decode(joined) == "the cat sat<|endoftext|>on the mat<|endoftext|>"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', "line 3 of .*rows.jsonl' is no JSON"),
        ('"a text"', "line 3 of .*rows.jsonl' is '\"a text\"': give objects"),
    ],
)
def test_a_broken_line_is_named_with_its_file(tmp_path, line, message):
    (tmp_path / "rows.jsonl").write_text(f'{{"text": "a"}}\n\n{line}\n', encoding="utf-8")
    refused(message, load_text, tmp_path / "rows.jsonl")
