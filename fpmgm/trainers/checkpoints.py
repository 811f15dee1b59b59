# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that survive a kill and a full disk.

A checkpoint is written into the folder `_saving`. When all ranks have written, a list of its files with their sizes is
added, everything is flushed to the disk, and one rename gives it its name, `checkpoint-N`. Only then are older ones
removed. A folder is whole if it has the list and every file in it.
"""

import json
import math
import os
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy, SaveStrategy, sort_checkpoints
from transformers.utils import logging


logger = logging.get_logger(__name__)

STAGING_FOLDER = "_saving"  # pushes to the hub leave out what begins with an underscore
FILE_LIST = "checkpoint_files.json"


def missing_files(folder: str | Path) -> list[str]:
    """What `folder` lacks of a whole checkpoint, in words; nothing if it is whole.

    >>> missing_files("outputs/checkpoint-7")
    ['checkpoint_files.json, which is written last']
    """
    try:
        sizes = json.loads((Path(folder) / FILE_LIST).read_text())
    except (OSError, ValueError):  # not there, or cut off by a copy that was interrupted
        return [f"{FILE_LIST}, which is written last"]
    return [text for name, size in sizes.items() if (text := _lack(Path(folder) / name, name, size))]


def _lack(path: Path, name: str, size: int) -> str | None:
    if not path.is_file():
        return name
    there = path.stat().st_size
    return f"all but {there:,} of the {size:,} bytes of {name}" if there < size else None


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The whole checkpoint of the latest step in `output_dir`; a warning names each later one that is not whole.

    Args:
        output_dir (`str` or `Path`): Folder of a run; it need not exist.

    Returns:
        `str`, *optional*: Its folder. `None`: there is none.

    >>> last_checkpoint("outputs/none") is None
    True
    """
    last = _last_whole(output_dir)
    for folder in _by_step(Path(output_dir) / STAGING_FOLDER):
        logger.warning(f"The writing of {folder.name} was interrupted; the last whole checkpoint is {last}.")
    for folder in _by_step(output_dir):
        if folder == last:
            break
        logger.warning(
            f"{folder} is incomplete: it lacks {', '.join(missing_files(folder))}. The last whole one is {last}; "
            "remove the incomplete one to silence this warning."
        )
    return None if last is None else str(last)


