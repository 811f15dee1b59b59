# SPDX-License-Identifier: Apache-2.0
"""A checkpoint is gone on from by its own run only: what differs is named before anything is loaded."""

import json
import logging
import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from transformers.trainer_utils import IntervalStrategy

from fpmgm.data import train_tokenizer
from fpmgm.trainers import (
    ConsistencyConfig,
    ConversionConfig,
    ConversionTrainer,
    ImageTokenizerConfig,
    SDTTConfig,
    SDTTTrainer,
)
from fpmgm.trainers.resumption import MAY_CHANGE, MUST_STAY
from fpmgm.trainers.run_record import Origin, describe_files, describe_processor, describe_rows
from tests.testing_utils import refused

from .training_utils import make_trainer, token_rows, training_model


WORDS = {"vocab_size": 270, "mask_token_id": 269}
EVERY_STEP = {"save_strategy": "steps", "save_steps": 1}


def tokenizer(text: str):
    return train_tokenizer([text] * 20, 270)


FIRST, OTHER = tokenizer("the quick brown fox jumps over"), tokenizer("a lazy dog finds nothing there")


def trainer_of(folder: Path, **changes):
    run = {
        "model": training_model(**WORDS),
        "processing_class": FIRST,
        "eval_dataset": token_rows(4, seed=1),
        "origin": Origin({"text_files": [{"bytes": 5, "sha256": "ab"}]}, {"layer_map": "1/2/3"}),
        "max_steps": 2,
        **EVERY_STEP,
    }
    return make_trainer(folder, **{**run, **changes})


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("run")
    trainer_of(folder).train()
    return folder


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": training_model(hidden_size=32, **WORDS)}, "`hidden_size`=32, not 16"),
        ({"model": training_model(grad_iterations=[2, 6], **WORDS)}, r"`grad_iterations`=\[2, 6\], not \[3, 6\]"),
        ({"processing_class": OTHER}, r"the tokenizer is another \(\d+ of 270 ids mean other tokens\)"),
        ({"train_dataset": token_rows(24, seed=9)}, r"the training rows \(of other content\).*`ignore_data_change"),
        ({"train_dataset": token_rows(28)}, r"the training rows \(28 rows, not 24 rows\)"),
        ({"eval_dataset": token_rows(4, seed=2)}, r"the evaluation rows \(of other content\)"),
        ({"origin": Origin({"text_files": [{"bytes": 7, "sha256": "cd"}]})}, "`text_files` .file 1 has 7 bytes"),
        ({"origin": Origin(options={"layer_map": "1/2/4"})}, "`layer_map`='1/2/4', not '1/2/3'"),
        ({"learning_rate": 3.0}, r"`learning_rate`=3.0, not 0.01 \(the optimizer's state in the"),
        ({"lr_scheduler_type": "linear"}, "`lr_scheduler_type`='linear', not 'constant'"),
        ({"seed": 1, "max_steps": 5}, "`seed`=1, not 42"),
        ({"per_device_train_batch_size": 2}, r"sequences in an optimizer step \(.*\)=2, not 4"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_checkpoint_of_another_run_is_refused_and_the_difference_named(run, changes, named):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=f"checkpoint-2' is a checkpoint of another run: .*{named}"):
        trainer_of(run, **changes).train(resume_from_checkpoint=True)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_options_that_may_change_are_named_and_data_only_if_asked(run, tmp_path, caplog):
    shutil.copytree(run, tmp_path / "moved")
    options = {"max_steps": 3, "weight_decay": 0.0, "max_grad_norm": 0.5, "logging_steps": 2, "run_name": "again"}
    changes = {"train_dataset": token_rows(28), "ignore_data_change": True}
    with caplog.at_level(logging.WARNING):
        trainer_of(tmp_path / "moved", **options, **changes).train(resume_from_checkpoint=True)
    options, data = [text for text in caplog.messages if "goes on with other" in text][::-1]
    assert "other data than it was made with: the training rows (28 rows, not 24 rows)." in data
    assert "other options than it was made with: `max_grad_norm`=0.5, not 1.0; `max_steps`=3, not 2." in options
    recorded = json.loads((tmp_path / "moved/checkpoint-3/run.json").read_text())
    assert (recorded["data"]["train"]["rows"], recorded["arguments"]["max_grad_norm"]) == (28, 0.5)
    caplog.clear()
    trainer_of(tmp_path / "moved", max_steps=4, max_grad_norm=0.5, train_dataset=token_rows(28)).train(True)
    assert [text for text in caplog.messages if "max_grad_norm" in text or "data" in text] == []


def test_a_split_of_the_batch_that_leaves_its_size_may_change(run, tmp_path):
    shutil.copytree(run, tmp_path / "moved")
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer_of(tmp_path / "moved", max_steps=3, **split).train(resume_from_checkpoint=True)


def test_a_stream_goes_on_with_as_many_workers_which_decide_its_order(tmp_path):
    def stream(workers: int, **options):
        rows = token_rows(24).to_iterable_dataset().shuffle(seed=1, buffer_size=9)
        return make_trainer(tmp_path, train_dataset=rows, dataloader_num_workers=workers, **EVERY_STEP, **options)

    orders = [[row["input_ids"].tolist() for row in stream(n).get_train_dataloader()] for n in (0, 1)]
    assert orders[0] != orders[1]
    stream(0).train()
    refused("`dataloader_num_workers` of a stream=1, not 0 .the order of the data", stream(1, max_steps=4).train, True)
    stream(0, max_steps=4).train(True)


