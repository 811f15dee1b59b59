# SPDX-License-Identifier: Apache-2.0
"""What frozen positions do to trained models at equal budgets: how often all positions are computed again, against the
budget, with and without reuse.

    python recipes/freezing.py --model outputs/fp_mdlm outputs/mdlm --truth weights/stories260K_hf

One row of measures for each model, reuse, `refresh_every` and budget, judged by the truth that the models learnt, by a
4-gram model of their text (`--judge_text_files`) or by a language model (`--judge`). It goes on where it was
interrupted, and writes what it has after every row.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import fpmgm  # noqa: F401  (registers the models)
from fpmgm.analysis.axes import new_figure, save
from fpmgm.command_line import ModelName, parse_arguments
from fpmgm.evaluation import provenance, sweep
from fpmgm.evaluation.report import table, write_report
from judged_samples import JudgedSamplesArguments, device_of, open_judge, open_model, shown_perplexity


NEVER = 0  # `refresh_every` of a command line that means None


@dataclass(kw_only=True)
class FreezingArguments(JudgedSamplesArguments):
    """What is compared."""

    model: list[ModelName] = field(metadata={"help": "Folders or hub names."})
    budgets: list[int] = field(default_factory=lambda: [48, 96, 192], metadata={"help": "Block evaluations."})
    refresh_every: list[int] = field(
        default_factory=lambda: [1, 4, NEVER],
        metadata={"help": "Steps; 1: nothing is frozen, 0: all positions are computed at the first step alone."},
    )
    reuse: list[str] = field(default_factory=lambda: ["3sr", "none"], metadata={"help": "none, full, 3sr."})
    num_samples: int = field(default=256, metadata={"help": "Texts a row."})
    output_dir: str = field(default="outputs/freezing", metadata={"help": "Keeps finished batches."})
    output: str = field(default="benchmarks/results/freezing_cpu.json", metadata={"help": "JSON to write."})


KEPT = ("generative_perplexity", "generative_perplexity_standard_error", "unigram_entropy", "num_steps")
KEPT += ("block_evaluations", "excess", "excess_standard_error")  # the last two with a truth


def settings_of(every: int, reuse: str, budget: int) -> dict:
    """Arguments of `generate`."""
    frozen = {} if every == 1 else {"freeze": True, "refresh_every": every or None}
    return {"budget": budget, "reuse": reuse, **frozen}


def named(every: int) -> str:
    """What `refresh_every` does, in words."""
    names = {1: "nothing frozen", NEVER: "frozen, never refreshed"}
    return names.get(every, f"frozen, refreshed every {every}")


def lines_of(rows: list[dict]) -> dict[tuple, list[dict]]:
    """Rows by model, reuse and `refresh_every`."""
    lines = {}
    for row in rows:
        lines.setdefault((row["model"], row["reuse"], row["refresh_every"]), []).append(row)
    return lines


def markdown(rows: list[dict], budgets: list[int]) -> str:
    """Perplexity, entropy and steps, a line for each model, reuse and `refresh_every`."""
    lines = []
    for (model, reuse, every), found in lines_of(rows).items():
        cells = [f"{shown_perplexity(row)}, {row['unigram_entropy']:.3f}, {row['num_steps']}" for row in found]
        lines.append([model, reuse, named(every), *cells])
    return table(["model", "reuse", "positions", *(f"{b}: perplexity, entropy, steps" for b in budgets)], lines)


def draw(rows: list[dict], path: Path) -> None:
    """Perplexity with its standard error against the budget, a panel for each model and reuse."""
    lines = lines_of(rows)
    panels = list(dict.fromkeys(key[:2] for key in lines))
    figure = new_figure(4.2 * len(panels), 3.6)
    for place, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), place, xscale="log")
        for (model, reuse, every), found in lines.items():
            if (model, reuse) == panel:
                x, y = [row["budget"] for row in found], [row["generative_perplexity"] for row in found]
                error = [row["generative_perplexity_standard_error"] for row in found]
                axes.errorbar(x, y, error, marker="o", markersize=4, capsize=2, label=named(every))
        budgets = sorted({row["budget"] for row in rows})
        axes.set_xticks(budgets, [str(budget) for budget in budgets])
        axes.minorticks_off()
        axes.set_title(f"{panel[0]}, reuse {panel[1]}", fontsize=10)
        axes.set_xlabel("budget (block evaluations per text)")
        axes.grid(alpha=0.3)
        if place == 1:
            axes.set_ylabel("generative perplexity")
            axes.legend(fontsize=8)
    save(figure, path, dpi=160)


def main(argv: list[str] | None = None) -> dict:
    """Sample, judge, write JSON and table; returns what the JSON file holds."""
    (args,) = parse_arguments((FreezingArguments,), __doc__, argv)
    device, rows = device_of(args), []
    judge = open_judge(args, args.model, device)
    paths = {"model", "output", "output_dir", "judge", "judge_text_files", "truth"}
    arguments = {name: value for name, value in asdict(args).items() if name not in paths}
    result = {"provenance": provenance(device), "arguments": arguments, "judge": judge.name, "rows": rows}
    for path in args.model:
        model, tokenizer = open_model(path, device)
        # A model without fixed-point layers has nothing to reuse.
        reuses = args.reuse if model.config.num_fixed_point_layers else ["none"]
        for reuse in reuses:
            for every in args.refresh_every:
                settings = [settings_of(every, reuse, budget) for budget in args.budgets]
                options = {"num_samples": args.num_samples, "progress_bar": True, **args.sampling}
                for setting, row in zip(settings, sweep(model, tokenizer, judge, settings, **options), strict=True):
                    found = {"model": Path(path).name, "reuse": reuse, "refresh_every": every}
                    found |= {"budget": setting["budget"]}
                    rows.append(found | {name: row[name] for name in KEPT if name in row})
                write_report(args.output, result, markdown(rows, args.budgets))
    draw(rows, Path(args.output).with_suffix(".png"))
    print(markdown(rows, args.budgets))
    return result


if __name__ == "__main__":
    main()
