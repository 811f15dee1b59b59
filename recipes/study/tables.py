# SPDX-License-Identifier: Apache-2.0
"""The tables of a study, from its results files."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fpmgm.evaluation import over_seeds, plus_minus
from fpmgm.evaluation.report import table, write_report
from study.plan import Plan, name_of


FIRST = ("iterations_per_step", "reuse", "temperature", "top_p", "order", "num_steps", "iterations", "allocation")
PLAIN = "plain"


def write_tables(plan: Plan, folder: Path, truth: dict, name: str, target: Path) -> list[dict]:
    """Write NAME.json, all rows that are finished, and NAME.md; returns the rows."""
    rows = []
    for row in plan.rows:
        path = folder / "results" / "rows" / f"{row.name}.json"
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8")) | {"title": row.title or row.name, "group": row.group}
            found["training"]["log"] = read_in_tables(found["training"]["log"])
            rows.append(found)
    write_report(target / f"{name}.json", {"truth": truth, "rows": rows}, markdown(truth, rows))
    return rows


def read_in_tables(log: Sequence[dict]) -> list[dict]:
    """The evaluations of a run and its last residual; the whole log lies beside the weights."""
    return [line for line in log if "eval_loss" in line] + [line for line in log if "residual" in line][-1:]


def of_first_seed(rows: Sequence[dict]) -> list[dict]:
    """One run of each row: all but the further seeds of another."""
    names = {row["name"] for row in rows}
    base = {row["name"]: row["name"].removesuffix(f"_seed{row['training_options']['seed']}") for row in rows}
    return [row for row in rows if base[row["name"]] not in names - {row["name"]}]


def markdown(truth: dict, rows: Sequence[dict]) -> str:
    """All tables; ± is one standard error over texts."""
    lines = [
        f"Truth: {truth['name']}, {truth['length']} tokens: entropy rate {truth['entropy_rate']:.4f} ± "
        f"{truth['entropy_rate_standard_error']:.4f} nats ({truth['num_references']} texts), unigram entropy of a "
        f"text {truth['unigram_entropy']:.3f}, rep-4 {truth['repetition_4']:.3f}. Excess: nats per token above it; 0 "
        "is perfect. ± is one standard error over texts, in models of one seed.\n"
    ]
    first = of_first_seed(rows)
    for group in dict.fromkeys(row["group"] for row in first):
        members = [row for row in first if row["group"] == group]
        lines += [f"## {group}\n", training_table(members), iterations_table(members)]
        judged = [row for row in members if "samples" in row]
        if judged:
            lines += [samples_table(judged), equal_entropy_table(judged, truth)]
    lines.append(seeds_table([row for row in rows if "samples" in row], truth))
    return "\n".join(line for line in lines if line)


def training_table(rows: Sequence[dict]) -> str:
    """What each run was and what its likelihood is."""
    columns = ("row", "parameters", "steps", "rate", "seconds of a core per step", "validation loss", "ELBO excess")
    lines = []
    for row in rows:
        training, options = row["training"], row["training_options"]
        validation = [line["eval_loss"] for line in training["log"] if "eval_loss" in line]
        residual = [line["residual"] for line in training["log"] if "residual" in line]
        lines.append([
            row["title"],
            f"{training['parameters']:,}",
            training["steps"],
            f"{options['learning_rate']:g}",
            f"{core_seconds(training):.2f}",
            f"{validation[-1]:.3f}",
            with_error(row, "likelihood_excess") if "likelihood_excess" in row else None,
            f"{residual[-1]:.4f}" if residual else None,
        ])  # fmt: skip
    return table([*columns, "residual"], lines) + "\n"


def core_seconds(training: dict) -> float:
    """Of a step, over those since the run's last start, which are the ones that were timed."""
    return training["cpu_seconds"] / max(1, training["steps"] - training.get("first_step", 0))


def iterations_table(rows: Sequence[dict]) -> str:
    """Excess of the likelihood by fixed-point iterations."""
    rows = [row for row in rows if "likelihood_by_iterations" in row]
    counts = list(dict.fromkeys(n for row in rows for n in row["likelihood_by_iterations"]))
    lines = [
        [row["title"], *(with_error(row["likelihood_by_iterations"][n], "likelihood_excess") for n in counts)]
        for row in rows
    ]
    return table(["ELBO excess by iterations", *counts], lines) + "\n" if rows else ""


def samples_table(rows: Sequence[dict]) -> str:
    """Sample excess by budget, with entropy, repetition and distances."""
    budgets = sorted({sample["budget"] for row in rows for sample in row["samples"]})
    lines = []
    for row in rows:
        for setting in dict.fromkeys(setting_name(sample) for sample in row["samples"]):
            samples = {s["budget"]: s for s in row["samples"] if setting_name(s) == setting}
            title = labelled(row, setting)
            for label, cell in (
                ("excess", lambda s: with_error(s, "excess")),
                ("entropy; rep-4", lambda s: f"{s['unigram_entropy']:.3f}; {s['repetition_4']:.3f}"),
                ("MAUVE; energy (same)", distances),
            ):
                cells = [cell(samples[budget]) if budget in samples else None for budget in budgets]
                lines.append([title, label, *cells])
                title = None
    return table(["row", "measure", *(f"budget {budget}" for budget in budgets)], lines) + "\n"


