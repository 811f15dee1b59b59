# SPDX-License-Identifier: Apache-2.0
"""The study in a tiny world: from the world to the tables, and on from wherever it was cut."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM

import budget_report
import sample_world
import train_judge
from fpmgm import FPMDLMConfig, FPMDLMForMaskedDiffusion
from fpmgm.evaluation import load_judge
from study import release, run, train
from study.plan import load_plan
from study.tables import setting_name
from tests.testing_utils import refused, word_tokenizer


SIZED = {"name": "a", "training": {"per_device_train_batch_size": 4}}
TINY = Path(run.__file__).parent / "tiny.yaml"
WORDS = ["<s>", *(f"t{i}" for i in range(1, 12))]


@pytest.fixture(scope="module")
def truth(tmp_path_factory) -> str:
    """A causal language model of 12 words."""
    folder = str(tmp_path_factory.mktemp("truth"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=12, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, bos_token_id=0, eos_token_id=None, initializer_range=0.5,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    word_tokenizer(WORDS, bos_token="<s>").save_pretrained(folder)
    return folder


def world(folder: Path, truth: str, *more: str) -> dict[str, torch.Tensor]:
    """Sample a world of 10 texts in files of 4; all texts of the folder."""
    options = ["--truth", truth, "--length", "6", "--texts_per_shard", "4", "--output_dir", str(folder)]
    sample_world.main([*options, *(more or ("--num_texts", "10"))])
    shards = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return {name: torch.cat([shard[name] for shard in shards]) for name in ("input_ids", "surprise")}


def test_a_world_does_not_depend_on_interruptions_and_grows(tmp_path, truth):
    whole = world(tmp_path / "a", truth)
    assert whole["input_ids"].shape == (10, 6)
    held = json.loads((tmp_path / "a" / "world.json").read_text())
    assert held["num_tokens"] == 60
    assert held["entropy_rate"] == pytest.approx(whole["surprise"].mean().item() / 6)
    second = sorted((tmp_path / "a").glob("*.safetensors"))[1]
    second.unlink()
    assert world(tmp_path / "a", truth)["input_ids"].equal(whole["input_ids"])
    grown = world(tmp_path / "a", truth, "--num_texts", "11")
    assert len(grown["input_ids"]) == 11 and grown["input_ids"][:10].equal(whole["input_ids"])
    other = world(tmp_path / "b", truth, "--num_texts", "10", "--seed", "1")
    assert not other["input_ids"].equal(whole["input_ids"])
    refused(r"holds a world of \{'seed': 1\}", world, tmp_path / "b", truth)
    rows = sample_world.World(tmp_path / "a", 3, skip=8)
    assert rows[0]["input_ids"].tolist() == whole["input_ids"][8].tolist()
    refused("holds 11 texts, not 9 \\+ 3", sample_world.World, tmp_path / "a", 3, skip=9)


@pytest.fixture(scope="module")
def studied(tmp_path_factory, truth) -> Path:
    """The rehearsal, cut once in the middle of a row."""
    folder = tmp_path_factory.mktemp("study")
    run.main(arguments(folder, truth))
    return folder


def arguments(folder: Path, truth: str, *more: str) -> list[str]:
    return ["--plan", str(TINY), "--truth", truth, "--output_dir", str(folder), *more]


@pytest.mark.slow
def test_every_row_is_trained_judged_and_in_the_tables(studied):
    plan = load_plan(TINY)
    found = json.loads((studied / "results" / "study_tiny.json").read_text())
    assert [row["name"] for row in found["rows"]] == [row.name for row in plan.rows]
    assert (studied / "results" / "study_tiny.png").stat().st_size > 10_000
    table = (studied / "results" / "study_tiny.md").read_text()
    for row in found["rows"]:
        assert row["training"]["steps"] == 2 and row["title"] in table
        assert row["provenance"]["command"] and row["training"]["provenance"]["versions"]["torch"]
    by_name = {row["name"]: row for row in found["rows"]}
    assert "likelihood_excess" not in by_name["rate_1e-3"] and "samples" not in by_name["fp_mdlm_longer"]
    assert len(by_name["mdlm"]["samples"]) == 2 * 3  # nothing to reuse: plain, at a temperature, far apart
    assert len(by_name["fp_mdlm"]["samples"]) == 2 * 4 and len(by_name["cofre"]["samples"]) == 4
    assert set(by_name["fp_mdlm"]["likelihood_by_iterations"]) == {"1", "3"}
    assert "likelihood_by_iterations" not in by_name["mdlm"]
    assert f"{by_name['cofre']['samples'][0]['excess']:.3f}" in table
    first, second = (by_name[name]["likelihood_excess"] for name in ("fp_mdlm", "fp_mdlm_seed1"))
    assert first != second and by_name["cofre_seed1"]["start"] == "fp_mdlm_seed1"
    over_seeds = table.split("## Seeds")[1]  # of two values the standard error is half the difference
    assert f"| FP-MDLM 1/1/1 | 2 | {(first + second) / 2:.3f} ± {abs(first - second) / 2:.3f} |" in over_seeds
    # Fresh texts: what goes on from a model reads on where that model stopped.
    assert [plan.texts(plan.row(name)) for name in ("fp_mdlm", "cofre")] == [range(8), range(8, 16)]


@pytest.mark.slow
def test_a_row_is_judged_by_the_plan_and_not_by_what_its_start_was_published_with(studied, truth):
    own, judged = studied / "runs" / "mdlm_sdtt" / "generation_config.json", studied / "results" / "rows"
    before = samples(judged / "mdlm_sdtt.json")
    (judged / "mdlm_sdtt.json").unlink()
    own.write_text(json.dumps({**json.loads(own.read_text()), "temperature": 0.1}))
    run.main(arguments(studied, truth, "--only", "judge", "--rows", "mdlm_sdtt"))
    assert [s["excess"] for s in samples(judged / "mdlm_sdtt.json")] == [s["excess"] for s in before]


@pytest.mark.slow
def test_the_same_command_repeats_nothing_and_makes_what_is_missing_as_before(studied, truth, monkeypatch):
    rows = studied / "results" / "rows"
    before = json.loads((rows / "fp_mdlm.json").read_text())
    (rows / "fp_mdlm.json").unlink()
    (studied / "runs" / "fp_mdlm" / "training.json").unlink()  # as if it was cut after its last checkpoint
    run.main(arguments(studied, truth, "--rows", "fp_mdlm"))
    after = json.loads((rows / "fp_mdlm.json").read_text())
    assert after["training"]["first_step"] == 2
    for name in ("likelihood_excess", "likelihood_excess_standard_error"):
        assert after[name] == before[name]
    assert [s["excess"] for s in after["samples"]] == [s["excess"] for s in before["samples"]]
    monkeypatch.setattr(train, "start_model", lambda *_: pytest.fail("trained again"))
    run.main(arguments(studied, truth))
    judged = rows / "fp_mdlm.json"
    finished = judged.read_text()
    for old, new in (("max_steps: 2", "max_steps: 3"), ("hidden_size: 16", "hidden_size: 8")):
        (studied / "other.yaml").write_text(TINY.read_text().replace(old, new))
        with pytest.raises(ValueError, match=f"was trained by another `plan` .*{old.split(':')[0]}"):
            run.main(["--plan", str(studied / "other.yaml"), *arguments(studied, truth)[2:]])
    (studied / "other.yaml").write_text(TINY.read_text().replace("likelihood_draws: 2", "likelihood_draws: 3"))
    run.main(["--plan", str(studied / "other.yaml"), *arguments(studied, truth, "--rows", "fp_mdlm")[2:]])
    assert json.loads(judged.read_text())["likelihood_draws"] == 3
    judged.write_text(finished)
    refused(r"`rows`: \['fp'\] are none of", run.main, arguments(studied, truth, "--rows", "fp"))
    plan = TINY.read_text().replace("temperature: 0.5, reuse", "temperature: 0.7, reuse")  # asked of other settings
    (studied / "other.yaml").write_text(plan)
    run.main(["--plan", str(studied / "other.yaml"), *arguments(studied, truth, "--rows", "fp_mdlm")[2:]])
    temperatures = [row["sampling"]["options"].get("temperature") for row in samples(rows / "fp_mdlm.json")]
    assert temperatures.count(0.7) == 2 and 0.5 not in temperatures
    run.main(arguments(studied, truth, "--rows", "fp_mdlm"))
    assert [s["excess"] for s in samples(rows / "fp_mdlm.json")] == [s["excess"] for s in before["samples"]]


def test_a_row_whose_start_was_trained_again_since_is_refused(tmp_path):
    plan, export = load_plan(TINY), tmp_path / "cofre"
    row = plan.row("cofre")
    weights = tmp_path / row.start / "model.safetensors"
    for folder in (export, weights.parent):
        folder.mkdir()
    weights.write_bytes(b"first")
    known = {"asked": train.asked(plan, row), "start_weights": train.start_weights(plan, row, export)}
    (export / "training.json").write_text(json.dumps(known))
    train.check_same_row(plan, row, export)
    weights.write_bytes(b"other")
    refused(f"cofre went on from other weights than .*{row.start} holds now", train.check_same_row, plan, row, export)
    (export / "training.json").write_text(json.dumps({"asked": known["asked"]}))  # an earlier version's
    train.check_same_row(plan, row, export)


def test_a_row_goes_on_from_a_folder_in_full_precision(tmp_path):
    config = FPMDLMConfig(vocab_size=9, mask_token_id=8, hidden_size=16, num_attention_heads=2, intermediate_size=32)
    FPMDLMForMaskedDiffusion(config).bfloat16().save_pretrained(tmp_path / "released")
    shared = {"world": {}, "model": {"dropout": 0.0}, "training": {"max_steps": 2, "per_device_train_batch_size": 4}}
    rows = [{"name": "further", "start": str(tmp_path / "released"), "seeds": 2, "model": {"dropout": 0.2}}]
    (tmp_path / "plan.yaml").write_text(json.dumps({**shared, "judging": {}, "rows": rows}))
    plan = load_plan(tmp_path / "plan.yaml")
    for row, seed in zip(plan.rows, (0, 1), strict=True):
        assert row.seed == seed and plan.start(row, tmp_path / "runs") == tmp_path / "released"
        assert plan.texts(row) == range(8)
    model, teachers = train.start_model(plan, plan.rows[1], tmp_path)
    assert model.dtype == torch.float32 and model.config.dropout == 0.2 and not teachers
    assert len(train.start_weights(plan, plan.rows[0], tmp_path / "runs" / "further")) == 1
    assert release.history(plan, plan.rows[1]) == [plan.rows[1]]


def test_a_row_comes_before_a_folder_of_its_name_and_micro_batches_are_counted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "first").mkdir()
    shared = {"world": {}, "model": {}, "judging": {}, "training": {"per_device_train_batch_size": 4, "max_steps": 3}}
    further = {"name": "further", "start": "first", "seeds": 2, "training": {"gradient_accumulation_steps": 5}}
    rows = [{"name": "first", "start": "first"}, {"name": "first_seed1"}, further]
    Path("plan.yaml").write_text(json.dumps({**shared, "rows": rows}))
    plan = load_plan("plan.yaml")
    first, other, *seeds = plan.rows
    assert [plan.before(row) for row in plan.rows] == [None, None, first, other]  # `first` goes on from the folder
    assert plan.start(first, Path("runs")) == Path("first") and plan.start(seeds[0], Path("runs")) == Path(
        "runs/first"
    )
    assert release.history(plan, seeds[1]) == [other, seeds[1]]
    # 3 steps of 4 texts, then 3 of 5 times 4
    assert [plan.texts(row) for row in (first, seeds[0])] == [range(12), range(12, 72)]
    assert plan.texts_of_step(first) == 4 and plan.texts_of_step(seeds[0]) == 20


def test_settings_that_differ_have_names_that_differ():
    options = [{}, {"remask": 0.1}, {"remask": 0.2}, {"remask": 0.2, "order": "ancestral"}, {"temperature": 0.5}]
    names = [setting_name({"sampling": {"options": {"budget": 24, **o}}}) for o in options]
    assert names == ["plain", "remask 0.1", "remask 0.2", "order ancestral, remask 0.2", "temperature 0.5"]


def samples(path: Path) -> list[dict]:
    return json.loads(path.read_text())["samples"]


@pytest.mark.slow
def test_the_command_for_a_gpu_goes_on_like_the_study(studied, truth):
    """Rehearsed on the finished study: it finds everything done, and prints the tables."""
    command = [str(TINY.parent / "gpu.sh"), "--rehearse", truth, str(studied)]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "| CoFRe |" in done.stdout


@pytest.mark.parametrize("path", sorted(TINY.parent.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_plans_that_are_here_describe_runs(path, tmp_path):
    plan = load_plan(path)
    for row in plan.rows:
        train.training_arguments(plan, row, tmp_path, "cpu")
        if row.trainer != "conversion":
            FPMDLMConfig(**{**plan.model, **row.model})


@pytest.mark.slow
def test_what_is_released_is_the_row_rounded_with_a_card_of_its_results(studied, truth, tmp_path):
    where = ["--plan", str(TINY), "--study", str(studied), "--truth", truth, "--target", str(tmp_path)]
    release.main(where)
    folder, trained = tmp_path / "tiny-cofre", AutoModel.from_pretrained(studied / "runs" / "cofre")
    stored, released = load_file(folder / "model.safetensors"), AutoModel.from_pretrained(folder)
    assert released.generation_config.temperature == 0.5
    assert released.dtype == torch.float32 and all(weight.dtype == torch.bfloat16 for weight in stored.values())
    for name, weight in trained.state_dict().items():
        assert torch.equal(released.state_dict()[name], weight.bfloat16().float())
    results = json.loads((folder / "results.json").read_text())
    row = json.loads((studied / "results" / "rows" / "cofre.json").read_text())
    own, judged = results["samples"][: len(release.SHOWN_BUDGETS)], results["samples"][len(release.SHOWN_BUDGETS) :]
    assert [(s["budget"], s["setting"]) for s in own] == [(budget, release.OWN) for budget in release.SHOWN_BUDGETS]
    assert own[0]["num_steps"] < own[-1]["num_steps"]
    assert [s["excess"] for s in judged] == [s["excess"] for s in row["samples"]]
    assert results["rows"] == ["fp_mdlm", "cofre"] and results["steps"] == [2, 2]
    assert f"{row['samples'][0]['excess']:.3f}" in (folder / "README.md").read_text()


@pytest.mark.slow
def test_budget_report_judges_by_the_truth(studied, truth, tmp_path):
    options = ["--budgets", "6", "--reuse", "3sr", "--num_samples", "8", "--truth_texts", "30", "--device", "cpu"]
    shared = ["--model", str(studied / "runs" / "fp_mdlm"), "--output_dir", str(tmp_path), *options]
    row = budget_report.main([*shared, "--truth", truth])["fp_mdlm"]["rows"][0]
    assert {"excess", "energy_distance", "unigram_entropy"} <= set(row)
    assert "Excess, nats" in (tmp_path / "fp_mdlm.md").read_text()
    with pytest.raises(ValueError, match=r"'judge_text_files': .* does nothing where `truth` is the judge"):
        budget_report.main([*shared, "--truth", truth, "--judge_text_files", str(tmp_path / "fp_mdlm.md")])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"name": "a", "modle": {}}], "sets \\['modle'\\]"),
        ([SIZED, {"name": "a"}], "is there twice"),
        ([{"name": "a", "start": "b"}], "none of \\[\\] before it"),
        ([SIZED, {**SIZED, "name": "b", "start": "a", "seeds": 2}], "starts from 'a_seed1'"),
        ([{"name": "a", "trainer": "sdtt"}], "needs `start`"),
        ([{"name": "a", "judged": "well"}], "`judged`='well'"),
        ([{"name": "a"}], r"'a' has no \['per_device_train_batch_size'\] in its `training`"),
        ([SIZED], r"`release` names \['b'\]"),
    ],
)
def test_a_plan_without_sense_is_refused(tmp_path, rows, message):
    shared = {"world": {}, "model": {}, "training": {"max_steps": 2}, "judging": {}, "release": {"out": {"row": "b"}}}
    (tmp_path / "plan.yaml").write_text(json.dumps({**shared, "rows": rows}))
    refused(message, load_plan, tmp_path / "plan.yaml")


def test_a_judge_learns_the_texts(truth, tmp_path):
    worlds = [str(tmp_path / name) for name in ("world", "held_out")]
    for seed, folder in enumerate(worlds):
        sizes = ["--num_texts", "400", "--length", "16", "--seed", str(seed)]
        sample_world.main(["--truth", truth, *sizes, "--output_dir", folder])
    sizes = "--hidden_size 16 --num_layers 1 --num_attention_heads 2 --max_steps 80 --warmup_steps 5 --use_cpu True"
    sizes += f" --learning_rate 0.03 --disable_tqdm True --output_dir {tmp_path}"
    found = train_judge.main(["--world", worlds[0], "--held_out", worlds[1], *sizes.split()])
    assert found["eval_loss"] < 0.8 * math.log(12)
    rate = json.loads((tmp_path / "held_out" / "world.json").read_text())["entropy_rate"]
    assert found["eval_excess"] == pytest.approx(found["eval_loss"] - rate, abs=1e-5)
    with pytest.raises(ValueError, match="has the `seed`=0 of `world`, whose texts it repeats"):
        train_judge.main(["--world", worlds[0], "--held_out", worlds[0]])
    judge = load_judge(tmp_path, device="cpu")
    assert judge.tokenizer.bos_token_id == 0 and judge.model.config.max_position_embeddings == 17
