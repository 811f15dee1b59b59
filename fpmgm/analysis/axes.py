# SPDX-License-Identifier: Apache-2.0
"""What several pictures share: their figure, their axes.

Matplotlib is imported when something is drawn: it takes longer than the arrays beside it, and costs need no picture.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers.utils.import_utils import is_matplotlib_available


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def new_figure(width: float, height: float, **settings: Any) -> "Figure":
    """An empty figure of `width` by `height` inches, whose parts make room for one another unless `settings` differ.

    Raises:
        `ImportError`: without matplotlib.
    """
    if not is_matplotlib_available():
        raise ImportError("fpmgm.analysis needs matplotlib: pip install 'fpmgm[eval]'")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), **{"layout": "constrained", **settings})


def save(figure: "Figure", path: str | Path, dpi: int = 120) -> Path:
    """Write a figure; the suffix is the format."""
    figure.savefig(path, dpi=dpi)
    return Path(path)


def finish(axes: "Axes", legend: bool = True, log: bool = False, whole: bool = False, **settings: Any) -> None:
    """Labels, grid and legend; on a logarithmic axis 1, 2 and 5 of each decade are written out.

    Args:
        axes (`Axes`): With its lines drawn.
        legend (`bool`, defaults to `True`): Whether there is one.
        log (`bool`, defaults to `False`): Whether y is logarithmic.
        whole (`bool`, defaults to `False`): Whether x counts something.
        settings: Of `Axes.set`: `title`, `xlabel`, …
    """
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    axes.set(**settings)
    axes.grid(alpha=0.3)
    if not any(np.isfinite(np.asarray(line.get_ydata(), dtype=float)).any() for line in axes.lines):
        axes.text(0.5, 0.5, "nothing was measured", ha="center", transform=axes.transAxes)
    elif legend:
        axes.legend(fontsize=8)
    if whole:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())


def logarithmic_perplexity(axes: "Axes", label: str) -> None:
    """A logarithmic vertical axis with plain numbers, as many as fit: perplexities may span little."""
    from matplotlib.ticker import LogFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 1)))
    axes.set_ylabel(label)


def logarithmic_values(axes: "Axes", values: Sequence[int]) -> None:
    """A logarithmic horizontal axis that names the values themselves."""
    axes.set_xscale("log")
    axes.set_xticks(values, [str(value) for value in values])
    axes.minorticks_off()


def logarithmic_seconds(axes: "Axes", label: str) -> None:
    """A logarithmic horizontal axis of seconds, with plain numbers."""
    from matplotlib.ticker import LogLocator

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_xlabel(label)


def entropy_axis(axes: "Axes", span: float = 0.1) -> None:
    """A vertical axis of at least `span` nats: small differences must look small."""
    low, high = axes.get_ylim()
    wider = max(0, span - (high - low)) / 2
    axes.set_ylim(low - wider, high + wider)
    axes.set_ylabel("unigram entropy (nats)")
