# SPDX-License-Identifier: Apache-2.0
"""Judge one row of a study by the truth: likelihood, and samples under budgets."""

import json
from pathlib import Path

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from fpmgm import MGMGenerationConfig
from fpmgm.evaluation import TruthJudge, repetition_rate, sweep, unigram_entropy
from fpmgm.evaluation.provenance import provenance
from fpmgm.evaluation.report import write_report
from judged_samples import fitting_options
from sample_world import World
from study.plan import Plan, Row
from study.train import asked


def open_truth(truth: str, folder: Path, device: str) -> TruthJudge:
    """The truth, with the held-out texts as references."""
    world = World(folder / "held_out")
    model = AutoModelForCausalLM.from_pretrained(truth).to(device).eval()
    return TruthJudge(f"the truth {Path(truth).name}", model, world.input_ids.long(), world.surprise)


def judge_row(plan: Plan, row: Row, folder: Path, judge: TruthJudge, device: str) -> None:
    """Write the row's results, but for what is there; an interrupted judgement goes on where it was."""
    path, export = folder / "results" / "rows" / f"{row.name}.json", folder / "runs" / row.name
    found, described = {}, describe_row(plan, row, export)
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
    if found.get("training") != described["training"]:  # none, or trained again since
        found = {}
    found |= described
    settings = settings_of(plan, row, AutoConfig.from_pretrained(export))
    # Finished batches are kept: what was asked before comes from there.
    found = {name: value for name, value in found.items() if name not in outdated(plan, row, found, settings)}
    missing = wanted(plan, row, found) - set(found)
    if missing:
        model = AutoModel.from_pretrained(export).to(device).eval()
        model.generation_config = MGMGenerationConfig()  # and not what a released folder is published with
        options = {"batch_size": plan.judging["batch_size"], "cache_dir": folder / "cache"}
        likelihood = {"num_draws": plan.judging["likelihood_draws"], **options}
        count = plan.judging["likelihood_texts"]
        if "likelihood_excess" in missing:
            found |= judge.likelihood_excess(model, count, **likelihood)
        if "likelihood_by_iterations" in missing:
            found["likelihood_by_iterations"] = {
                str(n): judge.likelihood_excess(model, count // 4, num_iterations=n, **likelihood)
                for n in plan.judging["likelihood_iterations"]
            }
        if "samples" in missing:
            found["samples"] = sweep(
                model, AutoTokenizer.from_pretrained(export), judge, settings,
                num_samples=row.num_samples or plan.judging["num_samples"], judge_batch_size=64, seed=1, **options,
            )  # fmt: skip
    if missing or not path.exists():
        found["provenance"] = provenance(device)
        write_report(path, found)


def describe_row(plan: Plan, row: Row, export: Path) -> dict:
    """What a row is, and how it was trained."""
    return {
        "name": row.name,
        "title": row.title or row.name,
        "group": row.group,
        **asked(plan, row),
        "training": json.loads((export / "training.json").read_text(encoding="utf-8")),
    }


def wanted(plan: Plan, row: Row, found: dict) -> set[str]:
    """Names of the measures that a row is to have."""
    if row.judged == "none":
        return set()
    names = {"likelihood_excess"} | ({"samples"} if row.judged == "samples" else set())
    iterated = row.judged == "samples" and any("residual" in line for line in found["training"]["log"])
    return names | ({"likelihood_by_iterations"} if iterated and "likelihood_iterations" in plan.judging else set())


def outdated(plan: Plan, row: Row, found: dict, settings: list[dict]) -> set[str]:
    """Names of the measures that were made of other settings, or of more or less, than the plan asks for now."""
    judging, names = plan.judging, set()
    samples = [
        (sample["sampling"]["options"], sample["protocol"]["generative_perplexity"]["num_samples"])
        for sample in found.get("samples", [])
    ]
    if samples != [(setting, row.num_samples or judging["num_samples"]) for setting in settings]:
        names.add("samples")
    if any(found.get(name) != judging[name] for name in ("likelihood_draws", "likelihood_texts")):
        names |= {"likelihood_excess", "likelihood_by_iterations"}
    if list(found.get("likelihood_by_iterations", ())) != list(map(str, judging.get("likelihood_iterations", ()))):
        names.add("likelihood_by_iterations")
    return names


def settings_of(plan: Plan, row: Row, config) -> list[dict]:
    """Options of `generate`, one set per row of samples; an explicit model has nothing to reuse or to iterate."""
    chosen = []
    for setting in row.settings or plan.judging["settings"]:
        options = fitting_options(setting, config)
        chosen += [
            {"budget": budget, **options}
            for budget in row.budgets or plan.judging["budgets"]
            if budget >= config.num_hidden_layers
        ]
    return [setting for i, setting in enumerate(chosen) if setting not in chosen[:i]]


def describe_truth(judge: TruthJudge) -> dict:
    """What the truth's own texts measure."""
    texts = judge.references[:2000].tolist()
    return {
        "name": judge.name,
        "length": judge.length,
        "entropy_rate": judge.entropy_rate,
        "entropy_rate_standard_error": judge.entropy_rate_standard_error,
        "num_references": len(judge.references),
        "unigram_entropy": unigram_entropy(texts),
        "repetition_4": repetition_rate(texts, 4),
    }
