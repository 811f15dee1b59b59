# SPDX-License-Identifier: Apache-2.0
"""A results file names the commit that it was made with, and says where the code differed from it."""

import subprocess
import sys

from fpmgm.evaluation import provenance
from fpmgm.evaluation.provenance import commit


def test_the_commit_is_that_of_the_checkout_and_changes_show(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["fpmgm.evaluation.provenance"], "CHECKOUT", tmp_path)
    assert provenance()["commit"] is None  # installed

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(
            ["git", "-C", tmp_path, *identity, *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    git("init", "-q")
    assert commit() is None  # nothing is committed
    (tmp_path / "fpmgm").mkdir()
    (tmp_path / "fpmgm/model.py").write_text("a = 1\n")
    git("add", "-A")
    git("commit", "-qm", "first")
    (tmp_path / "notes.txt").write_text("not part of the package")
    assert provenance()["commit"] == git("rev-parse", "--short", "HEAD")
    (tmp_path / "fpmgm/model.py").write_text("a = 2\n")
    assert provenance()["commit"] == git("rev-parse", "--short", "HEAD") + "+"
