# SPDX-License-Identifier: Apache-2.0
"""Every trainer, killed again and again, half of the times while it writes; and two runs in one folder.

`FPMGM_KILLS=56 FPMGM_PAIRS=10 pytest -m slow tests/trainers/test_kills.py` kills more often than by default.
"""

import json
import os

import pytest

from ..testing_utils import run_python
from . import kills


KILLS, PAIRS = int(os.environ.get("FPMGM_KILLS", 14)), int(os.environ.get("FPMGM_PAIRS", 2))


def seen(folder, *command: str):
    run_python("-m", kills.__name__, *command, str(folder))
    return json.loads((folder / "done.json").read_text())


@pytest.mark.slow
def test_a_run_that_is_killed_is_the_uninterrupted_one_in_weights_and_history(tmp_path):
    number = -(-KILLS // len(kills.TRAINERS))
    done = seen(tmp_path, "killed", str(number))
    assert done.keys() == kills.TRAINERS.keys()
    for trainer, run in done.items():
        assert (run["kills"], run["differences"]) == (number, []) and run["lines"] > 4, trainer
    assert sum(run["torn"] for run in done.values()) >= KILLS // 4  # a checkpoint was being written


@pytest.mark.slow
def test_of_two_runs_in_one_folder_one_goes_on_and_the_other_says_who_holds_it(tmp_path):
    for pair in seen(tmp_path, "pairs", str(PAIRS)):
        assert sorted(pair["codes"]) == [0, 1]
        holder = pair["pids"][pair["codes"].index(0)]
        (refused,) = pair["refused"]
        assert f"in use by another run: process {holder} on" in refused
        assert pair["differences"] == [] and pair["names"] == ["checkpoint-10", "checkpoint-8"]
