# SPDX-License-Identifier: Apache-2.0
"""Make the folders that are published of a study's finished rows, each with its card.

    python recipes/study/release.py --plan recipes/study/small.yaml --truth stories260K --study studies/small

The plan's `release` says which row becomes which folder. Weights are rounded to bfloat16 on disk and load as float32,
as CPUs want them; the likelihood in the card is measured again with the rounded ones. `results.json` holds what the
card says, and tokens that the folder must give again.
"""

import json
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))  # the other recipes

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from fpmgm.command_line import LocalPath, ModelName, parse_arguments
from fpmgm.evaluation import TruthJudge, sweep
from fpmgm.evaluation.provenance import provenance
from fpmgm.evaluation.report import write_report
from fpmgm.model_cards.escape import PLACES
from study.judge import open_truth
from study.plan import Plan, Row, load_plan
from study.tables import core_seconds, setting_name


ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = Path(__file__).with_name("card.md")
LLAMA_NORMALIZER = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ],
}
SAMPLE_FIELDS = (
    "budget", "num_steps", "block_evaluations", "excess", "excess_standard_error", "generative_perplexity",
    "generative_perplexity_standard_error", "unigram_entropy", "repetition_4",
)  # fmt: skip
SHOWN_BUDGETS, SHOWN_TEXTS = (24, 96, 192), 2
OWN = "this folder's defaults"


@dataclass(kw_only=True)
class ReleaseArguments:
    """What to publish, and where."""

    plan: LocalPath = field(metadata={"help": "YAML of the study: see recipes/study/plan.py."})
    study: LocalPath = field(metadata={"help": "Folder that run.py wrote."})
    truth: ModelName = field(metadata={"help": "Causal language model: folder or hub name."})
    judge: LocalPath | None = field(default=None, metadata={"help": "What train_judge.py wrote; null: no judge."})
    target: str = field(default="model_cards", metadata={"help": "Where the folders are made."})


def main(argv: list[str] | None = None) -> None:
    """Write a folder for each entry of `release` whose row is trained and judged."""
    (args,) = parse_arguments((ReleaseArguments,), __doc__, argv)
    study, target = Path(args.study), Path(args.target)
    plan, judge = load_plan(args.plan), open_truth(args.truth, study, "cpu")
    for name, entry in plan.release.items():
        folder, row = target / name, plan.row(entry["row"])
        save_rounded(AutoModel, study / "runs" / row.name, folder, entry.get("generation", {}))
        results = describe(plan, row, study, folder, judge)
        write_report(folder / "results.json", results)
        write_card(folder, results)
        print(f"{folder}: ELBO excess {results['likelihood_excess']:.3f} nats per token")
    if args.judge is not None:
        release_judge(Path(args.judge), target / "stories-judge")


def save_rounded(model_class: type, export: Path, folder: Path, generation: dict | None = None) -> None:
    """The model with its weights in bfloat16, which load as float32, and `generation` as defaults of `generate`; its
    tokenizer, where it has one, and code beside them."""
    model = model_class.from_pretrained(export)
    if generation:  # checked, as those of a call are
        model.generation_config = model.generation_config.updated(**generation)
    for code in folder.glob("*.py"):
        code.unlink()  # the links of an earlier release: written through, they would be the package itself
    model.to(torch.bfloat16).save_pretrained(folder)
    if (export / "tokenizer_config.json").exists():
        AutoTokenizer.from_pretrained(export).save_pretrained(folder)
        if model_class is AutoModel:  # the judge meets no mask
            read_masks_as_words(folder / "tokenizer.json")
    link_code(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "dtype": "float32"}, indent=2) + "\n", encoding="utf-8")


