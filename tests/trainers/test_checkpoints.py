# SPDX-License-Identifier: Apache-2.0
"""Kills, full disks, damaged checkpoints and losses that are not finite, against the uninterrupted run."""

import itertools
import json
import logging
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from fpmgm.trainers import last_checkpoint
from fpmgm.trainers.checkpoints import checkpoint_to_resume
from fpmgm.trainers.lock import LOCK_FILE
from tests.testing_utils import refused, run_python

from . import faults
from .same_run import contents, differences
from .training_utils import CallOnce, RecordWeights, make_trainer, token_rows, training_model


EVERY_TWO = {"save_strategy": "steps", "save_steps": 2}


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def half(straight, tmp_path) -> Path:
    """The same run, ended after two steps."""
    shutil.copytree(straight / "checkpoint-2", tmp_path / "run/checkpoint-2")
    return tmp_path / "run"


# --- kills -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_killed_at_each_write_of_a_checkpoint_equals_the_uninterrupted_one(tmp_path):
    run_python("-m", faults.__name__, "at-each-write", str(tmp_path))
    left = json.loads((tmp_path / "left.json").read_text())
    assert len(left) > 12
    # Killed while it writes checkpoint-4, a run has checkpoint-2 alone; from the last rename on it has the new one.
    during = [state for state in left if "_saving/checkpoint-4" in state["names"]]
    assert len(during) > 8
    assert all(state["names"] == ["_lock", "_saving", "_saving/checkpoint-4", "checkpoint-2"] for state in during)
    assert {Path(state["last"]).name for state in during} == {"checkpoint-2"}
    after = [int(Path(state["last"]).name.removeprefix("checkpoint-")) for state in left[len(during) :]]
    assert after == sorted(after) and after[0] == 4 and 6 in after
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["checkpoint-16"]
    killed, expected = (contents(tmp_path / name / "checkpoint-16") for name in ("killed", "straight"))
    assert differences(killed, expected) == []


# --- full disks ------------------------------------------------------------------------------------------------------


def test_a_disk_that_is_full_at_any_write_leaves_the_last_checkpoint_and_nothing_else(straight, half):
    before, arguments = listing(half), {"max_steps": 4, "save_steps": 2, "save_total_limit": 1}
    for number in itertools.count(1):
        try:
            with faults.cut_off(number, faults.no_space, faults.WRITERS):
                faults.train(half, **arguments)
            break
        except OSError as error:
            if "checkpoint-4" in {path.name for path in half.iterdir()}:
                continue  # at the removal of the old one, when the new one was whole
            assert "checkpoint-4 could not be written: [Errno 28] No space left on device" in str(error)
            assert f"The last whole checkpoint, {half / 'checkpoint-2'}, is intact" in str(error)
            assert listing(half) == before
    assert number > 11
    assert last_checkpoint(half) == str(half / "checkpoint-4")
    assert differences(contents(half / "checkpoint-4"), contents(straight / "checkpoint-4")) == []


def test_a_file_that_disappears_is_not_taken_for_a_full_disk(half):
    def gone():
        raise FileNotFoundError("somebody removed it")

    with faults.cut_off(2, gone, faults.WRITERS), pytest.raises(OSError, match="somebody removed it") as caught:
        faults.train(half, max_steps=4, save_steps=2)
    assert "Make room" not in str(caught.value) and "something else writes to or removes" in str(caught.value)


@pytest.mark.parametrize(("limit", "raised"), [(40_000, "SafetensorError"), (100_000, "RuntimeError")])
def test_what_libraries_raise_for_a_file_that_cannot_grow_ends_as_clearly(half, limit, raised):
    # The system's limit on a file's size fails like a full disk, in the writers' own code and words.
    before, soft_hard = listing(half), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, soft_hard[1]))
    try:
        with pytest.raises(OSError, match=r"checkpoint-4 could not be written.*MB are free.*checkpoint-2") as caught:
            faults.train(half, max_steps=4, save_steps=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft_hard)
    assert type(caught.value.__cause__).__name__ == raised
    assert listing(half) == before


@pytest.mark.slow
def test_a_rank_that_cannot_write_ends_all_and_a_restart_equals_the_uninterrupted_run(tmp_path):
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--module", faults.__name__)
    failed = run_python(*command, "on-one-rank", str(tmp_path), fails=True)
    assert "checkpoint-4 could not be written: [Errno 28] No space left on device" in failed.stderr
    assert [path.name for path in (tmp_path / "failed").glob("checkpoint-*")] == ["checkpoint-2"]
    assert last_checkpoint(tmp_path / "failed") == str(tmp_path / "failed/checkpoint-2")
    run_python(*command, "on-one-rank", str(tmp_path))
    runs = [contents(tmp_path / name / "checkpoint-4") for name in ("failed", "straight")]
    assert {"rng_state_0", "rng_state_1"} < runs[0].keys()
    assert differences(*runs) == []


