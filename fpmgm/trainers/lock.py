# SPDX-License-Identifier: Apache-2.0
"""One run at a time in a folder.

The lock is the operating system's (`flock`), on the file `_lock`, which says who holds it. It ends with the process,
however that ends: a file that a killed one has left is free. Where the file system keeps no locks, or keeps them from
other hosts (some network file systems), a warning says so.
"""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import logging


try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None

logger = logging.get_logger(__name__)

LOCK_FILE = "_lock"  # pushes to the hub leave out what begins with an underscore
_held: dict[Path, int] = {}  # descriptors of this process: who prepares a folder may train in it too


@contextmanager
def hold_folder(folder: str | Path, take: bool = True) -> Iterator[None]:
    """Keep other processes that hold `folder` out of it inside the block; a block within it in the same process holds
    it as well.

    Args:
        folder (`str` or `Path`): It is made where it does not exist.
        take (`bool`, defaults to `True`): `False`: do nothing, for all processes of a run but the one that writes.

    Raises:
        `ValueError`: if another process holds it, saying which.
    """
    path = Path(folder).resolve() / LOCK_FILE
    if not take or fcntl is None or path in _held:
        yield
        return
    descriptor = _take(path)
    _held[path] = descriptor
    try:
        yield
    finally:
        if _held.pop(path, None) is not None:  # else this is a forked process
            path.unlink(missing_ok=True)
            os.close(descriptor)


def _take(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _read(descriptor)
            os.close(descriptor)
            raise ValueError(
                f"`output_dir`={str(path.parent)!r} is in use by another run: {holder or 'an unnamed process'}. Wait "
                "for its end, stop it, or give another `output_dir`."
            ) from None
        except OSError as error:  # no locks on this file system
            logger.warning(
                f"{path.parent} cannot be locked ({error}): take care that no other run writes there, or use a local "
                "`output_dir` to silence this warning."
            )
        if _is_at(descriptor, path):  # else its last holder has just removed it
            _write(descriptor, path)
            return descriptor
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _read(descriptor: int) -> str:
    """Who holds the lock, in words."""
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # not yet written
        return ""


def _write(descriptor: int, path: Path) -> None:
    former, host = _read(descriptor), socket.gethostname()
    if former and f"on {host}," not in former:
        logger.warning(
            f"{path} was left by {former}. Whether that one has ended cannot be told from here: if it runs, stop it."
        )
    holder = {"host": host, "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(holder).encode() + b"\n", 0)


def _let_go_in_a_fork() -> None:
    """A worker that outlives a killed run must not hold its lock."""
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_a_fork)
