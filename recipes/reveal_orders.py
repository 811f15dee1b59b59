# SPDX-License-Identifier: Apache-2.0
"""The orders of revealing: what a trained model writes in each, and what that costs on average.

    python recipes/reveal_orders.py --model outputs/fp_mdlm --truth worlds/stories260K --truth_texts 2000

Orders of a fixed pace spend each budget, at one iteration a step. Those that adapt may spend the largest budget and
end where they are certain, so that their bounds say what they cost; the first of them is also held to the smaller
budgets, where the even share that each step must reveal decides. Judged by the truth, or by the judges of
recipes/budget_report.py.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import fpmgm  # noqa: F401  (registers the models)
from fpmgm.command_line import ModelName, parse_arguments
from fpmgm.evaluation import TruthJudge, provenance, sweep, unigram_entropy
from fpmgm.evaluation.report import table, write_report
from judged_samples import JudgedSamplesArguments, device_of, open_judge, open_model


PACED = {
    "ancestral": {"order": "ancestral"},
    "halton": {"order": "halton"},
    "confidence": {"order": "confidence"},
    "ancestral, blocks of 32": {"order": "ancestral", "block_length": 32},
    "halton, blocks of 32": {"order": "halton", "block_length": 32},
}
ADAPTIVE = {
    "entropy": ("entropy_bound", (10.0, 1.0, 30.0, 60.0, 120.0)),
    "threshold": ("confidence_threshold", (0.9, 0.5, 0.3, 0.2)),
    "margin": ("margin_threshold", (0.8, 0.3, 0.1)),
}
KEPT = ("excess", "excess_standard_error", "generative_perplexity", "generative_perplexity_standard_error")
KEPT += ("unigram_entropy", "repetition_4", "num_steps", "tokens_per_step", "block_evaluations")
KEPT += ("mean_block_evaluations", "sample")


@dataclass(kw_only=True)
class RevealOrdersArguments(JudgedSamplesArguments):
    """What is compared."""

    model: ModelName = field(metadata={"help": "Folder or hub name."})
    orders: list[str] = field(default_factory=lambda: list(ADAPTIVE), metadata={"help": "Orders that adapt."})
    budgets: list[int] = field(default_factory=lambda: [48, 96, 192, 384], metadata={"help": "Block evaluations."})
    num_samples: int = field(default=64, metadata={"help": "Texts a row."})
    output_dir: str = field(default="outputs/reveal_orders", metadata={"help": "Keeps finished batches."})
    output: str = field(default="reveal_orders", metadata={"help": "Written with .json and .md."})

    def __post_init__(self):
        super().__post_init__()
        if not self.orders or set(self.orders) - set(ADAPTIVE):
            raise ValueError(f"`orders`={self.orders} must be some of {list(ADAPTIVE)}.")


def settings(model_config, budgets: list[int], orders: list[str]) -> list[tuple[str, dict]]:
    """A name for each row, and its arguments of `generate`."""
    step = model_config.num_pre_layers + model_config.num_fixed_point_layers + model_config.num_post_layers
    most = {budget: {"budget": budget, "num_steps": budget // step} for budget in sorted(budgets)}
    rows = [(name, limits | options) for name, options in PACED.items() for limits in most.values()]
    adaptive = {order: ADAPTIVE[order] for order in orders}
    for order, (bound, values) in adaptive.items():
        rows += [(f"{order} {value:g}", most[max(most)] | {"order": order, bound: value}) for value in values]
    order, (bound, (value, *_)) = next(iter(adaptive.items()))
    return rows + [(f"{order} {value:g}", most[b] | {"order": order, bound: value}) for b in most if b != max(most)]


def main(argv: list[str] | None = None) -> dict:
    """Sample, judge, write JSON and table; returns what the JSON file holds."""
    (args,) = parse_arguments((RevealOrdersArguments,), __doc__, argv)
    device = device_of(args)
    (model, tokenizer), judge = open_model(args.model, device), open_judge(args, [args.model], device)
    chosen = settings(model.config, args.budgets, args.orders)
    measured = sweep(
        model, tokenizer, judge, [setting for _, setting in chosen], num_samples=args.num_samples, progress_bar=True,
        **args.sampling,
    )  # fmt: skip
    rows = [
        {"order": name, "setting": setting} | {key: row[key] for key in KEPT if key in row}
        for (name, setting), row in zip(chosen, measured, strict=True)
    ]
    paths = {"model", "truth", "output", "output_dir", "judge", "judge_text_files"}
    arguments = {name: value for name, value in asdict(args).items() if name not in paths}
    truth = None
    if isinstance(judge, TruthJudge):
        truth = {"entropy_rate": judge.entropy_rate, "unigram_entropy": unigram_entropy(judge.references.tolist())}
    result = {
        "provenance": provenance(device), "arguments": arguments, "model": Path(args.model).name, "truth": truth,
        "rows": rows,
    }  # fmt: skip
    write_report(f"{args.output}.json", result, markdown(result))
    print(markdown(result))
    return result


def markdown(result: dict) -> str:
    """A line for each order and budget."""
    lines = []
    for row in result["rows"]:
        judged = "excess" if "excess" in row else "generative_perplexity"
        lines.append(
            [
                row["order"],
                f"{row['mean_block_evaluations']:.1f}",
                row["setting"]["budget"],
                f"{row[judged]:.3f} ± {row[f'{judged}_standard_error']:.3f}",
                f"{row['unigram_entropy']:.3f}",
                f"{100 * row['repetition_4']:.1f} %",
                f"{row['tokens_per_step']:.2f}",
            ]
        )
    judged = "excess, nats" if "excess" in result["rows"][0] else "perplexity"
    columns = ["order", "block evaluations", "allowed", judged, "unigram entropy", "4-grams repeated", "tokens a step"]
    note = f"{result['model']}, {result['arguments']['num_samples']} texts a row; block evaluations are means."
    if result["truth"] is not None:
        note += f" Unigram entropy of the truth: {result['truth']['unigram_entropy']:.3f}."
    return f"{table(columns, lines)}\n\n{note}\n"


if __name__ == "__main__":
    main()