# --- damaged checkpoints ---------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 2)


@pytest.mark.parametrize("damage", [Path.unlink, cut])
def test_a_damaged_checkpoint_is_skipped_with_a_warning_and_refused_by_name(straight, tmp_path, caplog, damage):
    names = sorted(listing(straight / "checkpoint-4"))
    assert len(names) > 10
    for i, name in enumerate(names):
        run = tmp_path / str(i)
        shutil.copytree(straight, run)
        damage(run / "checkpoint-4" / name)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert last_checkpoint(run) == str(run / "checkpoint-2")
        (record,) = caplog.records
        assert "checkpoint-4 is incomplete" in record.getMessage() and name in record.getMessage()
        with pytest.raises(ValueError, match=rf"checkpoint-4' is incomplete.*{name}.*{run / 'checkpoint-2'}"):
            checkpoint_to_resume(run / "checkpoint-4", run)


def test_training_goes_on_from_the_last_whole_checkpoint(straight, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    (run / "checkpoint-4/ema.safetensors").unlink()
    trainer = make_trainer(run, training_model(dropout=0.1), max_steps=4, train_dataset=token_rows(20), **EVERY_TWO)
    trainer.train(resume_from_checkpoint=True)
    # the incomplete one was replaced
    assert differences(contents(run / "checkpoint-4"), contents(straight / "checkpoint-4")) == []
    assert last_checkpoint(run) == str(run / "checkpoint-4")


def test_a_folder_without_a_whole_checkpoint_is_refused(half):
    (half / "checkpoint-2/optimizer.pt").unlink()
    assert last_checkpoint(half) is None
    for resume, words in (
        (True, "`resume_from_checkpoint`=True, but no whole checkpoint"),
        (str(half / "checkpoint-2"), r"lacks optimizer\.pt.*holds no whole one"),
        (str(half / "checkpoint-3"), "does not exist"),
    ):
        refused(words, make_trainer(half).train, resume_from_checkpoint=resume)


# --- which checkpoints stay ------------------------------------------------------------------------------------------


class KeepListings(TrainerCallback):
    """The checkpoints that are there when each new one has been saved."""

    def __init__(self):
        self.seen = []

    def on_save(self, args, state, control, **kwargs):
        folders = sorted(path for path in Path(args.output_dir).iterdir() if path.name != LOCK_FILE)
        assert all(last_checkpoint(folder.parent) and folder.name.startswith("checkpoint-") for folder in folders)
        self.seen.append([int(folder.name.removeprefix("checkpoint-")) for folder in folders])


def test_the_newest_and_the_best_checkpoints_stay(tmp_path):
    keep, losses = KeepListings(), [3.0, 1.0, 2.0, 4.0, 5.0]
    trainer = make_trainer(
        f"{tmp_path}/", max_steps=5, eval_dataset=token_rows(4), eval_strategy="steps", eval_steps=1, save_steps=1,
        save_strategy="steps", save_total_limit=2, load_best_model_at_end=True, callbacks=[keep],
    )  # fmt: skip
    trainer.evaluate = lambda **kwargs: {"eval_loss": losses[trainer.state.global_step - 1]}
    trainer.train()
    assert keep.seen == [[1], [1, 2], [2, 3], [2, 4], [2, 5]]  # the newest, and the best or else the one before
    for step in (2, 5):
        state = json.loads((tmp_path / f"checkpoint-{step}/trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-2")


def test_a_limit_counts_whole_checkpoints_only(straight, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    (run / "checkpoint-3").mkdir()  # not ours to remove
    faults.train(run, max_steps=6, save_steps=2, save_total_limit=2)
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-3", "checkpoint-4", "checkpoint-6"]


def test_a_run_started_anew_replaces_the_checkpoints_of_another(half):
    make_trainer(half, training_model(seed=1), max_steps=2, **EVERY_TWO).train()
    make_trainer(half.parent / "alone", training_model(seed=1), max_steps=2, **EVERY_TWO).train()
    runs = (contents(folder / "checkpoint-2") for folder in (half, half.parent / "alone"))
    assert differences(*runs) == []
    assert [path.name for path in half.iterdir()] == ["checkpoint-2"]


def test_a_checkpoint_of_the_model_alone_is_whole(tmp_path):
    make_trainer(tmp_path, max_steps=2, save_only_model=True, **EVERY_TWO).train()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    names = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert {"model.safetensors", "ema.safetensors", "trainer_state.json"} <= names and "optimizer.pt" not in names


# --- going on --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [3, 4, 6])
def test_a_stream_that_has_begun_again_is_taken_up_where_it_was(tmp_path, step):
    def train(resume=None):
        trainer = make_trainer(
            tmp_path, training_model(dropout=0.1), max_steps=8, save_strategy="steps", save_steps=step,
            per_device_train_batch_size=2, gradient_accumulation_steps=2,
            train_dataset=token_rows(12).to_iterable_dataset().shuffle(seed=0, buffer_size=12),  # three steps a pass
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return contents(tmp_path / "checkpoint-8")

    whole = train()
    assert differences(train(str(tmp_path / f"checkpoint-{step}")), whole) == []


def test_a_checkpoint_holds_what_the_next_line_of_the_log_is_made_of(tmp_path):
    arguments = {"max_steps": 8, "logging_steps": 3, "save_steps": 4}
    faults.train(tmp_path / "straight", **arguments)
    lines = contents(tmp_path / "straight/checkpoint-8")["lines"]
    assert [line["step"] for line in lines] == [3, 6]
    shutil.copytree(tmp_path / "straight/checkpoint-4", tmp_path / "parts/checkpoint-4")
    faults.train(tmp_path / "parts", **arguments)
    assert contents(tmp_path / "parts/checkpoint-8")["lines"] == lines


# --- a loss that is not finite ---------------------------------------------------------------------------------------


def poison_output(model) -> None:
    model.final_norm.register_forward_hook(lambda module, args, output: output * float("nan"))


def poison_weights(model) -> None:
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))


def stopped(folder: Path, step: int, poison, **arguments) -> BaseException:
    trainer = make_trainer(folder, max_steps=6, save_total_limit=1, callbacks=[CallOnce(step, poison)], **arguments)
    with pytest.raises(FloatingPointError, match=rf"not finite at step {step}\b") as caught:
        trainer.train()
    assert all(tensor.isfinite().all() for name in ("model", "ema")
               for tensor in load_file(Path(last_checkpoint(folder)) / f"{name}.safetensors").values())  # fmt: skip
    return caught.value


@pytest.mark.parametrize("step", [3, 4])
def test_a_stop_keeps_the_last_step_alone_under_a_limit_of_one(tmp_path, step):
    folder = tmp_path / f"checkpoint-{step - 1}"
    error = stopped(tmp_path, step, poison_output, **EVERY_TWO)
    assert f"Step {step - 1} is saved in {folder}" in str(error)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == step - 1


def test_a_stop_at_a_step_that_is_saved_does_not_write_it_again(tmp_path):
    before = {}

    def poison(model):
        before.update({path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoint-2").iterdir()})
        poison_output(model)

    stopped(tmp_path, 3, poison, **EVERY_TWO)
    assert len(before) > 10
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoint-2").iterdir()} == before


def test_weights_that_are_not_finite_do_not_replace_the_last_good_checkpoint(tmp_path):
    error = stopped(tmp_path, 4, poison_weights, **EVERY_TWO)
    assert f"Step 2 is saved in {tmp_path / 'checkpoint-2'}" in str(error)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_a_stop_on_a_full_disk_says_both(tmp_path):
    def poison(model):
        poison_output(model)
        fault.__enter__()

    fault = faults.cut_off(3, faults.no_space, faults.FILE_WRITERS)
    try:
        error = stopped(tmp_path, 4, poison, **EVERY_TWO)
    finally:
        fault.__exit__(None, None, None)
    assert f"Step 2 is saved in {tmp_path / 'checkpoint-2'}" in str(error)
    assert "checkpoint-3 could not be written: [Errno 28]" in str(error.__cause__)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_float16_stops_at_a_bad_loss_but_not_at_a_bad_gradient(tmp_path):
    def at(step, value):
        return lambda *args: args[-1] * (value if trainer.state.global_step + 1 == step else 1)

    model, record = training_model(), RecordWeights()
    trainer = make_trainer(tmp_path, model, max_steps=6, callbacks=[record])
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")  # as on a GPU
    next(model.parameters()).register_hook(at(2, float("inf")))
    model.final_norm.register_forward_hook(at(4, float("nan")))
    with pytest.raises(FloatingPointError, match=r"step 4\b.*Step 3 is saved"):
        trainer.train()
    _, first, second, third = record.history
    assert differences(second, first) == [] and differences(third, second) != []  # the second step was skipped