def test_weights_that_no_checkpoint_holds_are_compared(tmp_path):
    lora = {"peft_config": LoraConfig(r=2), "max_steps": 1, **EVERY_STEP}
    make_trainer(tmp_path / "lora", **lora).train()
    for changes, named in (
        ({"model": training_model(seed=1)}, r"the weights that are not trained \(of other content\)"),
        ({"peft_config": LoraConfig(r=3)}, "`r`=3, not 2"),
    ):
        refused(named, make_trainer(tmp_path / "lora", **{**lora, **changes}).train, resume_from_checkpoint=True)
    for kind, options in ((ConversionTrainer, {}), (SDTTTrainer, {"rounds": 2, "steps_per_round": 2})):
        folder, options = tmp_path / kind.__name__, {**options, "max_steps": 1, **EVERY_STEP}
        make_trainer(folder, None, kind, teacher=training_model(), **options).train()
        make_trainer(folder, None, kind, teacher=training_model(), **options).train(True)
        with pytest.raises(ValueError, match="the teacher's weights"):
            make_trainer(folder, None, kind, teacher=training_model(seed=1), **options).train(True)


def test_rounds_are_not_added_to_a_run_whose_last_one_made_no_teacher(tmp_path):
    # The student of the last round teaches nobody: a further round would go on with that round's own teacher.
    options = {"rounds": 1, "steps_per_round": 1, "first_step_size": 0.1, **EVERY_STEP}
    make_trainer(tmp_path, None, SDTTTrainer, **options, max_steps=1).train()
    longer = make_trainer(tmp_path, None, SDTTTrainer, **{**options, "rounds": 2}, max_steps=2)
    refused(r"`rounds`=2, not 1 \(which teacher a step has follows from it", longer.train, resume_from_checkpoint=True)


def test_a_checkpoint_without_a_record_goes_on_with_a_warning(run, tmp_path, caplog):
    shutil.copytree(run / "checkpoint-2", tmp_path / "moved/checkpoint-2")
    listed = json.loads((tmp_path / "moved/checkpoint-2/checkpoint_files.json").read_text())
    del listed["run.json"], listed["log_0.safetensors"]
    (tmp_path / "moved/checkpoint-2/checkpoint_files.json").write_text(json.dumps(listed))
    for name in ("run.json", "log_0.safetensors"):
        (tmp_path / "moved/checkpoint-2" / name).unlink()
    trainer_of(tmp_path / "moved", max_steps=3).train(resume_from_checkpoint=True)
    assert "checkpoint-2 has no run.json, as checkpoints of earlier versions" in caplog.text
    assert (tmp_path / "moved/checkpoint-3/run.json").is_file()


def test_the_tables_name_options_that_there_are_and_each_once():
    kinds = (ConsistencyConfig, ConversionConfig, SDTTConfig, ImageTokenizerConfig)
    options = {f.name for kind in kinds for f in fields(kind)}
    must_stay = [name for names in MUST_STAY.values() for name in names]
    assert len(must_stay) == len(set(must_stay)) and not MAY_CHANGE & set(must_stay)
    assert set(must_stay) - options == {"sequences_per_step", "stream_workers", "engine"} and options >= MAY_CHANGE


def test_a_tokenizer_is_the_same_when_it_is_read_again_or_has_been_used(tmp_path):
    FIRST.save_pretrained(tmp_path)
    again, described = AutoTokenizer.from_pretrained(tmp_path), describe_processor(FIRST)
    again(["the quick", "fox"], truncation=True, max_length=3)
    assert describe_processor(again) == described != describe_processor(OTHER)
    again.add_tokens(["blue"])
    assert describe_processor(again) != described


def test_files_are_told_apart_by_content_and_not_by_name(tmp_path):
    for name in ("a.txt", "folder/b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("same")
    assert describe_files([tmp_path / "a.txt"]) == describe_files([tmp_path / "folder"])
    (tmp_path / "a.txt").write_text("some")
    assert describe_files([tmp_path / "a.txt"]) != describe_files([str(tmp_path / "folder")])
    assert describe_files(None) is None


def test_strategies_are_recorded_as_text(run):
    recorded = json.loads((run / "checkpoint-2/run.json").read_text())["arguments"]
    assert recorded["save_strategy"] == IntervalStrategy.STEPS.value == "steps"


def test_rows_in_a_list_are_compared_as_those_of_a_dataset():
    rows = [{"input_ids": [i, i + 1]} for i in range(2000)]
    arrays = [{"input_ids": np.array(row["input_ids"])} for row in rows]
    described = describe_rows(Dataset.from_list(rows))
    assert describe_rows(rows) == describe_rows(tuple(arrays)) == described != describe_rows(rows[::-1])
    pictures = [describe_rows([{"image": object(), "input_ids": [1]}]) for _ in range(2)]
    assert pictures[0] == pictures[1]
