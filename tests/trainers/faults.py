# SPDX-License-Identifier: Apache-2.0
"""Training that is cut off while it writes, in processes of its own, for `test_checkpoints.py`.

python -m tests.trainers.faults at-each-write FOLDER
python -m torch.distributed.run --nproc_per_node 2 --module tests.trainers.faults on-one-rank FOLDER
"""

import errno
import itertools
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
import transformers.modeling_utils
from transformers.trainer_callback import TrainerState

from fpmgm.trainers import ema, last_checkpoint

from .training_utils import make_trainer, token_rows, training_model


# What writes while a checkpoint is saved; the last two rename and remove folders.
FILE_WRITERS = [(transformers.modeling_utils, "safe_save_file"), (ema, "save_file"), (torch, "save")]
FILE_WRITERS += [(TrainerState, "save_to_json"), (Path, "write_text")]
WRITERS = [*FILE_WRITERS, (Path, "rename")]
WRITERS_AND_REMOVERS = [*WRITERS, (shutil, "rmtree")]


@contextmanager
def cut_off(number: int, action: Callable, writers: list[tuple]) -> Iterator[None]:
    """The `number`-th call of `writers` does half its work and ends with `action()`; all others are as always."""
    calls = itertools.count(1)

    def faulty(write):
        def call(*args, **kwargs):
            paths = [Path(x) for x in args if isinstance(x, str | Path)]
            idle = write is shutil_rmtree and not paths[0].is_dir()
            if idle or next(calls) != number:
                return write(*args, **kwargs)
            do_half(write, paths, *args, **kwargs)
            return action()

        return call

    shutil_rmtree = shutil.rmtree
    patches = [patch.object(owner, name, faulty(getattr(owner, name))) for owner, name in writers]
    for one in patches:
        one.start()
    try:
        yield
    finally:
        for one in patches:
            one.stop()


def do_half(write: Callable, paths: list[Path], *args, **kwargs) -> None:
    """Write half a file, or remove one file of a folder, or leave a name as it is."""
    if write.__name__ == "rename":
        return
    if write.__name__ == "rmtree":
        for path in sorted(path for path in paths[0].rglob("*") if path.is_file())[:1]:
            path.unlink()
        return
    write(*args, **kwargs)
    path = next(path for path in paths if path.is_file())
    os.truncate(path, path.stat().st_size // 2)


def train(folder: Path, **arguments) -> None:
    """Go on in `folder` from the last whole checkpoint; each pass over the data takes five steps."""
    trainer = make_trainer(
        folder, training_model(dropout=0.1), train_dataset=token_rows(20), save_strategy="steps", **arguments
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def no_space() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def start(function: Callable, *args, **kwargs) -> int:
    """Run `function` in a process of its own."""
    pid = os.fork()
    if pid == 0:
        try:
            function(*args, **kwargs)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return pid


def is_running(pid: int) -> bool:
    """Whether it has not ended yet; `finish` may still ask for its exit code."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def finish(pid: int) -> int:
    """Its exit code, negative for a signal."""
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL), code
    return code


def newest(folder: Path) -> int:
    """The step of its newest checkpoint, 0 without one."""
    return max((int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*")), default=0)


def state_of(folder: Path) -> dict:
    """What a kill left."""
    names = [path.relative_to(folder).as_posix() for path in [*folder.glob("*"), *folder.glob("_*/*")]]
    return {"names": sorted(names), "last": last_checkpoint(folder)}


def killed_at_each_write(folder: Path) -> list[dict]:
    """Killed once at each write of a checkpoint; each time the run goes on from what the last kill left."""
    arguments = {"save_steps": 2, "save_total_limit": 1}

    def killed(number):
        with cut_off(number, kill, WRITERS_AND_REMOVERS):
            train(folder / "killed", max_steps=16, **arguments)

    finish(start(train, folder / "straight", max_steps=16, **arguments))
    finish(start(train, folder / "killed", max_steps=2, **arguments))
    left = []
    for number in itertools.count(1):
        if finish(start(killed, number)) == 0:
            return left
        left.append(state_of(folder / "killed"))


def failed_on_one_rank(folder: Path) -> None:
    """The second rank cannot write the second checkpoint; started again, it can."""
    arguments = {"save_steps": 2, "save_total_limit": 1, "ddp_backend": "gloo"}
    again = (folder / "failed").is_dir()
    if not again:
        train(folder / "straight", max_steps=4, **arguments)
        train(folder / "failed", max_steps=2, **arguments)
    failing = os.environ["RANK"] == "1" and not again
    with cut_off(1, no_space, FILE_WRITERS if failing else []):
        train(folder / "failed", max_steps=4, **arguments)
    torch.distributed.destroy_process_group()


def main() -> None:
    way, folder = sys.argv[1], Path(sys.argv[2])
    if way == "on-one-rank":
        failed_on_one_rank(folder)
    else:
        (folder / "left.json").write_text(json.dumps(killed_at_each_write(folder)))


if __name__ == "__main__":
    main()
