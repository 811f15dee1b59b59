# SPDX-License-Identifier: Apache-2.0
"""What the samplers beyond the paper's do to a trained model: adaptive depth, Anderson, remasking, confidence.

    python recipes/samplers.py --model outputs/fp_mdlm_small --judge_text_files train.txt --judge_blocks 40000

One row of measures for each sampler and budget, judged by a 4-gram model of the text, or by `--judge`.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import fpmgm  # noqa: F401  (registers the models)
from fpmgm.command_line import ModelName, parse_arguments
from fpmgm.evaluation import provenance, sweep
from fpmgm.evaluation.report import table, write_report
from judged_samples import JudgedSamplesArguments, device_of, open_judge, open_model


SAMPLERS = {
    "none": {"reuse": "none"},
    "3sr": {},
    "3sr, tolerance 0.1": {"tolerance": 0.1},
    "3sr, tolerance 0.05": {"tolerance": 0.05},
    "none, Anderson": {"reuse": "none", "solver": "anderson"},
    "3sr, Anderson": {"solver": "anderson"},
    "3sr, remask 0.02": {"remask": 0.02},
    "3sr, remask 0.1": {"remask": 0.1},
    "3sr, confidence": {"order": "confidence"},
}


@dataclass(kw_only=True)
class SamplersArguments(JudgedSamplesArguments):
    """What is compared."""

    model: ModelName = field(metadata={"help": "Folder or hub name."})
    budgets: list[int] = field(default_factory=lambda: [48, 96, 192], metadata={"help": "Block evaluations."})
    num_samples: int = field(default=256, metadata={"help": "Texts a row."})
    output_dir: str = field(default="outputs/samplers", metadata={"help": "Keeps finished batches."})
    output: str = field(default="benchmarks/results/samplers_cpu.json", metadata={"help": "JSON to write."})


def markdown(rows: list[dict], budgets: list[int]) -> str:
    """Perplexity, entropy and block evaluations, a line for each sampler."""
    columns = ["sampler", *(f"{budget}: perplexity, entropy, blocks" for budget in budgets)]
    cells = {name: [name] for name in SAMPLERS}
    for row in rows:
        cells[row["sampler"]].append(
            f"{row['generative_perplexity']:.0f} ± {row['generative_perplexity_standard_error']:.0f}, "
            f"{row['unigram_entropy']:.3f}, {row['block_evaluations']:.0f}"
        )
    return table(columns, cells.values())


def main(argv: list[str] | None = None) -> dict:
    """Sample, judge, write JSON and table; returns what the JSON file holds."""
    (args,) = parse_arguments((SamplersArguments,), __doc__, argv)
    device = device_of(args)
    (model, tokenizer), judge = open_model(args.model, device), open_judge(args, [args.model], device)
    chosen = [(name, {"budget": budget, **SAMPLERS[name]}) for name in SAMPLERS for budget in args.budgets]
    rows = sweep(
        model, tokenizer, judge, [setting for _, setting in chosen], num_samples=args.num_samples, progress_bar=True,
        **args.sampling,
    )  # fmt: skip
    kept = ("budget", "num_steps", "block_evaluations", "generative_perplexity", "unigram_entropy")
    kept += ("generative_perplexity_standard_error", "milliseconds_per_sequence")
    rows = [{"sampler": name} | {key: row[key] for key in kept} for (name, _), row in zip(chosen, rows, strict=True)]
    paths = {"model", "output", "output_dir", "judge", "judge_text_files"}
    arguments = {name: value for name, value in asdict(args).items() if name not in paths}
    result = {"provenance": provenance(device), "arguments": arguments, "model": Path(args.model).name, "rows": rows}
    write_report(args.output, result, markdown(rows, args.budgets))
    print(markdown(rows, args.budgets))
    return result


if __name__ == "__main__":
    main()
