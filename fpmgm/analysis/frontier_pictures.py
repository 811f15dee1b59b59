# SPDX-License-Identifier: Apache-2.0
"""A picture of perplexity against entropy: one line per model and budget."""

from pathlib import Path
from typing import Any

from .axes import logarithmic_perplexity, new_figure, save


def plot_frontier(
    curves: dict[str, list[dict[str, Any]]],
    path: str | Path,
    judge: str,
    matched: list[float] | None = None,
) -> Path:
    """Draw swept models; lower and further right is better.

    Args:
        curves (`dict[str, list[dict]]`): For each line its points, with `entropy`, `perplexity`, `label`, whose last
            word stands in the point, and if known `standard_error` of the perplexity.
        path (`str` or `Path`): Picture to write; the suffix is the format.
        judge (`str`): Name of the judge, for the axis.
        matched (`list[float]`, *optional*): Entropies where the models are compared, drawn as dotted lines. `None`:
            none.

    Returns:
        `Path` of the picture.
    """
    figure = new_figure(7, 4.8)
    axes = figure.add_subplot()
    swept = {}  # what the numbers in the points are
    for color, (name, points) in enumerate(curves.items()):
        points = sorted(points, key=lambda point: point["entropy"])
        x, y = [p["entropy"] for p in points], [p["perplexity"] for p in points]
        errors = [p.get("standard_error") or 0 for p in points]
        axes.errorbar(x, y, errors, color=f"C{color}", linewidth=1.4, capsize=2, label=name)
        axes.plot(x, y, "o", markersize=19, markerfacecolor="white", markeredgecolor=f"C{color}", zorder=3)
        for point in points:
            *words, number = point["label"].split(" ")
            swept[" ".join(words)] = None
            place = (point["entropy"], point["perplexity"])
            axes.annotate(number, place, ha="center", va="center", fontsize=8, color=f"C{color}", zorder=4)
    for entropy in matched or []:
        label = "compared at" if entropy == matched[0] else None
        axes.axvline(entropy, color="#777777", linewidth=0.9, linestyle=":", zorder=0, label=label)
    axes.margins(0.08)
    axes.grid(alpha=0.3, which="both")
    axes.set_xlabel("unigram entropy (nats); further right: more varied")
    logarithmic_perplexity(axes, f"generative perplexity; lower is better\n({judge})")
    axes.legend(fontsize=8, title=f"in the points: {', '.join(filter(None, swept))}", title_fontsize=8)
    return save(figure, path)
