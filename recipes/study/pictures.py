# SPDX-License-Identifier: Apache-2.0
"""The picture of a study: what samples are worth less than the truth's, against how varied they are."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fpmgm.analysis.axes import finish, new_figure, save
from study.tables import curves, labelled


def plot_excess(rows: Sequence[dict], truth_entropy: float, path: Path) -> None:
    """A line of panels for each group of judged rows, a panel for each budget: excess against unigram entropy, with
    one standard error. A line goes through the temperatures of a row and setting (settings at one temperature are in
    the tables alone); the truth's own texts lie at the dashed line's foot."""
    judged = [row for row in rows if "samples" in row]
    lines = {}  # of each group: what it is called, and its samples
    for row in judged:
        for setting, samples in curves(row).items():
            if len(samples) > len({sample["budget"] for sample in samples}):
                lines.setdefault(row["group"], []).append((labelled(row, setting), samples))
    drawn = [sample for members in lines.values() for _, samples in members for sample in samples]
    budgets = sorted({sample["budget"] for sample in drawn})
    if not lines:
        return
    figure = new_figure(4 * len(budgets) + 4, 3.6 * len(lines))
    panels = figure.subplots(len(lines), len(budgets) + 1, squeeze=False, sharey="row")
    for (*line, legend), (group, members) in zip(panels, lines.items(), strict=True):
        for axes, budget in zip(line, budgets, strict=True):
            for place, (label, samples) in enumerate(members):
                names = ("unigram_entropy", "excess", "excess_standard_error")
                points = sorted(tuple(s[name] for name in names) for s in samples if s["budget"] == budget)
                if points:
                    look = {"color": f"C{place % 10}", "marker": "os^Dv"[place // 10 % 5], "capsize": 2}
                    axes.errorbar(*np.array(points).T, **look, label=label)
            if not axes.has_data():
                axes.set_visible(False)
                continue
            finish(axes, legend=False, title=f"{group}, budget {budget}", xlabel="unigram entropy of a text (nats)")
            axes.axvline(truth_entropy, color="gray", linestyle="--", linewidth=1)
            axes.plot(truth_entropy, 0, "*", color="gray", markersize=10, clip_on=False)
        line[0].set_ylabel("excess (nats per token)")
        line[0].set_ylim(bottom=0)
        found = {label: mark for axes in line for mark, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        legend.set_axis_off()
        legend.legend(found.values(), found, loc="upper left", fontsize=7)
    save(figure, path, dpi=110)
