# SPDX-License-Identifier: Apache-2.0
"""Checkpoints whose files are not what training wrote: the file is named, and the last whole checkpoint is found."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fpmgm.trainers import last_checkpoint
from tests.testing_utils import refused

from .test_checkpoints import listing
from .training_utils import make_trainer, token_rows, training_model


@pytest.fixture
def run(straight, tmp_path) -> Path:
    shutil.copytree(straight, tmp_path / "run")
    return tmp_path / "run"


def resume(run: Path, checkpoint: str | bool = True) -> None:
    trainer = make_trainer(run, training_model(dropout=0.1), train_dataset=token_rows(20), max_steps=4,
                           save_strategy="steps", save_steps=2)  # fmt: skip
    trainer.train(resume_from_checkpoint=checkpoint if checkpoint is True else str(run / checkpoint))


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    """Put `content` into a file, padded to its size, which the list of files then still fits."""

    def damage(folder: Path) -> None:
        size, data = (folder / name).stat().st_size, content.encode() if isinstance(content, str) else content
        (folder / name).write_bytes(data.ljust(size, b" "))

    return damage


def change(name: str, **values) -> Callable[[Path], None]:
    """Other values in a JSON file."""

    def damage(folder: Path) -> None:
        changed = json.loads((folder / name).read_text()) | values
        write(name, json.dumps(changed, indent=2))(folder)

    return damage


def fifo(folder: Path) -> None:
    (folder / "checkpoint_files.json").unlink()
    os.mkfifo(folder / "checkpoint_files.json")


LIST = "checkpoint_files.json"
DAMAGES = {
    "no list": (lambda folder: (folder / LIST).unlink(), f"lacks {LIST}, which is written last"),
    "list of nothing": (write(LIST, "[]"), f"{LIST} is not JSON with the size in bytes of each file"),
    "empty list": (write(LIST, "{}"), f"{LIST} that gives the size in bytes of each file, trainer_state.json among"),
    "cut list": (lambda folder: os.truncate(folder / LIST, 30), f"{LIST} is not JSON with the size"),
    "deep list": (write(LIST, "[" * 200_000), f"{LIST} is not JSON with the size"),
    "sizes of text": (change(LIST, **{"ema.safetensors": "big"}), f"a {LIST} that gives the size in bytes"),
    "files elsewhere": (change(LIST, **{"../../x": 1}), f"a {LIST} that gives the size in bytes"),
    "list of bytes": (write(LIST, b"\xff\xfe\x00"), f"{LIST} is not JSON with the size"),
    "pipe": (fifo, f"lacks {LIST}"),
    "cut state": (lambda folder: os.truncate(folder / "trainer_state.json", 50), "all but 50 .* trainer_state.json"),
    "another state": (
        write("trainer_state.json", "[]"),
        "trainer_state.json is not JSON with the state",
    ),
    "state of text": (change("trainer_state.json", global_step="4"), r"trainer_state.json is not .*'global_step'"),
    "unknown state": (change("trainer_state.json", colour="red"), r"trainer_state.json is not .*'colour'"),
    "broken history": (change("trainer_state.json", log_history=[1]), r"trainer_state.json is not .*'log_history'"),
    "another config": (write("config.json", "}"), "config.json is not JSON"),
    "another record": (write("run.json", "\0"), "run.json is not JSON"),
    "another average": (write("ema.safetensors", "x" * 99), "ema.safetensors is not a file of tensors"),
    "another optimizer": (write("optimizer.pt", "PK"), "optimizer.pt is not a file of `torch.save`"),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGES.values(), ids=DAMAGES)
def test_a_file_of_another_form_is_named_and_the_checkpoint_before_found(run, caplog, damage, words):
    damage(run / "checkpoint-4")
    before, clock = {path: path.stat().st_size for path in run.rglob("*")}, time.process_time()
    assert last_checkpoint(run) == str(run / "checkpoint-2")
    assert time.process_time() - clock < 2
    refused(rf"checkpoint-4' is .*{words}.*resume from {run}/checkpoint-2", resume, run, "checkpoint-4")
    shutil.rmtree(run / "checkpoint-2")
    refused(rf"no whole checkpoint is in {run}: checkpoint-4 is .*{words}", resume, run)
    assert {path for path in before if "checkpoint-2" not in str(path)} == {*run.rglob("*")}


def tensors(name: str, function: Callable[[dict], dict]) -> Callable[[Path], None]:
    """Other tensors in a file of them."""

    def damage(folder: Path) -> None:
        metadata = {"num_updates": "4", "decay": "0.9999"}
        save_file(function(load_file(folder / name)), folder / name, metadata=metadata)
        listed = json.loads((folder / LIST).read_text())
        (folder / LIST).write_text(json.dumps({**listed, name: (folder / name).stat().st_size}))

    return damage


def of_nan(values: dict) -> dict:
    return {name: torch.full_like(tensor, float("nan")) for name, tensor in values.items()}


def without_one(values: dict) -> dict:
    return dict(sorted(values.items())[1:])


def of_another_shape(values: dict) -> dict:
    return {name: tensor.flatten()[:-1].clone() for name, tensor in values.items()}


def other_optimizer(folder: Path) -> None:
    torch.save({"state": {}, "param_groups": []}, folder / "optimizer.pt")
    tensors("ema.safetensors", dict)(folder)  # lists sizes
    listed = json.loads((folder / LIST).read_text())
    (folder / LIST).write_text(json.dumps({**listed, "optimizer.pt": (folder / "optimizer.pt").stat().st_size}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (tensors("ema.safetensors", of_nan), "ema.safetensors .*values that are not finite in"),
        (tensors("ema.safetensors", without_one), "ema.safetensors .*differs"),
        (tensors("ema.safetensors", of_another_shape), "ema.safetensors .*shape"),
        (tensors("model.safetensors", of_nan), "the weights .*values that are not finite in"),
        (tensors("model.safetensors", without_one), "the weights .*is missing or unknown"),
        (tensors("log_0.safetensors", lambda values: {"x": values["loss"]}), "log_0.safetensors"),
        (other_optimizer, "the states of optimizer and schedule"),
    ],
    ids=["average of NaN", "average of less", "average of others", "NaN", "less", "log", "optimizer"],
)
def test_values_that_no_training_has_are_named_when_they_are_read(run, damage, words):
    damage(run / "checkpoint-2")
    before = listing(run)
    refused(rf"checkpoint-2 is damaged: {words}.*resume from {run / 'checkpoint-4'}", resume, run, "checkpoint-2")
    assert listing(run) == before
