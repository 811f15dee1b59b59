# SPDX-License-Identifier: Apache-2.0
"""Perplexity against entropy: sweep temperature or top-p for several models and budgets, compare at equal entropy.

    python recipes/frontier.py --model org/mdlm-owt org/cofre-owt --budgets 96 384 --temperature 0.7 0.8 0.9 1.0
    python recipes/frontier.py --model org/mdlm-owt org/cofre-owt --budgets 96 --top_p 0.8 0.9 0.95 1.0

Writes frontier.json (with provenance), frontier.md and frontier.png to `output_dir`. The same command goes on where it
was interrupted.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from accelerate import PartialState

import fpmgm  # noqa: F401  (registers the models)
from fpmgm.analysis import plot_frontier
from fpmgm.command_line import ModelName, parse_arguments
from fpmgm.evaluation import (
    common_entropies,
    evaluate_budgets,
    perplexity_at_entropy,
    plus_minus,
    provenance,
    standard_error_at_entropy,
    undominated,
)
from fpmgm.evaluation.budget_report import under_budgets
from fpmgm.evaluation.report import short_names, table, write_report
from judged_samples import JudgedSamplesArguments, check_settings, device_of, open_judge, open_model


@dataclass(kw_only=True)
class FrontierArguments(JudgedSamplesArguments):
    """What to sweep; other options of sampling are the checkpoints' defaults."""

    model: list[ModelName] = field(metadata={"help": "Folders or hub names."})
    budgets: list[int] = field(default_factory=lambda: [96], metadata={"help": "Block evaluations."})
    temperature: list[float] | None = field(default=None, metadata={"help": "Temperatures to sweep."})
    top_p: list[float] | None = field(default=None, metadata={"help": "Nucleus probabilities to sweep, instead."})
    reuse: str | None = field(default=None, metadata={"help": "none, full or 3sr; null: the checkpoint's."})
    entropies: list[float] | None = field(
        default=None, metadata={"help": "Where to compare; null: three over the range that all reach."}
    )
    num_samples: int = field(default=256, metadata={"help": "Texts per point."})


def main(argv: list[str] | None = None) -> dict:
    """Sweep, compare, draw; returns what the JSON file holds."""
    (args,) = parse_arguments((FrontierArguments,), __doc__, argv)
    if (args.temperature is None) == (args.top_p is None):
        raise ValueError("give `temperature` or `top_p`, one of them: the values to sweep.")
    device, folder, titles = device_of(args), Path(args.output_dir), short_names("model", args.model)
    check_settings(args.model, lambda model: under_budgets(args.budgets, settings(args)), args.length)
    judge = open_judge(args, args.model, device)
    curves: dict[str, list[dict]] = {}
    for title, path in zip(titles, args.model, strict=True):
        model, tokenizer = open_model(path, device)
        rows = evaluate_budgets(
            model, tokenizer, judge, args.budgets, settings(args), num_samples=args.num_samples, **args.sampling
        )
        for row in rows:
            curves.setdefault(f"{title}, budget {row['budget']}", []).append(point(row))
    entropies = args.entropies or common_entropies([[p["entropy"] for p in points] for points in curves.values()])
    found = {
        "curves": curves,
        "undominated": {name: [p["label"] for p in undominated(points)] for name, points in curves.items()},
        "entropies": entropies,
        "perplexity_at_entropy": {name: [at(points, h) for h in entropies] for name, points in curves.items()},
        "standard_error_at_entropy": {name: [error_at(line, h) for h in entropies] for name, line in curves.items()},
        "judge": judge.name,
        "arguments": asdict(args),
        "provenance": provenance(device),
    }
    if PartialState().is_main_process:
        write_report(folder / "frontier.json", found, markdown(found))
        plot_frontier(curves, folder / "frontier.png", judge.name, entropies)
        print(f"\n{markdown(found)}\n{folder / 'frontier.png'}")
    return found


def settings(args: FrontierArguments) -> list[dict]:
    """Options of `generate` beside the budget, one setting per point."""
    swept = "temperature" if args.temperature is not None else "top_p"
    same = {} if args.reuse is None else {"reuse": args.reuse}
    return [{**same, swept: value} for value in getattr(args, swept)]


def point(row: dict) -> dict:
    """A point of a line, with the row it is made of."""
    label = ", ".join(f"{name} {row[name]}" for name in ("temperature", "top_p") if name in row)
    return {
        "label": label,
        "entropy": row["unigram_entropy"],
        "perplexity": row["generative_perplexity"],
        "standard_error": row["generative_perplexity_standard_error"],
        "row": row,
    }


def at(points: list[dict], entropy: float) -> float | None:
    """Perplexity of a line where its entropy is `entropy`."""
    return perplexity_at_entropy([p["entropy"] for p in points], [p["perplexity"] for p in points], entropy)


def error_at(points: list[dict], entropy: float) -> float | None:
    """The standard error of [`at`], where the points have one."""
    columns = ([p[name] for p in points] for name in ("entropy", "perplexity", "standard_error"))
    return None if any(p["standard_error"] is None for p in points) else standard_error_at_entropy(*columns, entropy)


def markdown(found: dict) -> str:
    """Perplexity at equal entropy."""
    rows = []
    for name, values in found["perplexity_at_entropy"].items():
        errors = found["standard_error_at_entropy"][name]
        rows.append([name, *(None if v is None else plus_minus(v, e) for v, e in zip(values, errors, strict=True))])
    return (
        f"{table(['model', *(f'entropy {entropy:.3f}' for entropy in found['entropies'])], rows)}\n\n"
        f"Generative perplexity ± standard error over texts, under {found['judge']} (mean over texts first, "
        "equation 4), log-linear in entropy between the points of a sweep; empty where a sweep does not reach that "
        "entropy.\n"
    )


if __name__ == "__main__":
    main()
