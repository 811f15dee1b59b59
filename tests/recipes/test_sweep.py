# SPDX-License-Identifier: Apache-2.0
"""The recipe of the sweeps: rows against plain loops, what it writes is used, what it has done it does not repeat."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import save_file
from transformers import AutoModel

import sweep
from fpmgm.data import load_text, pack
from fpmgm.evaluation import NGramJudge, clearly_below, unigram_entropy
from fpmgm.models.budget import ALLOCATIONS, plan_budget
from tests.evaluation.helpers import judged_model, tiny_judge
from tests.testing_utils import refused


def arguments(folder: Path, output: Path, *extra: str) -> list[str]:
    shared = ["--judge_text_files", str(folder / "text.txt"), "--judge_blocks", "50", "--device", "cpu"]
    return [*shared, "--batch_size", "2", "--num_samples", "4", "--output_dir", str(output), *extra]


def judge_of(folder: Path) -> NGramJudge:
    """The judge that `arguments` ask for."""
    tokenizer = tiny_judge().tokenizer
    return NGramJudge(pack(load_text(str(folder / "text.txt")), tokenizer, 8)["input_ids"][:50], len(tokenizer))


def expected(folder: Path, seed: int = 0, **options) -> tuple[float, float]:
    """Perplexity and entropy by plain means."""
    seeds = [(seed << 32) + row for row in range(4)]
    drawn = AutoModel.from_pretrained(folder / "fp").generate(batch_size=4, seed=seeds, **options).numpy()
    return judge_of(folder).perplexity(drawn), unigram_entropy(drawn)


def test_plans_are_rows_of_steps_and_iterations_that_the_budget_pays(folder, tmp_path, capsys):
    plans = ["--num_steps", "2", "4", "--iterations", "1", "3", "--budgets", "12", "--max_budget", "12"]
    argv = ["plans", "--model", str(folder / "fp"), *plans, "--text_files", str(folder / "text.txt")]
    found = sweep.main([*argv, *arguments(folder, tmp_path)])
    assert json.loads((tmp_path / "plans.json").read_text()) == found
    assert [(r["num_steps"], r["iterations"]) for r in found["rows"]] == [(2, [1, 1]), (2, [3, 3]), (4, [1] * 4)]
    for row in found["rows"]:
        perplexity, entropy = expected(folder, num_steps=row["num_steps"], iterations=row["iterations"], reuse="3sr")
        assert row["generative_perplexity"] == pytest.approx(perplexity)
        assert row["unigram_entropy"] == pytest.approx(entropy)
        assert row["block_evaluations"] == row["num_steps"] * (2 + row["iterations"][0])
    assert (tmp_path / "plans.png").stat().st_size > 1000
    written = (tmp_path / "plans.md").read_text()
    assert written in capsys.readouterr().out and "The text given: Gen. PPL" in written and "text.txt" in written


def test_allocations_are_compared_at_equal_budget(folder, tmp_path):
    argv = ["allocations", "--model", str(folder / "fp"), "--budgets", "12", "24", "--reuse", "none", "full"]
    found = sweep.main([*argv, *arguments(folder, tmp_path)])
    config = AutoModel.from_pretrained(folder / "fp").config
    scores = {}
    for row in found["rows"]:
        option = row["sampling"]["options"]
        plan = plan_budget(config, option["budget"], allocation=option["allocation"])
        perplexity, _ = expected(folder, iterations=plan.iterations, reuse=option["reuse"])
        assert row["generative_perplexity"] == pytest.approx(perplexity) and row["iterations"] == plan.iterations
        measured = (row["generative_perplexity"], row["generative_perplexity_standard_error"])
        scores[option["reuse"], option["budget"], option["allocation"]] = measured
    cells = {key[:2] for key in scores}
    assert len(scores) == 4 * len(ALLOCATIONS)
    for value in found["comparison"]:
        name = value["allocation"]
        assert value["mean_generative_perplexity"] == pytest.approx(sum(scores[(*c, name)][0] for c in cells) / 4)
        clear = [any(clearly_below(*scores[(*c, o)], *scores[(*c, name)]) for o in ALLOCATIONS) for c in cells]
        assert value["unbeaten"] == clear.count(False)
    assert (tmp_path / "allocations.png").stat().st_size > 1000


def test_gammas_are_pooled_over_budgets_and_compared_with_the_checkpoints_on_new_texts(folder, tmp_path):
    argv = ["gammas", "--model", str(folder / "fp"), "--budgets", "12", "24", "--gamma_masked", "0:0.3"]
    argv += ["--gamma_changed", "0", "0.9", "--entropy_slack", "9", *arguments(folder, tmp_path)]
    found = sweep.main(argv)
    default = {"gamma_masked": [0.75, 0.9], "gamma_changed": 0.2, "gamma_unchanged": 1.0}  # not on the grid: added
    others = [{"gamma_masked": [0.0, 0.3], "gamma_changed": g, "gamma_unchanged": 1.0} for g in (0.0, 0.9)]

    def mean(gammas: dict, seed: int) -> float:
        scores = [expected(folder, seed, budget=budget, reuse="3sr", **gammas)[0] for budget in (12, 24)]
        return (scores[0] * scores[1]) ** 0.5

    means = {json.dumps(gammas): mean(gammas, 0) for gammas in (default, *others)}
    assert {json.dumps(p["setting"]): p["generative_perplexity"] for p in found["pooled"]} == pytest.approx(means)
    assert json.dumps(found["pooled"][0]["setting"]) == min(means, key=means.get)
    for pooled in found["new_texts"]:
        assert pooled["generative_perplexity"] == pytest.approx(mean(pooled["setting"], 1))
    assert (tmp_path / "gammas.png").stat().st_size > 1000
    with pytest.raises(ValueError, match=r"`gamma_masked` has '0.5', but takes ranges such as 0\.75:0\.9"):
        sweep.main([word if word != "0:0.3" else "0.5" for word in argv])
    refused(r"`gamma_changed`=1\.5 must lie in", sweep.main, [word if word != "0.9" else "1.5" for word in argv])


SHOWN = ("judge", "num_samples", "special_tokens", "max_length")


def judged(scores: dict, entropies: dict, error: float):
    """In place of `sweep`: rows with the perplexity of (seed, γ of revealed tokens) and the entropy of (budget, γ)."""

    def rows(model, tokenizer, judge, settings, *, seed, **unused):
        return [
            {
                "generative_perplexity": scores[seed, s["gamma_changed"]],
                "generative_perplexity_standard_error": error,
                "unigram_entropy": entropies.get((s["budget"], s["gamma_changed"]), 3.0),
                "protocol": {"generative_perplexity": dict.fromkeys(SHOWN, "tables")},
                "sampling": {"options": s, "length": 8, "batch_size": 1},
            }
            for s in settings
        ]

    return rows


@pytest.mark.parametrize(
    ("on_new_texts", "entropies", "error", "written"),
    [
        (4.0, {}, 0.1, 0.9),
        (4.0, {}, 0.6, None),  # within the error
        (6.0, {}, 0.1, None),  # new texts do not agree
        (4.0, {(24, 0.9): 2.9}, 0.1, 0.5),  # the best one loses entropy at one of the budgets: the next
        (4.0, {(24, 0.9): 2.9, (12, 0.5): 2.9}, 0.1, None),
    ],
)
def test_the_best_gammas_are_written_if_new_texts_agree_and_generate_uses_them(
    folder, tmp_path, monkeypatch, on_new_texts, entropies, error, written
):
    shutil.copytree(folder / "fp", tmp_path / "fp")
    config_file = tmp_path / "fp" / "generation_config.json"
    before = json.loads(config_file.read_text())
    scores = {(0, 0.2): 5.0, (0, 0.5): 4.5, (0, 0.9): 4.0, (1, 0.2): 5.0, (1, 0.5): 4.5, (1, 0.9): on_new_texts}
    monkeypatch.setattr(sweep, "sweep", judged(scores, entropies, error))
    argv = ["gammas", "--model", str(tmp_path / "fp"), "--budgets", "12", "24", "--gamma_masked", "0.75:0.9"]
    argv += ["--gamma_changed", "0.2", "0.5", "0.9", *arguments(folder, tmp_path)]
    assert sweep.main(argv)["better"] == (written is not None)
    assert json.loads(config_file.read_text()) == before  # without `write`
    sweep.main([*argv, "--write", "True"])
    after = json.loads(config_file.read_text())
    assert {name for name in after if after[name] != before[name]} == ({"gamma_changed"} if written else set())
    if written:
        old, new = (AutoModel.from_pretrained(path / "fp") for path in (folder, tmp_path))
        drawn = new.generate(batch_size=16, budget=24, seed=0)
        assert drawn.equal(old.generate(batch_size=16, budget=24, seed=0, gamma_changed=written))
        assert not drawn.equal(old.generate(batch_size=16, budget=24, seed=0))


def test_checkpoints_are_judged_with_the_weights_that_they_would_export(folder, tmp_path):
    models = {step: judged_model(step) for step in (2, 10, 12)}
    for step, model in models.items():
        checkpoint = tmp_path / "run" / f"checkpoint-{step}"
        shutil.copytree(folder / "fp", checkpoint)
        if step == 10:  # its own weights are others than the average beside them
            save_file(model.state_dict(), checkpoint / "ema.safetensors")
        else:
            model.save_pretrained(checkpoint)
        history = [
            {"step": 0, "eval_perplexity": 9.0},
            {"step": 1, "loss": 2.0},
            {"step": step, "eval_perplexity": 8.0, "eval_perplexity_stderr": 0.5},
        ]
        (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": history}))
        if step < 12:  # the last one was interrupted
            sizes = {path.name: path.stat().st_size for path in checkpoint.iterdir()}
            (checkpoint / "checkpoint_files.json").write_text(json.dumps(sizes))
    argv = ["checkpoints", "--model", str(tmp_path / "run"), "--before", str(folder / "fp")]
    argv += [*arguments(folder, tmp_path), "--budgets", "6"]
    found = sweep.main([*argv, "12"])
    assert [(row["step"], row["budget"]) for row in found["rows"]] == [(s, b) for s in (0, 2, 10) for b in (6, 12)]
    judge = judge_of(folder)
    for row in found["rows"]:
        model = models[row["step"]] if row["step"] else AutoModel.from_pretrained(folder / "fp")
        drawn = model.generate(batch_size=4, seed=[0, 1, 2, 3], budget=row["budget"], reuse="none").numpy()
        assert row["generative_perplexity"] == pytest.approx(judge.perplexity(drawn))
    assert found["validation"] == [
        {"step": 0, "perplexity": 9.0, "standard_error": None},
        {"step": 10, "perplexity": 8.0, "standard_error": 0.5},
    ]
    assert "0: 9.00, 10: 8.00 ± 0.50." in (tmp_path / "checkpoints.md").read_text(encoding="utf-8")
    assert (tmp_path / "checkpoints.png").stat().st_size > 1000
    # An export that is the last checkpoint's average is not judged again, another one is.
    for step, steps in ((10, [0, 2, 10]), (12, [0, 2, 10, 10])):
        models[step].save_pretrained(tmp_path / "run")
        tiny_judge().tokenizer.save_pretrained(tmp_path / "run")
        found = sweep.main(argv)
        assert [row["step"] for row in found["rows"]] == steps
    assert found["rows"][-1]["checkpoint"] == "run"
    with pytest.raises(ValueError, match="holds no whole checkpoint"):
        sweep.main(["checkpoints", "--model", str(folder / "fp"), *arguments(folder, tmp_path)])


def test_latency_has_a_line_for_each_model_and_reuse_and_is_not_measured_twice(folder, tmp_path, monkeypatch):
    argv = ["latency", "--model", str(folder / "fp"), str(folder / "plain"), "--budgets", "6", "12"]
    argv += ["--warmup_batches", "1", "--timed_batches", "2", *arguments(folder, tmp_path)]
    found = sweep.main(argv)
    methods = ["fp, reuse none", "fp, reuse 3sr", "plain, reuse none"]  # nothing to reuse without fixed-point layers
    assert [(row["method"], row["budget"]) for row in found["rows"]] == [(m, b) for m in methods for b in (6, 12)]
    for row in found["rows"]:
        assert row["latency"]["seconds_per_batch"] == pytest.approx(2 * row["latency"]["seconds_per_sequence"])
        assert row["latency"]["protocol"]["options"] == row["sampling"]["options"]
    assert (tmp_path / "latency.png").stat().st_size > 1000

    def refuse(*args, **kwargs):
        raise AssertionError("sampled again")

    monkeypatch.setattr("fpmgm.models.generation_mgm.MGMGenerationMixin.generate", refuse)
    assert sweep.main(argv)["rows"] == found["rows"]


def test_a_sweep_without_sense_is_refused(folder, tmp_path):
    rest = arguments(folder, tmp_path)
    refused(r"the first argument is 'plan', but must be one of \('plans',", sweep.main, ["plan"])
    with pytest.raises(ValueError, match="`num_steps`=0 must be a whole number"):
        sweep.main(["plans", "--model", str(folder / "fp"), "--num_steps", "4", "0", *rest])
    with pytest.raises(ValueError, match="has no fixed-point layers: there are no iterations to sweep over"):
        sweep.main(["plans", "--model", str(folder / "plain"), *rest])
    with pytest.raises(ValueError, match="has another tokenizer than"):
        sweep.main(["latency", "--model", str(folder / "fp"), str(folder / "other"), *rest])
    with pytest.raises(ValueError, match="fewer than `judge_blocks`=9999"):
        sweep.main(["plans", "--model", str(folder / "fp"), *rest, "--judge_blocks", "9999"])
    assert not (tmp_path / "cache").exists()  # nothing was sampled before
