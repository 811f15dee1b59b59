# SPDX-License-Identifier: Apache-2.0
"""The picture of a study: what samples are worth less than the truth's, against the budget."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from fpmgm.analysis.axes import finish, logarithmic_values
from study.tables import setting_name


def plot_excess(rows: Sequence[dict], path: Path) -> None:
    """One panel per group of judged rows, one line per row and setting, with one standard error."""
    judged = [row for row in rows if "samples" in row]
    groups = list(dict.fromkeys(row["group"] for row in judged))
    if not groups:
        return
    figure = Figure(figsize=(6.5 * len(groups), 6.4), layout="constrained")
    for axes, group in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
        members = [row for row in judged if row["group"] == group]
        for row in members:
            for setting in dict.fromkeys(setting_name(sample) for sample in row["samples"]):
                samples = sorted((s for s in row["samples"] if setting_name(s) == setting), key=lambda s: s["budget"])
                x, y, e = (
                    np.array([s[name] for s in samples]) for name in ("budget", "excess", "excess_standard_error")
                )
                label = ", ".join(filter(None, (row["title"], setting)))
                axes.errorbar(x, y, e, marker="o", capsize=2, label=label)
        budgets = sorted({s["budget"] for row in members for s in row["samples"]})
        finish(
            axes,
            legend=False,
            title=group,
            xlabel="block evaluations",
            ylabel="excess of samples (nats per token); 0 is perfect",
        )
        logarithmic_values(axes, budgets)
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), fontsize=7)  # below: the lines fill the panel
    figure.savefig(path, dpi=110)
