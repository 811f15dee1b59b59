# SPDX-License-Identifier: Apache-2.0
"""Runs in two processes, under every engine that has a configuration in `recipes/accelerate`, against one process."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from fpmgm.trainers import last_checkpoint
from fpmgm.trainers.ema import EMA_FILE

from ..testing_utils import ROOT, run_python
from . import distributed_script
from .distributed_script import STEPS


RANKS = 2
SPLIT = {  # what a rank holds a half of
    "ddp": set(),
    "zero1": {"optimizer"},
    "zero2": {"optimizer"},
    "zero3": {"optimizer", "weights", "average"},
    "fsdp2": {"optimizer", "weights", "average"},
}
ENGINES = [name if name == "ddp" else pytest.param(name, marks=pytest.mark.distributed) for name in SPLIT]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The runs in one process, and their folder."""
    folder = tmp_path_factory.mktemp("single")
    return SimpleNamespace(
        folder=folder,
        plain=distributed_script.plain(folder / "plain", ranks=1),
        adam=distributed_script.adam(folder / "adam", ranks=1),
    )


@pytest.fixture(scope="module", params=ENGINES)
def runs(request, tmp_path_factory):
    """What each of two ranks reports, and the folder they wrote to."""
    folder = tmp_path_factory.mktemp(request.param)
    launch = ["-m", "accelerate.commands.launch", "--num_processes", str(RANKS), "--main_process_port", "0"]
    launch += ["--config_file", str(ROOT / f"recipes/accelerate/{request.param}.yaml")]
    run_python(*launch, "--module", distributed_script.__name__, str(folder), PYTHONFAULTHANDLER="1")
    ranks = [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(RANKS)]
    return SimpleNamespace(engine=request.param, folder=folder, ranks=ranks)


def assert_same_file(actual: Path, expected: Path, tolerance: float) -> None:
    actual, expected = load_file(actual), load_file(expected)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, atol=tolerance, rtol=0, msg=f"{name} differs")


def test_two_ranks_reach_the_weights_of_one_process(single, runs):
    for file in (
        f"checkpoint-{STEPS}/model.safetensors",
        f"checkpoint-{STEPS}/{EMA_FILE}",
        "exported/model.safetensors",
    ):
        assert_same_file(runs.folder / "plain" / file, single.folder / "plain" / file, tolerance=1e-6)


def test_two_ranks_share_times_and_iterations_of_the_global_batch(single, runs):
    first, second = (rank["plain"] for rank in runs.ranks)
    # the rows of a step lie in the order of the data: micro-batch, then rank
    interleaved = [times for pair in zip(first["times"], second["times"], strict=True) for times in pair]
    assert interleaved == single.plain["times"]
    assert first["iterations"] == second["iterations"] == single.plain["iterations"][::RANKS]


def test_two_ranks_evaluate_what_one_process_does(single, runs):
    for rank in runs.ranks:
        assert rank["plain"]["evaluations"] == pytest.approx(single.plain["evaluations"], rel=1e-5)
        assert rank["adam"]["evaluations"] == pytest.approx(single.adam["evaluations"], rel=1e-5)  # between steps


@pytest.mark.parametrize("run", ["plain", "adam"])
def test_two_ranks_log_what_one_process_does(single, runs, run):
    names = ("loss", "grad_norm", "masked_accuracy", "residual", "iterations", "state_norm")
    actual, expected = runs.ranks[0][run]["logs"], getattr(single, run)["logs"]
    assert len(actual) == STEPS
    for line, reference in zip(actual, expected, strict=True):
        assert [line[name] for name in names] == pytest.approx([reference[name] for name in names], rel=1e-4)


@pytest.mark.parametrize("name", distributed_script.POST_TRAINING)
def test_two_ranks_learn_from_a_teacher_what_one_process_does(runs, name):
    if runs.engine != "ddp":
        pytest.skip("run under DDP")
    single = distributed_script.post_train(runs.folder / f"single-{name}", 1, name)
    for number, rank in enumerate(runs.ranks):
        found = load_file(runs.folder / f"{name}-{number}.safetensors")
        assert found.keys() == single["weights"].keys()
        for key, tensor in single["weights"].items():
            torch.testing.assert_close(found[key], tensor, atol=1e-6, rtol=0, msg=f"{name} {key}")
        assert rank[name] == pytest.approx(single["distances"], rel=1e-4)
    assert len(single["distances"]) == 3 and all(distance > 1e-4 for distance in single["distances"])


def test_a_resumed_run_of_two_ranks_equals_the_uninterrupted_one(runs):
    for file in ("model.safetensors", EMA_FILE):
        parts = [runs.folder / run / f"checkpoint-{STEPS}" / file for run in ("resumed", "adam")]
        assert_same_file(*parts, tolerance=0)
    assert runs.ranks[0]["resumed"]["logs"][2]["loss"] == runs.ranks[0]["adam"]["logs"][2]["loss"]


def test_bfloat16_stays_near_float32(single, runs):
    actual, expected = ([line["loss"] for line in run["logs"]] for run in (runs.ranks[0]["bf16"], single.adam))
    assert actual == pytest.approx(expected, rel=5e-3)
    assert actual != pytest.approx(expected, rel=1e-6)


def test_each_rank_holds_a_half_of_what_its_engine_splits(runs):
    for rank in runs.ranks:
        expected = {name: 1 / RANKS if name in SPLIT[runs.engine] else 1 for name in rank["adam"]["held"]}
        assert rank["adam"]["held"] == pytest.approx(expected, rel=0.05)  # padding


def test_all_ranks_stop_before_a_step_whose_loss_is_not_finite_on_one(single, runs):
    for rank in runs.ranks:
        assert "step 2" in rank["failure"]
        assert "checkpoint-1" in rank["failure"]
    for file in ("model.safetensors", EMA_FILE):
        saved = runs.folder / "failure/checkpoint-1" / file
        assert_same_file(saved, single.folder / "plain/checkpoint-1" / file, tolerance=1e-6)
    folder = runs.folder / "failure"
    assert last_checkpoint(folder) == str(folder / "checkpoint-1")
    assert {path.name for path in (folder / "checkpoint-1").glob("rng*")} == {"rng_state_0.pth", "rng_state_1.pth"}
