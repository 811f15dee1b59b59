# SPDX-License-Identifier: Apache-2.0
"""Judge one row of a study by the truth: likelihood, and samples under budgets."""

import json
from pathlib import Path

from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from fpmgm.evaluation import TruthJudge, repetition_rate, sweep, unigram_entropy
from fpmgm.evaluation.provenance import provenance
from sample_world import World
from study.plan import Plan, Row


def open_truth(truth: str, folder: Path, device: str) -> TruthJudge:
    """The truth, with the held-out texts as references."""
    world = World(folder / "held_out")
    model = AutoModelForCausalLM.from_pretrained(truth).to(device).eval()
    return TruthJudge(f"the truth {Path(truth).name}", model, world.input_ids.long(), world.surprise)


def judge_row(plan: Plan, row: Row, folder: Path, judge: TruthJudge, device: str) -> None:
    """Write the row's results unless they are there; an interrupted judgement goes on where it was."""
    path, export = folder / "results" / "rows" / f"{row.name}.json", folder / "runs" / row.name
    if path.exists():
        return
    training = json.loads((export / "training.json").read_text(encoding="utf-8"))
    found = {
        "name": row.name,
        "title": row.title or row.name,
        "group": row.group,
        "trainer": row.trainer,
        "start": row.start,
        "model": {**plan.model, **row.model},
        "training_options": {**plan.training, **row.training, "seed": row.seed},
        "training": training,
    }
    if row.judged != "none":
        model = AutoModel.from_pretrained(export).to(device).eval()
        count, draws = plan.judging["likelihood_texts"], plan.judging["likelihood_draws"]
        options = {"batch_size": plan.judging["batch_size"], "cache_dir": folder / "cache"}
        found |= judge.likelihood_excess(model, count, num_draws=draws, **options)
    if row.judged == "samples":
        found["samples"] = sweep(
            model, AutoTokenizer.from_pretrained(export), judge, settings(plan, row, model.config),
            num_samples=row.num_samples or plan.judging["num_samples"], judge_batch_size=64, seed=1, **options,
        )  # fmt: skip
    found["provenance"] = provenance(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def settings(plan: Plan, row: Row, config) -> list[dict]:
    """Options of `generate`, one set per row of samples; an explicit model has nothing to reuse."""
    chosen = []
    for setting in row.settings or plan.judging["settings"]:
        options = {name: value for name, value in setting.items() if config.num_fixed_point_layers or name != "reuse"}
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
