# SPDX-License-Identifier: Apache-2.0
"""A run in two processes against the same run in one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fpmgm.trainers import last_checkpoint

from . import distributed_script


RANKS = 2


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The run in one process, and what each of two ranks wrote."""
    folder = tmp_path_factory.mktemp("distributed")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS)),
        *("--module", distributed_script.__name__, str(folder)),
    ]
    done = subprocess.run(
        command,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    several = []
    for rank in range(RANKS):
        result = json.loads((folder / f"result-{rank}.json").read_text())
        tensors = {name: load_file(folder / f"{name}-{rank}.safetensors") for name in ("weights", "average")}
        several.append({**result, **tensors})
    return distributed_script.train(folder / "single", ranks=1), several, folder


def test_two_ranks_reach_the_weights_of_one_process(runs):
    single, several, _ = runs
    for name in ("weights", "average"):
        for rank in several:
            assert rank[name].keys() == single[name].keys()
            for key, tensor in single[name].items():
                torch.testing.assert_close(rank[name][key], tensor, atol=1e-6, rtol=0, msg=f"{name} {key}")
        assert all(torch.equal(several[0][name][key], several[1][name][key]) for key in single[name])


def test_two_ranks_share_times_and_iterations_of_the_global_batch(runs):
    single, several, _ = runs
    # the rows of a step lie in the order of the data: micro-batch, then rank
    interleaved = [times for pair in zip(*(rank["times"] for rank in several), strict=True) for times in pair]
    assert interleaved == single["times"]
    assert several[0]["iterations"] == several[1]["iterations"] == single["iterations"][::RANKS]


@pytest.mark.parametrize("rows", distributed_script.EVALUATION_SETS)
def test_two_ranks_evaluate_what_one_process_does(runs, rows):
    single, several, _ = runs
    for rank in several:
        assert rank["evaluations"][rows] == pytest.approx(single["evaluations"][rows], rel=1e-5)


def test_two_ranks_log_what_one_process_does(runs):
    single, several, _ = runs
    assert len(several[0]["logs"]) == distributed_script.STEPS
    for line, expected in zip(several[0]["logs"], single["logs"], strict=True):
        names = ("loss", "grad_norm", "masked_accuracy", "residual", "iterations", "state_norm")
        assert {name: line[name] for name in names} == pytest.approx(
            {name: expected[name] for name in names}, rel=1e-4
        )


@pytest.mark.parametrize("name", distributed_script.POST_TRAINING)
def test_two_ranks_learn_from_a_teacher_what_one_process_does(runs, name):
    _, several, folder = runs
    single = distributed_script.post_train(folder / f"single-{name}", 1, name)
    for number, rank in enumerate(several):
        found = load_file(folder / f"{name}-{number}.safetensors")
        assert found.keys() == single["weights"].keys()
        for key, tensor in single["weights"].items():
            torch.testing.assert_close(found[key], tensor, atol=1e-6, rtol=0, msg=f"{name} {key}")
        assert rank[name] == pytest.approx(single["distances"], rel=1e-4)
    assert len(single["distances"]) == 3 and all(distance > 1e-4 for distance in single["distances"])


def test_all_ranks_stop_where_the_loss_of_one_is_not_finite(runs):
    _, several, folder = runs
    for rank in several:
        assert "step 2" in rank["failure"]
        assert "checkpoint-1" in rank["failure"]
    saved = load_file(folder / "failure/checkpoint-1/model.safetensors")
    assert all(tensor.isfinite().all() for tensor in saved.values())
    assert last_checkpoint(folder / "failure") == str(folder / "failure/checkpoint-1")
    assert {path.name for path in (folder / "failure/checkpoint-1").glob("rng*")} == {
        "rng_state_0.pth",
        "rng_state_1.pth",
    }