def read_masks_as_words(file: Path) -> None:
    """Make Llama's tokenizer read text behind a mask as behind a word: it puts a space of its own behind every special
    token, so that `<|mask|> They` would hold two. The mask takes the space before it, as in `add_mask_token`."""
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    if tokenizer["normalizer"] != LLAMA_NORMALIZER:
        return
    tokenizer["normalizer"] = None
    tokenizer["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    for token in tokenizer["added_tokens"]:
        token["lstrip"] |= token["content"] == "<|mask|>"
    file.write_text(json.dumps(tokenizer, indent=2, ensure_ascii=False), encoding="utf-8")


def link_code(folder: Path) -> None:
    """In this repository the code beside weights is the package's own, not a second copy; elsewhere it is a copy."""
    if ROOT not in folder.resolve().parents:
        return
    for copied in folder.glob("*.py"):
        copied.unlink()
        copied.symlink_to(os.path.relpath(ROOT / "fpmgm" / "models" / copied.name, folder.resolve()))


def release_judge(export: Path, folder: Path) -> None:
    """An autoregressive judge, with a card of what its training measured."""
    save_rounded(AutoModelForCausalLM, export, folder)
    found = json.loads((export / "eval_results.json").read_text(encoding="utf-8"))
    write_report(folder / "eval_results.json", found)
    data = ModelCardData(
        language="en", license="apache-2.0", library_name="transformers", pipeline_tag="text-generation",
        tags=["fpmgm", "stories", "judge"], model_name=folder.name,
    )  # fmt: skip
    parameters = AutoModelForCausalLM.from_pretrained(folder).num_parameters()
    card = ModelCard.from_template(
        data, template_path=str(TEMPLATE.with_name("judge_card.md")), name=folder.name, parameters=parameters, **found
    )
    card.save(folder / "README.md")


def describe(plan: Plan, row: Row, study: Path, folder: Path, judge: TruthJudge) -> dict:
    """Everything that the card says."""
    found = json.loads((study / "results" / "rows" / f"{row.name}.json").read_text(encoding="utf-8"))
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    runs = history(plan, row)
    trained = [json.loads((study / "runs" / r.name / "training.json").read_text(encoding="utf-8")) for r in runs]
    read = [run["steps"] * plan.texts_of_step(r) for r, run in zip(runs, trained, strict=True)]
    options = {"batch_size": plan.judging["batch_size"], "num_draws": plan.judging["likelihood_draws"]}
    texts = {
        str(budget): tokenizer.batch_decode(
            model.generate(batch_size=SHOWN_TEXTS, budget=budget, seed=0), skip_special_tokens=True
        )
        for budget in SHOWN_BUDGETS
    }
    own = sweep(
        model, tokenizer, judge, [{"budget": budget} for budget in SHOWN_BUDGETS], seed=1,
        num_samples=plan.judging["num_samples"], batch_size=plan.judging["batch_size"], cache_dir=study / "cache",
    )  # fmt: skip
    judged = [(setting_name(sample), sample) for sample in found["samples"]]
    return {
        "name": folder.name,
        "title": row.title,
        "parameters": model.num_parameters(),
        "rows": [r.name for r in runs],
        "steps": [run["steps"] for run in trained],
        "core_hours": sum(run["steps"] * core_seconds(run) for run in trained) / 3600,
        "tokens": sum(read) * judge.length,
        "truth": {"name": judge.name, "entropy_rate": judge.entropy_rate},
        **judge.likelihood_excess(model, plan.judging["likelihood_texts"], **options),
        "samples": [
            {**{field: sample[field] for field in SAMPLE_FIELDS}, "setting": setting}
            for setting, sample in [*((OWN, sample) for sample in own), *judged]
        ],
        "generation": plan.release[folder.name].get("generation", {}),
        "texts": texts,
        "tokens_of_budget_24": model.generate(batch_size=2, budget=24, seed=0).tolist(),
        "provenance": {"release": provenance("cpu"), "study": found["provenance"]},
    }


def history(plan: Plan, row: Row) -> list[Row]:
    """The rows that a row's weights went through, the first one first; a converted model's are its teacher's."""
    before = plan.before(row)
    return [row] if before is None else [*history(plan, before), row]


def write_card(folder: Path, results: dict) -> None:
    """README.md, from `results` alone."""
    data = ModelCardData(
        language="en",
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["fpmgm", "masked-diffusion", "stories"],
        model_name=results["name"],
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type="synthetic",
                dataset_name="samples of stories260K",
                metric_type="perplexity",
                metric_name="upper bound of the perplexity, per token",
                metric_value=round(math.exp(results["elbo_nats_per_token"]), 3),
            )
        ],
    )
    card = ModelCard.from_template(
        card_data=data, template_path=str(TEMPLATE), **PLACES, config=AutoConfig.from_pretrained(folder), **results
    )  # fmt: skip
    card.save(folder / "README.md")


if __name__ == "__main__":
    main()
