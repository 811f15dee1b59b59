# SPDX-License-Identifier: Apache-2.0
"""The same command goes on with the same run; with another text, model or tokenizer it says what differs."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import train_owt
from fpmgm.trainers.lock import hold_folder
from tests.recipes.options import QUIET, SMALL, configured
from tests.testing_utils import refused
from tests.trainers import faults


TEXT = "The quick brown fox jumps over the lazy dog, and over what else it finds.\n" * 200
MORE = "".join(f"Zebras {i} graze quietly beyond {i * 7} hills.\n" for i in range(300))


def command(folder: Path, steps: int, *options: str) -> list[str]:
    sizes = "--max_position_embeddings 16 --tokenizer_vocab_size 270 --per_device_train_batch_size 4"
    every = "--warmup_steps 1 --eval_steps 2 --save_steps 2 --eval_blocks 4"
    paths = ["--text_files", str(folder / "text.txt"), "--output_dir", str(folder / "out"), "--max_steps", str(steps)]
    return [*configured("fp_mdlm_small"), *paths, *SMALL, *sizes.split(), *QUIET, *every.split(), *options]


@pytest.fixture
def begun(tmp_path) -> Path:
    """A run of two steps."""
    (tmp_path / "text.txt").write_text(TEXT)
    train_owt.main(command(tmp_path, 2))
    return tmp_path


def test_text_that_was_appended_is_named_and_its_tokenizer_is_not_trained_again(begun):
    before = AutoTokenizer.from_pretrained(begun / "out").get_vocab()
    size = (begun / "text.txt").stat().st_size
    with (begun / "text.txt").open("a") as file:
        file.write(MORE)
    larger = (begun / "text.txt").stat().st_size
    message = rf"`text_files` \(file 1 has {larger:,} bytes, not {size:,}\)"
    said = refused(message, train_owt.main, command(begun, 4))
    assert "tokenizer" not in said and "`ignore_data_change=True`" in said
    train_owt.main(command(begun, 4, "--ignore_data_change"))
    assert AutoTokenizer.from_pretrained(begun / "out").get_vocab() == before
    assert json.loads((begun / "out/checkpoint-4/trainer_state.json").read_text())["global_step"] == 4
    train_owt.main(command(begun, 4))  # the checkpoint knows the text as it is now


def test_other_options_are_named(begun):
    (begun / "moved").mkdir()
    (begun / "text.txt").rename(begun / "moved/text.txt")  # the same file elsewhere is the same
    (begun / "out").rename(begun / "moved/out")
    for options, named in (
        (["--hidden_size", "32"], "`hidden_size`=32, not 16"),
        (["--tokenizer_vocab_size", "280"], "`tokenizer_vocab_size`=280, not 270"),
        (["--eval_share", "0.2"], "`eval_share`=0.2, not 0.01.*the training rows"),
        (["--learning_rate", "3"], "`learning_rate`=3.0"),
    ):
        refused(f"checkpoint of another run: .*{named}", train_owt.main, command(begun / "moved", 2, *options))
    train_owt.main(command(begun / "moved", 2))


def test_a_folder_whose_checkpoints_are_all_damaged_is_not_begun_anew(begun):
    os.truncate(begun / "out/checkpoint-2/trainer_state.json", 30)
    message = r"no whole checkpoint is in .*checkpoint-2 is incomplete: it lacks all but 30"
    refused(message, train_owt.main, command(begun, 2))


def hold(folder: Path) -> None:
    with hold_folder(folder):
        (folder / "ready").touch()
        time.sleep(120)


def test_nothing_is_prepared_in_a_folder_that_another_run_holds(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    pid = faults.start(hold, tmp_path / "out")
    while not (tmp_path / "out/ready").exists():
        time.sleep(0.01)
    try:
        refused(f"in use by another run: process {pid} on ", train_owt.main, command(tmp_path, 2))
        assert {path.name for path in (tmp_path / "out").iterdir()} == {"ready", "_lock"}
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
