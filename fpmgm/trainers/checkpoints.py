# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that survive a kill and a full disk.

A checkpoint is written into the folder `_saving`. When all ranks have written, a list of its files with their sizes is
added, everything is flushed to the disk, and one rename gives it its name, `checkpoint-N`. Only then are older ones
removed. A folder is whole if it has the list and every file in it, and each can be read.
"""

import errno
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints
from transformers.utils import logging


logger = logging.get_logger(__name__)

MOST_JSON = 1 << 30  # bytes: a longer file is none that training wrote
MOST_LISTED = 1 << 24
NO_SPACE = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))  # Windows has no quota
PLENTY = 100 << 20  # bytes free at which a disk is not taken to be full
STAGING_FOLDER = "_saving"  # pushes to the hub leave out what begins with an underscore
FILE_LIST = "checkpoint_files.json"


def checkpoint_step(folder: str | Path) -> int:
    """The optimizer step that a checkpoint was written after, from its name.

    >>> checkpoint_step("outputs/checkpoint-7")
    7
    """
    return int(Path(folder).name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-"))


def missing_files(folder: str | Path) -> list[str]:
    """What `folder` lacks of a whole checkpoint, in words; nothing if it is whole.

    >>> missing_files("outputs/checkpoint-7")
    ['checkpoint_files.json, which is written last']
    """
    folder = Path(folder)
    if not (folder / FILE_LIST).is_file():
        return [f"{FILE_LIST}, which is written last"]
    try:
        sizes = read_json(folder / FILE_LIST, "the size in bytes of each file", most_bytes=MOST_LISTED)
    except ValueError as error:  # cut off by a copy that was interrupted, or another file
        return [str(error)]
    if TRAINER_STATE_NAME not in sizes or not all(_is_entry(name, size) for name, size in sizes.items()):
        return [f"a {FILE_LIST} that gives the size in bytes of each file, {TRAINER_STATE_NAME} among them"]
    return [text for name, size in sizes.items() if (text := _lack(folder / name, name, size))]


def _is_entry(name: str, size: int) -> bool:
    path = PurePosixPath(name)
    return type(size) is int and size >= 0 and "\0" not in name and not path.is_absolute() and ".." not in path.parts


def _lack(path: Path, name: str, size: int) -> str | None:
    if not path.is_file():
        return name
    there = path.stat().st_size
    return f"all but {there:,} of the {size:,} bytes of {name}" if there < size else None


def damaged_files(folder: str | Path) -> list[str]:
    """Which files of a checkpoint that has them all cannot be read, in words, from their structure alone: tensors
    are not looked at."""
    return [text for path in sorted(Path(folder).rglob("*")) if path.is_file() and (text := _damage(path))]


def _damage(path: Path) -> str | None:
    try:
        if path.name == TRAINER_STATE_NAME:
            read_state(path)
        elif path.suffix == ".json":
            read_json(path, "a JSON object", kind=object)
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):  # compares the header with the size
                pass
        elif path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path):
            return f"{path.name} is not a file of `torch.save`"
    except SafetensorError as error:
        return f"{path.name} is not a file of tensors ({error})"
    except ValueError as error:
        return str(error)
    return None


def read_json(path: Path, expected: str, *, kind: type = dict, most_bytes: int = MOST_JSON) -> Any:
    """What a JSON file holds.

    Args:
        path (`Path`): The file.
        expected (`str`): What it should hold, in words.
        kind (`type`, defaults to `dict`): Which type that is.
        most_bytes (`int`): A larger file is not read.

    Raises:
        `ValueError`: if the file is another, naming it and what was expected.
    """
    try:
        if path.stat().st_size > most_bytes:
            raise ValueError(f"more than {most_bytes:,} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, kind):
            raise ValueError(f"a {type(value).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is not JSON with {expected} ({error})") from error
    return value


def read_state(path: Path) -> TrainerState:
    """The `TrainerState` of a checkpoint.

    Raises:
        `ValueError`: if the file is another, naming it.
    """
    values = read_json(path, "the state of a training")
    known = {f.name for f in fields(TrainerState)}
    types = {"global_step": int, "max_steps": int, "epoch": int | float, "log_history": list}
    wrong = [name for name in values if name not in known]
    wrong += [name for name, kind in types.items() if not isinstance(values.get(name), kind)]
    if not wrong and not all(isinstance(line, dict) and "step" in line for line in values["log_history"]):
        wrong.append("log_history")
    if wrong:
        raise ValueError(f"{path.name} is not JSON with the state of a training (see {wrong})")
    return TrainerState(**values)


def flaw(folder: str | Path) -> str | None:
    """Why `folder` is no whole checkpoint, as the end of a sentence; `None` if it is one."""
    if not Path(folder).is_dir():
        return "does not exist"
    if missing := missing_files(folder):
        return f"is incomplete: it lacks {', '.join(missing)}"
    if damaged := damaged_files(folder):
        return f"is damaged: {', '.join(damaged)}"
    return None


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The whole checkpoint of the latest step in `output_dir`; a warning names each later one that is not whole.

    Args:
        output_dir (`str` or `Path`): Folder of a run; it need not exist.

    Returns:
        `str`, *optional*: Its folder. `None`: there is none.

    Examples:
        >>> last_checkpoint("outputs/none") is None
        True
    """
    last, flaws = _last_whole(output_dir)
    for folder in _by_step(Path(output_dir) / STAGING_FOLDER):
        logger.warning(f"The writing of {folder.name} was interrupted; the last whole checkpoint is {last}.")
    for folder, text in flaws.items():
        logger.warning(f"{folder} {text}. The last whole one is {last}; remove this one to silence this warning.")
    return None if last is None else str(last)


