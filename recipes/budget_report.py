# SPDX-License-Identifier: Apache-2.0
"""The budget report: perplexity, entropy and cost of a checkpoint's samples under budgets, in the paper's layout.

    python recipes/budget_report.py --model org/cofre-owt --budgets 96 192 384 768 --reuse none full 3sr
    python recipes/budget_report.py --model quickstart/fp_mdlm --judge judges/SmolLM2-135M.gguf --num_samples 64
    torchrun --nproc_per_node 8 recipes/budget_report.py --model org/cofre-owt --num_samples 5000

Writes NAME.json (with provenance) and NAME.md to `output_dir`, for each model. The same command goes on where it was
interrupted. `--text_files` scores existing texts beside the samples, such as human ones.
"""

from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path

from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import fpmgm  # noqa: F401  (registers the models)
from fpmgm.command_line import LocalPath, ModelName, parse_arguments
from fpmgm.evaluation import AnyJudge, budget_table, evaluate_budgets, provenance
from fpmgm.evaluation.budget_report import under_budgets
from fpmgm.evaluation.report import short_names, write_report
from judged_samples import (
    JudgedSamplesArguments,
    check_settings,
    cut,
    device_of,
    markdown,
    measure_text,
    open_judge,
    open_model,
)


@dataclass(kw_only=True)
class EvaluationArguments(JudgedSamplesArguments):
    """What to sample and how to judge it; an option of sampling left out takes the checkpoint's default."""

    model: list[ModelName] = field(metadata={"help": "Folders or hub names."})
    budgets: list[int] = field(default_factory=lambda: [96, 192, 384, 768], metadata={"help": "Block evaluations."})
    reuse: list[str] | None = field(default=None, metadata={"help": "none, full, 3sr; null: the checkpoint's."})
    top_p: list[float] | None = field(default=None, metadata={"help": "Nucleus sampling; 1: all tokens."})
    temperature: float | None = field(default=None, metadata={"help": "Divides the logits."})
    num_steps: int | None = field(default=None, metadata={"help": "Denoising steps; null: from the budget."})
    allocation: str | None = field(default=None, metadata={"help": "fixed, decreasing, increasing, cosine, ..."})
    num_samples: int = field(default=1024, metadata={"help": "Texts per row; the paper's MAUVE takes 5000."})
    reference_files: list[LocalPath] | None = field(default=None, metadata={"help": "Human text: gives MAUVE."})
    text_files: list[LocalPath] | None = field(default=None, metadata={"help": "Text to score like samples."})


def main(argv: list[str] | None = None) -> dict[str, dict]:
    """Report on each model; returns what the JSON files hold."""
    (args,) = parse_arguments((EvaluationArguments,), __doc__, argv)
    device, folder, names = device_of(args), Path(args.output_dir), short_names("model", args.model)
    check_settings(args.model, lambda model: under_budgets(args.budgets, settings(args, model)), args.length)
    judge = open_judge(args, args.model, device)
    reports = {}
    for name, path in zip(names, args.model, strict=True):
        model, tokenizer = open_model(path, device)
        reports[name] = report(model, tokenizer, judge, args)
        reports[name] |= {"name": name, "arguments": asdict(args), "provenance": provenance(device)}
        if PartialState().is_main_process:
            table = budget_table(reports[name]["rows"], name)
            text = markdown(reports[name], f"{table}\n{model.num_parameters():,} parameters.\n")
            write_report(folder / f"{name}.json", reports[name], text)
            print(f"\n{text}\n{folder / name}.json, {folder / name}.md")
    return reports


def report(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, judge: AnyJudge, args) -> dict:
    """Rows of samples, and of the texts given."""
    length = args.length or model.config.max_position_embeddings
    references = None
    if args.reference_files is not None:
        blocks = cut(args.reference_files, tokenizer, length, args.num_samples, "reference_files", "num_samples")
        references = tokenizer.batch_decode(blocks, skip_special_tokens=True)
    rows = evaluate_budgets(
        model, tokenizer, judge, args.budgets, settings(args, model), num_samples=args.num_samples,
        references=references, **args.sampling,
    )  # fmt: skip
    found = {"parameters": model.num_parameters(), "rows": rows}
    if args.text_files is not None:
        found["text"] = measure_text(args, args.text_files, tokenizer, judge, length, args.num_samples)
    return found


def settings(args: EvaluationArguments, model: PreTrainedModel) -> list[dict]:
    """Options of `generate` beside the budget: every reuse with every top_p, and what is the same in all rows."""
    same = {name: getattr(args, name) for name in ("temperature", "num_steps", "allocation")}
    same = {name: value for name, value in same.items() if value is not None}
    # A model without fixed-point layers has nothing to reuse, nor has a looped one: one row says it all.
    reuses = args.reuse if model.config.can_reuse else None
    choices = [[("reuse", value) for value in reuses or []], [("top_p", value) for value in args.top_p or []]]
    return [{**dict(pairs), **same} for pairs in product(*filter(None, choices))]


if __name__ == "__main__":
    main()