def _by_step(output_dir: str | Path) -> list[Path]:
    """Folders with the name of a checkpoint, the latest step first."""
    folders = [path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()]
    steps = {path: path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-") for path in folders}
    return sorted((path for path in folders if steps[path].isdecimal()), key=lambda path: -int(steps[path]))


def _last_whole(output_dir: str | Path) -> Path | None:
    return next((folder for folder in _by_step(output_dir) if not missing_files(folder)), None)


def checkpoint_to_resume(resume_from_checkpoint: str | Path | bool | None, output_dir: str | Path) -> str | None:
    """The whole checkpoint that `resume_from_checkpoint` means: a folder's own, or with `True` the last.

    Raises:
        `ValueError`: if there is no such folder or it is incomplete, saying what it lacks and which one is whole.
    """
    if not resume_from_checkpoint:
        return None
    if resume_from_checkpoint is True:
        last = last_checkpoint(output_dir)
        if last is None:
            raise ValueError(f"`resume_from_checkpoint`=True, but no whole checkpoint is in {output_dir}: begin anew.")
        return last
    folder = Path(resume_from_checkpoint)
    missing = missing_files(folder)
    if not missing:
        return str(folder)
    problem = f"is incomplete: it lacks {', '.join(missing)}" if folder.is_dir() else "does not exist"
    last = _last_whole(folder.parent)
    remedy = f"resume from {last}, the last whole one there" if last else f"{folder.parent} holds no whole one"
    raise ValueError(f"`resume_from_checkpoint`={str(folder)!r} {problem}: {remedy}.")


def publish(staged: Path, folder: Path) -> None:
    """List the files of `staged`, flush them to the disk, and give it the name `folder`."""
    files = sorted(path for path in staged.rglob("*") if path.is_file())
    sizes = {path.relative_to(staged).as_posix(): path.stat().st_size for path in files}
    (staged / FILE_LIST).write_text(json.dumps(sizes, indent=2) + "\n")
    for path in [*staged.rglob("*"), staged]:
        _flush(path)
    if folder.exists():  # of another run; nothing can be renamed onto it
        _set_aside(folder)
    staged.rename(folder)
    _flush(folder.parent)


def remove_oldest(newest: Path, limit: int | None, best: str | None) -> None:
    """Keep `limit` of the whole checkpoints beside `newest` (`None`: all), at least that one and the `best`."""
    if not limit:
        return
    folders = [Path(folder) for folder in sort_checkpoints(str(newest.parent), use_mtime=True)]
    whole = [folder for folder in folders if not missing_files(folder)]
    removable = [folder for folder in whole if folder.name not in (newest.name, Path(best or newest).name)]
    for folder in removable[: max(0, len(whole) - limit)]:
        shutil.rmtree(_set_aside(folder).parent, ignore_errors=True)


def _set_aside(folder: Path) -> Path:
    """Rename, so that a kill during the removal leaves no part of it under its name."""
    aside = folder.parent / STAGING_FOLDER / f"old-{folder.name}"
    aside.parent.mkdir(exist_ok=True)
    return folder.rename(aside)


def _flush(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)  # copied code may be read-only
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError:
        if not path.is_dir():  # not every system can flush a folder
            raise


class AtomicCheckpointTrainer(Trainer):
    """A `Trainer` whose checkpoints are whole or not there, and which goes on from whole ones only, bit for bit."""

    last_saved: tuple[int, Path] | None = None  # step and folder of the checkpoint last written or resumed from
    _staging = False
    _random = (None, ())  # a step, and the states of the random numbers at its end

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As in `Trainer`.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): A whole checkpoint; `True`: the last in `output_dir`
                that is whole. `None`: begin anew.
            args, kwargs: Passed to `Trainer.train`.

        Raises:
            `ValueError`: if the checkpoint is incomplete.
            `OSError`: when a checkpoint cannot be written, say to a full disk. Those written before are left intact.
        """
        folder = checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir)
        return super().train(folder, *args, **kwargs)

    # --- going on -----------------------------------------------------------------------------------------------

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ):
        position = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if self.args.should_save:  # what an interrupted run left
            shutil.rmtree(Path(self._get_output_dir(trial)) / STAGING_FOLDER, ignore_errors=True)
        self.last_saved = None
        if resume_from_checkpoint is None:
            return position
        self.last_saved = (self.state.global_step, Path(resume_from_checkpoint).resolve())
        if num_train_epochs != sys.maxsize or self.args.ignore_data_skip:
            return position
        # `Trainer` takes all steps of a stream for one epoch, also where the stream has ended and begun again.
        saved = TrainerState.load_from_json(os.path.join(resume_from_checkpoint, TRAINER_STATE_NAME))
        return stream_position(saved.epoch, saved.max_steps * self.args.gradient_accumulation_steps)

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:  # resumed from the last step: `Trainer` would add one
            self.control.should_training_stop = True
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    # --- saving -------------------------------------------------------------------------------------------------

    def save_beside(self, folder: Path) -> None:
        """Write into a checkpoint what a subclass needs to go on, beside what `Trainer` does. All ranks call it."""

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        self._random = (self.state.global_step, get_random_states())
        # A log line holds means since the last one. A resumed run's begin at its checkpoint; so shall everyone's.
        saves = self.control.should_save or (
            self.control.should_evaluate and self.args.save_strategy == SaveStrategy.BEST
        )
        self.control.should_log |= saves and self.args.logging_strategy != IntervalStrategy.NO
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _save_checkpoint(self, model, trial):
        run_dir, step = Path(self._get_output_dir(trial)), self.state.global_step
        folder = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        if self.last_saved == (step, folder.resolve()):
            return
        staged = run_dir / STAGING_FOLDER / folder.name
        try:
            self._write_staged(model, trial, staged, folder)
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk in Python, torch and safetensors
            raise OSError(_describe_failure(folder, error)) from error
        finally:
            if self.args.should_save:
                shutil.rmtree(staged.parent, ignore_errors=True)
        if self.args.should_save:
            remove_oldest(folder, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()  # it has its name
        self.last_saved = (step, folder.resolve())
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))

    def _write_staged(self, model, trial, staged: Path, folder: Path) -> None:
        self._staging = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = False
        if self.state.best_model_checkpoint is not None and Path(self.state.best_model_checkpoint) == staged:
            self.state.best_model_checkpoint = str(folder)
        self.save_beside(staged)
        self.accelerator.wait_for_everyone()  # all ranks have written
        if self.args.should_save:
            self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
            publish(staged, folder)

    def _save_rng_state(self, output_dir):
        step, states = self._random
        now = get_random_states()
        if step == self.state.global_step:  # the next step may have begun: a stop or a signal saves in its middle
            set_random_states(states)
        super()._save_rng_state(output_dir)
        set_random_states(now)

    def _get_output_dir(self, trial):
        run_dir = super()._get_output_dir(trial)
        return os.path.join(run_dir, STAGING_FOLDER) if self._staging else run_dir

    def _push_from_checkpoint(self, checkpoint_folder):
        if not self._staging:  # uploads run in the background: the folder must keep its name
            super()._push_from_checkpoint(checkpoint_folder)


def get_random_states() -> tuple:
    """Of Python's, NumPy's and PyTorch's global generators, and of this process's GPU."""
    gpu = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), gpu


def set_random_states(states: tuple) -> None:
    """Set what [`get_random_states`] gave."""
    python, numpy, cpu, gpu = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if gpu is not None:
        torch.cuda.set_rng_state(gpu)


def stream_position(epoch: float, batches_per_epoch: int) -> tuple[int, int]:
    """Full passes over a stream, and batches of the pass after them, from the number of epochs that `Trainer` records.

    >>> stream_position(2.25, batches_per_epoch=8), stream_position(1.0, batches_per_epoch=8)
    ((2, 2), (0, 8))
    """
    passes = max(0, math.ceil(epoch) - 1)
    return passes, round((epoch - passes) * batches_per_epoch)


def _describe_failure(folder: Path, error: Exception) -> str:
    last, free = _last_whole(folder.parent), shutil.disk_usage(folder.parent).free
    intact = f"The last whole checkpoint, {last}, is intact" if last else "There is no earlier checkpoint"
    return (
        f"{folder} could not be written: {error} ({free / 1e6:,.1f} MB are free on that disk). {intact}; nothing is "
        "left of this one. Make room there (`save_total_limit` keeps fewer checkpoints), then resume."
    )
