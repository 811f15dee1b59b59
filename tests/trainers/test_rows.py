# SPDX-License-Identifier: Apache-2.0
"""What rows may hold: types that are cast, columns that are dropped, positions that are left out of the loss, and rows
that are refused with their number and column."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from torch.utils.data import Dataset as TorchDataset
from transformers import DataCollatorForLanguageModeling

from fpmgm.data import train_tokenizer
from fpmgm.trainers.collator import stack_and_pad

from ..testing_utils import refused, tiny_image_model
from .training_utils import LENGTH, MASK, image_rows, losses, make_trainer, token_rows, training_model


def rows(count: int = 8) -> list[dict]:
    return [{"input_ids": ids} for ids in token_rows(count)["input_ids"]]


def trained(folder, data, model=None, **arguments) -> list[float]:
    """The losses of two steps."""
    trainer = make_trainer(folder, model, train_dataset=data, max_steps=2, **arguments)
    trainer.train()
    return losses(trainer)


# --- cast and dropped ------------------------------------------------------------------------------------------------


class Memmap(TorchDataset):
    """Blocks of a file of uint16, as nanoGPT writes it."""

    def __init__(self, path, ids: np.ndarray):
        ids.astype(np.uint16).tofile(path)
        self.ids = np.memmap(path, dtype=np.uint16, mode="r").reshape(-1, LENGTH)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index]}


def test_rows_of_any_type_and_with_other_columns_train_alike(tmp_path):
    plain = rows()
    expected = trained(tmp_path, plain)
    ids = [row["input_ids"] for row in plain]
    alike = {
        "memmap": Memmap(tmp_path / "train.bin", np.array(ids)),
        "int32": [{"input_ids": np.array(row, dtype=np.int32)} for row in ids],
        "uint8": [{"input_ids": torch.tensor(row, dtype=torch.uint8)} for row in ids],
        "torch": Dataset.from_list(plain).with_format("torch"),
        "imdb": Dataset.from_list([{**row, "label": 1, "label_ids": 0, "text": "a film"} for row in plain]),
        "a list with text": [{**row, "label": 1, "text": "a film"} for row in plain],
        "a mask of ones": [{**row, "attention_mask": [1] * LENGTH} for row in plain],
        "a mask of floats": [{**row, "attention_mask": np.ones(LENGTH)} for row in plain],
        "labels": [{**row, "labels": row["input_ids"]} for row in plain],
        "no labels": [{**row, "labels": None, "attention_mask": None} for row in plain],
    }
    assert {name: trained(tmp_path, data) for name, data in alike.items()} == dict.fromkeys(alike, expected)
    bert = [{**row, "token_type_ids": [0] * LENGTH} for row in plain]
    assert trained(tmp_path, bert, remove_unused_columns=False) == expected


def test_what_a_collator_pads_is_no_data_and_its_labels_are_honoured(tmp_path):
    tokenizer = train_tokenizer(["the cat sat on the mat and the dog ran"] * 9, 270)
    sizes = {"vocab_size": len(tokenizer), "mask_token_id": tokenizer.mask_token_id}
    data = [{"input_ids": tokenizer(text)["input_ids"][:LENGTH]} for text in ("the cat sat", "the mat", "a dog", "on")]
    tokenizer.pad_token = tokenizer.eos_token
    found = [
        trained(tmp_path, data, training_model(**sizes), data_collator=collator)
        for collator in (stack_and_pad, DataCollatorForLanguageModeling(tokenizer, mlm=False))
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    with pytest.raises(ValueError, match=r"`input_ids` holds the mask id|`labels` holds"):  # the trainer draws masks
        masking = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.9, seed=0)
        trained(tmp_path, data, training_model(**sizes), data_collator=masking)


# --- labels of -100 --------------------------------------------------------------------------------------------------


def test_a_step_without_a_label_changes_nothing_and_an_evaluation_without_one_is_refused(tmp_path, caplog):
    data = [{**row, "labels": [-100] * LENGTH} for row in rows()]
    logging.Logger.warning_once.cache_clear()
    with caplog.at_level("WARNING"):
        assert trained(tmp_path, data) == [0.0, 0.0]
    assert "Nothing is learned in step 1: all `labels` of its rows are -100" in caplog.text
    refused("nothing to score", make_trainer(tmp_path, eval_dataset=data).evaluate)


# --- refused ---------------------------------------------------------------------------------------------------------

OTHER = [2] * LENGTH
REFUSED_TEXT = {
    "beyond": ({"input_ids": [1, 20]}, r"`input_ids` holds 20 at position 1.*0 to 19"),
    "negative": ({"input_ids": [-1, 2]}, r"`input_ids` holds -1 at position 0.*0 to 19"),
    "mask": ({"input_ids": [4, MASK]}, r"`input_ids` holds the mask id 19 at position 1.*`split_special_tokens=True`"),
    "floats": ({"input_ids": [1.0, 2.5]}, r"`input_ids` holds \[1.0, 2.5\]: give whole numbers"),
    "text": ({"input_ids": "a b"}, r"`input_ids` is 'a b': give numbers"),
    "no ids": ({"ids": [1]}, r"`input_ids` is not there.*\['ids'\]"),
    "a tuple": (([1, 2],), r"`input_ids` is not there.*a tuple"),
    "empty": ({"input_ids": []}, r"`input_ids` has no token.*filter"),
    "hidden": ({"input_ids": [1, 2], "attention_mask": [0, 0]}, r"`input_ids` has no token.*filter"),
    "long": ({"input_ids": [1] * 17}, r"`input_ids` has 17 tokens.*at most 16.*fpmgm.data.pack"),
    "short mask": ({"input_ids": [1, 2, 3], "attention_mask": [1, 1]}, r"`attention_mask` is of shape \(2,\) for 3"),
    "grey mask": ({"input_ids": [1, 2], "attention_mask": [1, 0.5]}, r"`attention_mask` holds 0.5 at position 1"),
    "other labels": ({"input_ids": [1, 2], "labels": [1, 3]}, r"`labels` holds 3 at position 1.*holds 2.*-100"),
    "short labels": ({"input_ids": [1, 2], "labels": [1]}, r"`labels` is of shape \(1,\) for 2"),
    "class": ({"input_ids": [1, 2], "labels": 1}, r"`labels` .*-100"),
    "two dimensions": ({"input_ids": [[1, 2], [3, 4]]}, r"`input_ids` has 2 dimensions: flatten"),
}  # fmt: skip
CODES = [1, 2, 3, 4, 5, 6, 0, 1, 2]  # 3 × 3 of 7
REFUSED_IMAGES = {
    "mask": ({"input_ids": [*CODES[:8], 7]}, r"`input_ids` holds the mask id 7 at position 8.*0 to 6"),
    "beyond": ({"input_ids": [*CODES[:8], 8]}, r"`input_ids` holds 8 at position 8"),
    "length": ({"input_ids": CODES[:5]}, r"`input_ids` has 5 codes, but an image has 9"),
    "class": ({"input_ids": CODES, "class_labels": 4}, r"`class_labels` is 4.*0 to 2.*3 is no class"),
    "negative class": ({"input_ids": CODES, "class_labels": -1}, r"`class_labels` is -1"),
    "class of one half": ({"input_ids": CODES, "class_labels": 0.5}, r"`class_labels` holds 0.5: give whole"),
    "grid": ({"input_ids": [CODES[:3], CODES[3:6], CODES[6:]]}, r"`input_ids` has 2 dimensions: flatten"),
}


def with_bad_row(bad, good: dict) -> list:
    """Six rows, of which number 4 is `bad`; the others have the columns that it has."""
    columns = bad if isinstance(bad, dict) else {}
    if "attention_mask" in columns:
        good = {**good, "attention_mask": [1] * len(good["input_ids"])}
    if "labels" in columns:
        good = {**good, "labels": 0 if isinstance(bad["labels"], int) else good["input_ids"]}
    return [good] * 4 + [bad, good]


@pytest.mark.parametrize(
    ("name", "source"),
    [*((name, "training") for name in REFUSED_TEXT)]
    + [(name, source) for name in ("mask", "class", "short mask") for source in ("evaluation", "streamed")],
)
def test_a_bad_row_of_text_is_named(tmp_path, name, source):
    bad, message = REFUSED_TEXT[name]
    data = with_bad_row(bad, {"input_ids": OTHER})
    if source == "streamed":
        data = Dataset.from_list(data).to_iterable_dataset()
    # Training rows are shuffled: a batch holds all of them. Those of a stream are counted from batch to batch.
    sizes = {"per_device_train_batch_size": 3 if source == "streamed" else 6, "per_device_eval_batch_size": 3}
    sizes |= {"max_steps": 2}
    trainer = make_trainer(tmp_path, train_dataset=data, eval_dataset=data, **sizes)
    number, data_name = "." if name == "class" else 4, "evaluation" if source == "evaluation" else "training"
    with pytest.raises(ValueError, match=f"row {number} of the {data_name} data: {message}"):
        trainer.evaluate() if source == "evaluation" else trainer.train()


@pytest.mark.parametrize("name", REFUSED_IMAGES)
def test_a_bad_row_of_codes_is_named(tmp_path, name):
    bad, message = REFUSED_IMAGES[name]
    good = {"input_ids": CODES, **({"class_labels": 0} if "class_labels" in bad else {})}
    trainer = make_trainer(tmp_path, tiny_image_model(), train_dataset=[good] * 4 + [bad, good], max_steps=2)
    refused(rf"row \d of the training data: {message}", trainer.train)


@pytest.mark.parametrize(
    ("column", "as_dataset"), [("label", False), ("label_ids", True), ("labels", False), ("labels", True)]
)
def test_classes_of_images_under_another_name_are_refused(tmp_path, column, as_dataset):
    data = image_rows(8).rename_column("class_labels", column)
    trainer = make_trainer(tmp_path, tiny_image_model(), train_dataset=data if as_dataset else list(data))
    refused(rf"`{column}` is not read: the class of an image is `class_labels`", trainer.train)
    if column != "labels":
        both = image_rows(8).add_column(column, [0] * 8)
        make_trainer(tmp_path, tiny_image_model(), train_dataset=both).train()


def test_unknown_columns_that_are_kept_are_refused(tmp_path):
    data = [{**row, "weight": 0.5} for row in rows()]
    with pytest.raises(ValueError, match=r"drop \['weight'\], or leave `remove_unused_columns` at True"):
        trained(tmp_path, data, remove_unused_columns=False)


def test_rows_are_named_from_workers_too(tmp_path):
    data = [{"input_ids": OTHER}] * 5 + [{"input_ids": [1, 77]}] + [{"input_ids": OTHER}] * 2
    trainer = make_trainer(tmp_path, train_dataset=data, dataloader_num_workers=1, per_device_train_batch_size=8)
    refused("row 5 of the training data: `input_ids` holds 77 at position 1", trainer.train)


def test_data_that_is_no_dataset_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"the training data is a generator: give one list of rows"):
        make_trainer(tmp_path, train_dataset=(row for row in rows())).train()
    with pytest.raises(ValueError, match=r"the training data has the parts \['train', 'test'\]: give one"):
        make_trainer(tmp_path, train_dataset=DatasetDict(train=token_rows(4), test=token_rows(4))).train()


@pytest.mark.parametrize("data", [[], token_rows(4).select([])], ids=["list", "dataset"])
def test_data_without_rows_is_refused(tmp_path, data):
    refused("the training data has no rows", make_trainer(tmp_path, train_dataset=data).train)
    refused("the evaluation data has no rows", make_trainer(tmp_path).evaluate, data)


def test_data_that_fills_no_step_is_refused(tmp_path):
    short = make_trainer(tmp_path, train_dataset=token_rows(3), dataloader_drop_last=True)
    refused(r"0 of 1 micro-batches of `per_device_train_batch_size`=4 .*`dataloader_drop_last`=True", short.train)
    stream = token_rows(6).to_iterable_dataset()
    short = make_trainer(tmp_path, train_dataset=stream, gradient_accumulation_steps=3)
    refused(r"it gives 2 of 3 micro-batches .*`gradient_accumulation_steps`=3", short.train)
    assert len(trained(tmp_path, stream)) == 2  # of the first row to the sixth, and again


def test_rows_are_grouped_by_the_lengths_of_their_column(tmp_path):
    data = token_rows(8).add_column("words", [3, 1, 4, 1, 5, 9, 2, 6])
    options = {"train_sampling_strategy": "group_by_length", "length_column_name": "words"}
    loader = make_trainer(
        tmp_path, train_dataset=data, per_device_train_batch_size=2, **options
    ).get_train_dataloader()
    longest = next(iter(loader))["input_ids"][0]  # a grouped order begins with the longest row
    assert longest.tolist() == data["input_ids"][5]


def dealt(count: int, ranks: int, batch_size: int) -> list[list[tuple[int, int]]]:
    """For each batch of all ranks, what accelerate's main process deals out of a stream of `count` rows: each rank's
    number of rows, and what is left of the stream."""
    whole = ranks * batch_size
    batches = [min(whole, count - start) for start in range(0, count, whole)]
    return [[(-(-left // ranks), left if i == len(batches) - 1 else -1)] * ranks for i, left in enumerate(batches)]


@pytest.mark.parametrize(("count", "ranks"), [(12, 1), (5, 2), (6, 2), (7, 2), (8, 2), (13, 3), (1, 4)])
def test_each_row_of_a_stream_counts_once_on_several_processes(tmp_path, count, ranks):
    seen = []
    for rank in range(ranks):
        trainer = make_trainer(tmp_path, per_device_eval_batch_size=2)
        trainer.start_evaluation(iter(()))  # of no known length
        for batch in dealt(count, ranks, 2):
            size, left = batch[rank]
            state = SimpleNamespace(remainder=left)
            trainer.accelerator = SimpleNamespace(num_processes=ranks, process_index=rank, gradient_state=state)
            rows, fresh = trainer.rows_of_batch(size)
            seen += rows[fresh].tolist()
    assert sorted(seen) == list(range(count))
