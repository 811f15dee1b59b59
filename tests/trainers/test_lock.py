# SPDX-License-Identifier: Apache-2.0
"""One run at a time in a folder: who holds it is said, and however it ends the folder is free again."""

import errno
import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from fpmgm.trainers import lock
from fpmgm.trainers.lock import LOCK_FILE, hold_folder

from . import faults


def hold(folder: Path, how: str) -> None:
    """Hold `folder` in a process of its own until a signal, with a child that outlives it for `"fork"`."""
    with hold_folder(folder):
        if how == "fork" and os.fork() == 0:
            (folder / "child").write_text(str(os.getpid()))
            time.sleep(60)
            os._exit(0)
        (folder / "ready").touch()
        time.sleep(60)


def holder_of(folder: Path, how: str) -> int:
    pid = faults.start(hold, folder, how)
    while not (folder / "ready").exists():
        time.sleep(0.01)
    return pid


@pytest.mark.parametrize(("how", "number"), [("fork", signal.SIGKILL), ("alone", signal.SIGTERM)])
def test_a_second_process_is_told_who_holds_the_folder_and_gets_it_when_that_one_is_killed(tmp_path, how, number):
    pid = holder_of(tmp_path, how)
    words = rf"`output_dir`='{tmp_path}' is in use by another run: process {pid} on {socket.gethostname()}, since 2"
    with pytest.raises(ValueError, match=words), hold_folder(tmp_path):
        pass
    os.kill(pid, number)
    os.waitpid(pid, 0)
    with hold_folder(tmp_path):  # though the file is left, and a child of the killed one may live
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert not (tmp_path / LOCK_FILE).exists()
    if how == "fork":
        os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)


def test_the_folder_is_free_after_an_exception_and_held_through_blocks_within(tmp_path):
    with pytest.raises(KeyboardInterrupt), hold_folder(tmp_path / "new"):
        with hold_folder(tmp_path / "new"):
            pass
        assert (tmp_path / "new" / LOCK_FILE).exists()
        raise KeyboardInterrupt
    assert list((tmp_path / "new").iterdir()) == []
    with hold_folder(tmp_path / "other", take=False):
        assert not (tmp_path / "other").exists()


def test_what_a_lock_cannot_tell_is_said(tmp_path, monkeypatch, caplog):
    (tmp_path / LOCK_FILE).write_text(json.dumps({"host": "elsewhere", "pid": 7, "since": "yesterday"}))
    with hold_folder(tmp_path):
        pass
    assert "was left by process 7 on elsewhere, since yesterday. Whether that one has ended" in caplog.text
    caplog.clear()

    def no_locks(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lock.fcntl, "flock", no_locks)
    with hold_folder(tmp_path):
        pass
    assert f"{tmp_path} cannot be locked" in caplog.text and "use a local `output_dir`" in caplog.text