def seeds_table(rows: Sequence[dict], truth: dict) -> str:
    """Rows that ran with several seeds: means, ± one standard error over seeds."""
    budgets = sorted({sample["budget"] for row in rows for sample in row["samples"]})
    lines = []
    for first in of_first_seed(rows):
        further = [row for row in rows if row["name"] == name_of(first["name"], row["training_options"]["seed"])]
        runs = [first, *(row for row in further if row is not first)]
        if len(runs) > 1:
            lines += seeds_lines(runs, budgets, truth["unigram_entropy"])
    if not lines:
        return ""
    columns = ("mean ± standard error over seeds", "seeds", "ELBO excess", *(f"budget {budget}" for budget in budgets))
    return f"## Seeds\n\n{table(columns, lines)}\n"


def seeds_lines(runs: Sequence[dict], budgets: Sequence[int], entropy: float) -> list[list]:
    """A row's means over its runs: the likelihood, each setting's excess, and the excess at the truth's entropy."""
    by_run = [curves(run) for run in runs]
    lines = [[runs[0]["title"], len(runs), over_seeds([run["likelihood_excess"] for run in runs])]]
    for setting in dict.fromkeys(map(setting_name, runs[0]["samples"])):
        excess = [{s["budget"]: s["excess"] for s in run["samples"] if setting_name(s) == setting} for run in runs]
        lines.append([setting, None, None, *(over_seeds([run.get(b) for run in excess]) for b in budgets)])
    for setting in by_run[0]:
        at_entropy = [
            {b: excess_at([s for s in run[setting] if s["budget"] == b], entropy) for b in budgets} for run in by_run
        ]
        cells = [over_seeds([run[b] for run in at_entropy]) for b in budgets]
        if any(cells):
            lines.append([f"{setting}, at unigram entropy {entropy:.3f}", None, None, *cells])
    return lines


def equal_entropy_table(rows: Sequence[dict], truth: dict) -> str:
    """Sample excess where the unigram entropy is the truth's, linear in entropy between a setting's temperatures."""
    budgets = sorted({sample["budget"] for row in rows for sample in row["samples"]})
    lines = []
    for row in rows:
        for setting, samples in curves(row).items():
            cells = []
            for budget in budgets:
                curve = [sample for sample in samples if sample["budget"] == budget]
                value = excess_at(curve, truth["unigram_entropy"])
                cells.append(None if value is None else f"{value:.3f}")
            if any(cells):
                lines.append([labelled(row, setting), *cells])
    if not lines:
        return ""
    title = f"excess at unigram entropy {truth['unigram_entropy']:.3f}, over temperatures"
    return table([title, *(f"budget {budget}" for budget in budgets)], lines) + "\n"


def curves(row: dict) -> dict[str, list[dict]]:
    """Samples of a row that differ by temperature and budget alone, by what else they set."""
    found: dict[str, list[dict]] = {}
    for sample in row["samples"]:
        found.setdefault(setting_name(sample, "temperature"), []).append(sample)
    return found


def excess_at(curve: Sequence[dict], entropy: float) -> float | None:
    """Excess of a swept row where its entropy is `entropy`; `None` outside of what was swept."""
    if len(curve) < 2:
        return None
    order = sorted(curve, key=lambda sample: sample["unigram_entropy"])
    x = [sample["unigram_entropy"] for sample in order]
    return float(np.interp(entropy, x, [s["excess"] for s in order])) if x[0] <= entropy <= x[-1] else None


def setting_name(sample: dict, without: str = "budget") -> str:
    """What a row of samples sets beside the budget, `without` one of them; `PLAIN` where that is nothing."""
    options = sample["sampling"]["options"]
    names = [name for name in dict.fromkeys((*FIRST, *options)) if name in options and name not in ("budget", without)]
    return ", ".join(f"{name} {options[name]}" for name in names) or PLAIN


def labelled(row: dict, setting: str) -> str:
    """A row in one of its settings; plain it has its title alone."""
    return row["title"] if setting == PLAIN else f"{row['title']}, {setting}"


def with_error(values: dict, name: str) -> str:
    """A number and its standard error."""
    return plus_minus(values[name], values[f"{name}_standard_error"], digits=3)


def distances(sample: dict) -> str:
    """MAUVE, and the energy distance with the one between texts of one kind."""
    low, high = sample["energy_distance_same"]
    mauve = f"{sample['mauve']:.3f}; " if "mauve" in sample else ""
    return f"{mauve}{sample['energy_distance']:.2f} ({low:.2f} to {high:.2f})"
