# SPDX-License-Identifier: Apache-2.0
"""The recipes that judge samples, on a tiny model under a tiny judge."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModel

import budget_report
import compare_settings
import frontier
import likelihood
import sweep
import tune_sampling
from fpmgm.evaluation import clearly_below, elbo_perplexity, perplexity_at_entropy
from judged_samples import JudgedSamplesArguments, check_settings
from tests.evaluation.helpers import judged_model, tiny_judge
from tests.recipes.options import RECIPES
from tests.testing_utils import refused, run_python, saved_adapter, tiny_config, tiny_model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"judge": "gpt2", "judge_text_files": ["a.txt"]}, "{'judge': 'gpt2'} does nothing where `judge_text_files`"),
        ({"max_length": 64, "judge_text_files": ["a.txt"]}, "{'max_length': 64} does nothing where"),
        ({"max_length": 9, "truth": "gpt2"}, "{'max_length': 9} does nothing where `truth` is the judge"),
        ({"judge_blocks": 9}, "{'judge_blocks': 9} does nothing where `judge` is the judge"),
    ],
)
def test_options_of_another_judge_are_refused(options, message):
    refused(message, JudgedSamplesArguments, **options)


def arguments(folder: Path, output: Path, *extra: str) -> list[str]:
    shared = ["--judge", str(folder / "judge"), "--max_length", "64", "--device", "cpu", "--batch_size", "2"]
    shared += ["--judge_batch_size", "3"]
    return [*shared, "--output_dir", str(output), *extra]


def test_the_budget_report_has_a_row_for_each_setting_and_says_how_it_was_made(folder, tmp_path, capsys):
    models = ["--model", str(folder / "fp"), str(folder / "plain"), "--budgets", "6", "12"]
    argv = arguments(folder, tmp_path, *models, "--reuse", "none", "3sr", "--top_p", "0.9", "1.0")
    argv += ["--num_samples", "4", "--text_files", str(folder / "text.txt")]
    argv += ["--reference_files", str(folder / "text.txt")]
    found = budget_report.main(argv)
    assert json.loads((tmp_path / "fp.json").read_text()) == found["fp"]
    rows = [(row.get("reuse"), row["top_p"], row["budget"]) for row in found["fp"]["rows"]]
    assert rows == [(r, p, b) for r in ("none", "3sr") for p in (0.9, 1.0) for b in (6, 12)]
    assert [row.get("reuse") for row in found["plain"]["rows"]] == [None] * 4  # nothing to reuse
    assert all(
        0 <= row["mauve"] <= 1 and row["protocol"]["mauve"]["num_references"] == 4 for row in found["fp"]["rows"]
    )
    assert found["fp"]["text"]["protocol"]["generative_perplexity"]["num_samples"] == 4
    written = (tmp_path / "fp.md").read_text()
    assert written in capsys.readouterr().out and "| fp, reuse 3sr, top_p 0.9 | Gen. PPL ↓ |" in written
    assert "mean over texts first" in written and "The text given: Gen. PPL" in written
    provenance = found["fp"]["provenance"]
    assert "torch" in provenance["versions"] and provenance["device"] and provenance["command"].startswith("python ")


def test_mauve_against_too_little_text_is_refused(folder, tmp_path):
    argv = arguments(folder, tmp_path, "--model", str(folder / "fp"), "--num_samples", "500", "--budgets", "6")
    with pytest.raises(ValueError, match="`reference_files` give 75 texts of 8 tokens, fewer than `num_samples`=500"):
        budget_report.main([*argv, "--reference_files", str(folder / "text.txt")])


def test_the_frontier_compares_at_equal_entropy(folder, tmp_path, capsys):
    argv = arguments(folder, tmp_path, "--model", str(folder / "fp"), "--budgets", "6", "12", "--num_samples", "6")
    refused("give `temperature` or `top_p`", frontier.main, argv)
    found = frontier.main([*argv, "--temperature", "0.2", "0.5", "1.0"])
    assert json.loads((tmp_path / "frontier.json").read_text()) == found
    assert [p["label"] for p in found["curves"]["fp, budget 6"]] == [f"temperature {t}" for t in (0.2, 0.5, 1.0)]
    assert len(found["entropies"]) == 3
    for name, points in found["curves"].items():
        sweep = [p["entropy"] for p in points], [p["perplexity"] for p in points]
        expected = [perplexity_at_entropy(*sweep, h) for h in found["entropies"]]
        assert found["perplexity_at_entropy"][name] == expected and None not in expected
    assert (tmp_path / "frontier.png").stat().st_size > 1000
    assert (tmp_path / "frontier.md").read_text() in capsys.readouterr().out


def test_settings_are_compared_under_each_budget_and_only_where_a_model_can_have_them(folder, tmp_path):
    settings = {
        "own": {},
        "3sr": {"reuse": "3sr", "iterations_per_step": 1},
        "frozen": {"freeze": True},
        "frozen, 3sr": {"freeze": True, "reuse": "3sr"},
        "certain": {"order": "entropy", "entropy_bound": 120.0, "num_steps": 2},
    }
    (tmp_path / "settings.yaml").write_text(json.dumps(settings))
    models = ["--model", str(folder / "fp"), str(folder / "plain"), "--settings", str(tmp_path / "settings.yaml")]
    more = ["--budgets", "12", "24", "--num_samples", "3", "--output", str(tmp_path / "found")]
    found = compare_settings.main(arguments(folder, tmp_path, *models, *more))
    assert json.loads((tmp_path / "found.json").read_text()) == found
    of = {name: [row for row in found["rows"] if row["model"] == name] for name in ("fp", "plain")}
    assert [row["setting"] for row in of["fp"]] == [name for name in settings for _ in range(2)]
    assert [row["setting"] for row in of["plain"]][::2] == ["own", "frozen", "certain"]  # nothing to reuse
    by_name = {row["setting"]: row for row in of["fp"] if row["budget"] == 24}
    assert by_name["3sr"]["num_steps"] == 8 and by_name["certain"]["tokens_per_step"] == 8
    assert by_name["frozen"]["num_steps"] > by_name["own"]["num_steps"]  # what is saved buys steps
    for row in found["rows"]:
        assert row["mean_block_evaluations"] <= row["block_evaluations"] <= row["budget"]
    assert "| fp | frozen, 3sr |" in (tmp_path / "found.md").read_text(encoding="utf-8")
    assert (tmp_path / "found.png").stat().st_size > 10_000
    (tmp_path / "settings.yaml").write_text("[ancestral, halton]")
    with pytest.raises(ValueError, match=r"`settings`=.* holds no `name: value` lines but list"):
        compare_settings.main(arguments(folder, tmp_path, *models))


def test_a_looped_model_beside_others_is_given_no_reuse(folder, tmp_path):
    judged_model(input_injection="none").save_pretrained(tmp_path / "looped")
    tiny_judge().tokenizer.save_pretrained(tmp_path / "looped")
    models = ["--model", str(folder / "fp"), str(tmp_path / "looped"), "--budgets", "24", "--num_samples", "2"]
    found = budget_report.main(arguments(folder, tmp_path, *models, "--reuse", "none", "3sr"))
    options = [[row["sampling"]["options"] for row in model["rows"]] for model in (found["fp"], found["looped"])]
    assert options == [[{"budget": 24, "reuse": "none"}, {"budget": 24, "reuse": "3sr"}], [{"budget": 24}]]
    kinds = {"fixed point": {}, "looped": {"input_injection": "none"}, "explicit": {"num_fixed_point_layers": 0}}
    found = {"own": {}, "3sr": {"reuse": "3sr", "gamma_changed": 0.5, "solver": "anderson"}, "full": {"reuse": "full"}}
    fitting = {name: compare_settings.fitting(found, tiny_config(**how)) for name, how in kinds.items()}
    assert fitting["fixed point"] == found and fitting["explicit"] == {"own": {}}
    assert fitting["looped"] == {"own": {}, "3sr": {"solver": "anderson"}}


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        (budget_report, ["--budgets", "6", "--num_steps", "2"], "`budget`=6 cannot pay"),
        (frontier, ["--budgets", "6", "--top_p", "0.9"], "`budget`=6 cannot pay"),
        (sweep, ["--budgets", "6"], "`budget`=6 cannot pay"),
        (compare_settings, ["--settings", "late: {order: halton, remask: 0.1}"], "`remask`=0.1 needs `order`"),
        (
            compare_settings,
            ["--settings", "late: {order: confidence, iterations_per_step: 1}"],
            "`num_steps`=16 exceeds",
        ),
        (compare_settings, ["--settings", "own: {budget: 48}"], "leave its own out"),
        (compare_settings, ["--settings", "one: {}\none: {reuse: none}"], "gives `one` a second time in line 2"),
        (tune_sampling, ["--budgets", "96", "2"], "`budget`=2 cannot pay"),
    ],
)
def test_what_a_later_model_or_setting_cannot_do_is_said_before_the_first_is_sampled(
    folder, tmp_path, recipe, options, message
):
    if not (folder / "deep").exists():
        judged_model(num_pre_layers=9).save_pretrained(folder / "deep")
        tiny_judge().tokenizer.save_pretrained(folder / "deep")
        (folder / "deep" / "model.safetensors").unlink()  # the weights are not read
    models = ["--model", str(folder / "fp"), *([] if recipe is tune_sampling else [str(folder / "deep")])]
    if options[0] == "--settings":
        (tmp_path / "settings.yaml").write_text(options[1])
        options = ["--settings", str(tmp_path / "settings.yaml"), "--output", str(tmp_path / "found")]
    command = ["latency"] if recipe is sweep else []
    refused(message, recipe.main, [*command, *arguments(folder, tmp_path, *models, *options)])
    assert not (tmp_path / "cache").exists()


def test_settings_are_checked_against_a_checkpoints_own_defaults_and_an_adapters_base(folder, tmp_path):
    base = tiny_model()
    base.generation_config = base.generation_config.updated(block_length=4)
    saved_adapter(tmp_path, base)
    for name in ("base", "adapter"):
        check_settings([str(tmp_path / name)], lambda model: [{"budget": 12}], 8)
        with pytest.raises(ValueError, match="`block_length`=4 makes 2 blocks"):
            check_settings([str(tmp_path / name)], lambda model: [{"budget": 6}], 8)


def test_models_of_one_name_are_told_apart(folder, tmp_path):
    models = [str(tmp_path / name / "export") for name in ("first", "second")]
    for model in models:
        shutil.copytree(folder / "fp", model)
    budget = ["--budgets", "12", "--num_samples", "2"]
    found = budget_report.main(arguments(folder, tmp_path, "--model", *models, *budget))
    assert list(found) == ["first-export", "second-export"] and (tmp_path / "second-export.md").is_file()
    found = frontier.main(arguments(folder, tmp_path, "--model", *models, *budget, "--top_p", "0.9"))
    assert {name: len(points) for name, points in found["curves"].items()} == {
        "first-export, budget 12": 1,
        "second-export, budget 12": 1,
    }


@pytest.mark.parametrize("path", sorted((RECIPES / "configs/settings").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_settings_that_are_here_are_options_of_generate(folder, path):
    model = AutoModel.from_pretrained(folder / "fp")
    for options in compare_settings.read_settings(path).values():
        shorter = {"block_length": 4} if "block_length" in options else {}
        model.generate(budget=12, seed=0, **{**options, **shorter})


def test_likelihood_has_a_row_for_each_model_corpus_and_number_of_iterations(folder, tmp_path):
    other = tmp_path / "other.txt"
    for wrong in (["--blocks", "0"], ["--iterations", "2", "0"]):
        refused(f"`{wrong[0][2:]}`=0", likelihood.main, ["--model", str(folder / "fp"), *wrong])
    other.write_text("Pack my box with five dozen liquor jugs.\n" * 4)
    argv = ["--model", str(folder / "fp"), str(folder / "plain"), "--text_files", str(folder / "text.txt"), str(other)]
    argv += ["--iterations", "1", "4", "--num_draws", "2", "--device", "cpu", "--output_dir", str(tmp_path)]
    rows = likelihood.main([*argv, "--blocks", "10"])["rows"]
    assert [(r["model"], r["corpus"], r["protocol"]["num_iterations"]) for r in rows] == [
        *(("fp", corpus, n) for corpus in ("text.txt", "other.txt") for n in (1, 4)),
        *(("plain", corpus, None) for corpus in ("text.txt", "other.txt")),
    ]
    model, tokenizer = AutoModel.from_pretrained(folder / "fp"), tiny_judge().tokenizer
    ids = tokenizer((folder / "text.txt").read_text())["input_ids"]
    end = tokenizer.eos_token_id
    blocks = [[end, *ids[6 * i : 6 * i + 6], end] for i in range(10)]
    expected = elbo_perplexity(model, blocks, num_draws=2, num_iterations=4)
    assert rows[1]["perplexity"] == pytest.approx(expected["perplexity"])
    written = (tmp_path / "likelihood.md").read_text(encoding="utf-8")
    assert written.count("| 2 |") == 6 and written.count(" ± ") == 6


def rows_of(scores: dict, error: float):
    """In place of `evaluate_budgets`: a row with the perplexity of (seed, whether it is a plan or the defaults)."""

    def rows(model, tokenizer, judge, budgets, settings, *, seed, **unused):
        planned = len(settings[0]) > 1  # beside `tuned_plans`
        return [
            {
                "generative_perplexity": scores[seed, planned],
                "generative_perplexity_standard_error": error,
                "unigram_entropy": 3.0,
            }
        ]

    return rows


@pytest.mark.parametrize(
    ("plan", "defaults", "error", "kept"),
    [(758.0, 790.0, 9.0, True), (758.0, 790.0, 54.0, False), (790.0, 758.0, 9.0, False)],
)
def test_a_plan_is_stored_only_beyond_its_error(folder, tmp_path, monkeypatch, plan, defaults, error, kept):
    shutil.copytree(folder / "fp", tmp_path / "fp")
    scores = {(0, True): 1.0, (0, False): 2.0, (1, True): plan, (1, False): defaults}  # seed 1: new texts
    monkeypatch.setattr(tune_sampling, "evaluate_budgets", rows_of(scores, error))
    argv = arguments(folder, tmp_path, "--model", str(tmp_path / "fp"), "--num_candidates", "3", "--budgets", "24")
    (result,) = tune_sampling.main([*argv, "--num_samples", "2", "6"])["budgets"]
    assert result["kept"] == kept and result["plan"]
    stored = json.loads((tmp_path / "fp" / "generation_config.json").read_text(encoding="utf-8"))["tuned_plans"]
    assert stored == ({"24": result["plan"]} if kept else {})
    written = (tmp_path / "tuning.md").read_text(encoding="utf-8")
    assert f"{plan:.2f} ± {error:.2f} | 3.000 | {defaults:.2f} ± {error:.2f}" in written
    if kept:
        tuned = AutoModel.from_pretrained(tmp_path / "fp").generate(budget=24, return_dict_in_generate=True)
        assert tuned.tuned_plan == result["plan"] and tuned.num_steps == result["plan"]["num_steps"]


def test_tuning_goes_by_rungs_and_refuses_what_loses_entropy(folder, tmp_path):
    model = AutoModel.from_pretrained(folder / "fp")
    model.save_pretrained(tmp_path / "fp")
    tiny_judge().tokenizer.save_pretrained(tmp_path / "fp")
    argv = arguments(folder, tmp_path, "--model", str(tmp_path / "fp"), "--num_candidates", "6")
    argv += ["--num_samples", "2", "6"]
    config_file = tmp_path / "fp" / "generation_config.json"

    # Nothing keeps that much entropy: the defaults stay.
    found = tune_sampling.main([*argv, "--budgets", "24", "--min_entropy", "99"])
    assert found["budgets"][0]["plan"] == {} and not found["budgets"][0]["kept"]
    assert json.loads(config_file.read_text())["tuned_plans"] == {}

    found = tune_sampling.main([*argv, "--budgets", "24", "36", "--entropy_slack", "9"])
    kept = {str(result["budget"]): result["plan"] for result in found["budgets"] if result["kept"]}
    assert json.loads(config_file.read_text())["tuned_plans"] == kept
    names = ("generative_perplexity", "generative_perplexity_standard_error")
    for result in found["budgets"]:
        tuned, default = (result["new_texts"][name] for name in ("tuned", "default"))
        assert result["kept"] == clearly_below(*(row[name] for row in (tuned, default) for name in names))
        assert [len(rung) for rung in result["rungs"]] in ([6, 2], [6, 3])
        assert [{trial["resource"] for trial in rung} for rung in result["rungs"]] == [{2}, {6}]


def test_only_plans_that_the_models_order_can_have_are_tried(folder, tmp_path):
    model = AutoModel.from_pretrained(folder / "fp")
    model.generation_config = model.generation_config.updated(order="confidence")
    model.save_pretrained(tmp_path / "fp")
    tiny_judge().tokenizer.save_pretrained(tmp_path / "fp")
    argv = arguments(folder, tmp_path, "--model", str(tmp_path / "fp"), "--num_candidates", "12", "--budgets", "48")
    (result,) = tune_sampling.main([*argv, "--num_samples", "2", "--entropy_slack", "9"])["budgets"]
    steps = [trial["plan"].get("num_steps", 1) for trial in result["rungs"][0]]
    assert 1 < len(steps) < 12 and max(steps) <= 8  # of up to 16 that the budget pays


@pytest.mark.slow
def test_a_recipe_reads_writes_and_prints_under_an_ascii_locale(folder, tmp_path):
    (tmp_path / "text.txt").write_text("Příliš žluťoučký kůň. " * 20, encoding="utf-8")
    command = [str(RECIPES / "likelihood.py"), "--model", str(folder / "fp"), "--device", "cpu"]
    command += ["--text_files", str(tmp_path / "text.txt"), "--num_draws", "2", "--output_dir", str(tmp_path)]
    run_python(*command, LC_ALL="C", PYTHONUTF8="0", PYTHONPATH=str(RECIPES.parent))
    assert " ± " in (tmp_path / "likelihood.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_two_processes_report_what_one_does(folder, tmp_path):
    argv = ["--model", str(folder / "fp"), "--budgets", "6", "--num_samples", "7", "--reuse", "full"]
    single = budget_report.main(arguments(folder, tmp_path / "one", *argv))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(RECIPES / "budget_report.py"), *arguments(folder, tmp_path / "two", *argv)]
    run_python(*command, PYTHONPATH=str(RECIPES.parent))
    several = json.loads((tmp_path / "two" / "fp.json").read_text())
    assert several["provenance"]["processes"] == 2
    assert len(list((tmp_path / "two" / "cache").glob("*-1.jsonl"))) == 2  # the second process sampled and scored
    (row,), (expected,) = several["rows"], single["fp"]["rows"]
    for clock in ("milliseconds_per_sequence", "timed_on"):
        del row[clock], expected[clock]
    assert row == expected
