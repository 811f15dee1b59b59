# SPDX-License-Identifier: Apache-2.0
"""A picture of perplexity against entropy: one line per model and budget."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .axes import logarithmic_perplexity


def plot_frontier(
    curves: dict[str, list[dict[str, Any]]],
    path: str | Path,
    judge: str,
    matched: list[float] | None = None,
) -> Path:
    """Draw swept models; lower and further right is better.

    Args:
        curves (`dict[str, list[dict]]`): For each line its points, with `entropy`, `perplexity` and `label`.
        path (`str` or `Path`): Picture to write; the suffix is the format.
        judge (`str`): Name of the judge, for the axis.
        matched (`list[float]`, *optional*): Entropies where the models are compared, drawn as dotted lines. `None`:
            none.

    Returns:
        `Path` of the picture.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, points in curves.items():
        points = sorted(points, key=lambda point: point["entropy"])
        axes.plot([p["entropy"] for p in points], [p["perplexity"] for p in points], marker="o", label=name)
        for point in points:
            place = (point["entropy"], point["perplexity"])
            axes.annotate(point["label"], place, textcoords="offset points", xytext=(5, -8), fontsize=7)
    for entropy in matched or []:
        axes.axvline(entropy, color="#999999", linewidth=0.8, linestyle=":", zorder=0)
    axes.margins(x=0.2)  # the labels stand on the right of their points
    axes.grid(alpha=0.3, which="both")
    axes.set_xlabel("unigram entropy (nats)")
    logarithmic_perplexity(axes, f"generative perplexity ({judge})")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    return Path(path)