def _by_step(output_dir: str | Path) -> list[Path]:
    """Folders with the name of a checkpoint, the latest step first."""
    folders = [path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()]
    steps = {path: path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-") for path in folders}
    return sorted((path for path in folders if steps[path].isdecimal()), key=lambda path: -int(steps[path]))


def _last_whole(output_dir: str | Path) -> tuple[Path | None, dict[Path, str]]:
    """The last whole checkpoint, and what the later ones suffer from."""
    flaws = {}
    for folder in _by_step(output_dir):
        text = flaw(folder)
        if text is None:
            return folder, flaws
        flaws[folder] = text
    return None, flaws


def has_checkpoints(output_dir: str | Path) -> bool:
    """Whether `output_dir` holds a checkpoint, whole or not."""
    return bool(_by_step(output_dir))


def checkpoint_to_resume(resume_from_checkpoint: str | Path | bool | None, output_dir: str | Path) -> str | None:
    """The whole checkpoint that `resume_from_checkpoint` means: a folder's own, or with `True` the last.

    Raises:
        `ValueError`: if there is no such folder or it is not whole, saying why and which one is whole.
    """
    if not resume_from_checkpoint:
        return None
    if resume_from_checkpoint is True:
        last = last_checkpoint(output_dir)
        if last is None:
            flaws = [f"{folder.name} {text}; " for folder, text in _last_whole(output_dir)[1].items()]
            raise ValueError(
                f"`resume_from_checkpoint`=True, but no whole checkpoint is in {output_dir}: {''.join(flaws)}"
                f"begin anew{', in another folder or when these are removed' if flaws else ''}."
            )
        return last
    folder = Path(resume_from_checkpoint)
    problem = flaw(folder)
    if problem is None:
        return str(folder)
    last, _ = _last_whole(folder.parent)
    remedy = f"resume from {last}, the last whole one there" if last else f"{folder.parent} holds no whole one"
    raise ValueError(f"`resume_from_checkpoint`={str(folder)!r} {problem}: {remedy}.")


@contextmanager
def reading(folder: str | Path, what: str) -> Iterator[None]:
    """Turn whatever a damaged file makes libraries raise inside the block into a `ValueError` that names the
    checkpoint, `what` was to be read of it, and a checkpoint to resume from instead."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        others = [other for other in _by_step(Path(folder).parent) if other != Path(folder) and flaw(other) is None]
        remedy = f"resume from {others[0]}" if others else "there is no other whole checkpoint: begin anew"
        raise ValueError(f"{folder} is damaged: {what} cannot be read of it ({error}); {remedy}.") from error


def publish(staged: Path, folder: Path) -> None:
    """List the files of `staged`, flush them to the disk, and give it the name `folder`."""
    files = sorted(path for path in staged.rglob("*") if path.is_file())
    sizes = {path.relative_to(staged).as_posix(): path.stat().st_size for path in files}
    (staged / FILE_LIST).write_text(json.dumps(sizes, indent=2) + "\n", encoding="utf-8")
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


def describe_failure(folder: Path, error: Exception) -> str:
    """Why the checkpoint `folder` could not be written, what is left, and what to do."""
    (last, _), free = _last_whole(folder.parent), shutil.disk_usage(folder.parent).free
    intact = f"The last whole checkpoint, {last}, is intact" if last else "There is no earlier checkpoint"
    full = getattr(error, "errno", None) in NO_SPACE or "No space left" in str(error) or free < PLENTY
    remedy = (
        "Make room there (`save_total_limit` keeps fewer checkpoints), then resume"
        if full
        else "Mend what the error names (a limit on the size of files or of your share of the disk may be behind it; "
        "or something else writes to or removes this folder), then resume"
    )
    return (
        f"{folder} could not be written: {error} ({free / 1e6:,.1f} MB are free on that disk). {intact}; nothing is "
        f"left of this one. {remedy}."
    )
