# SPDX-License-Identifier: Apache-2.0
"""What the axes of several pictures share."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogFormatter, LogLocator, MaxNLocator, NullLocator


def finish(axes: Axes, legend: bool = True, log: bool = False, whole: bool = False, **settings: Any) -> None:
    """Labels, grid and legend; on a logarithmic axis 1, 2 and 5 of each decade are written out.

    Args:
        axes (`Axes`): With its lines drawn.
        legend (`bool`, defaults to `True`): Whether there is one.
        log (`bool`, defaults to `False`): Whether y is logarithmic.
        whole (`bool`, defaults to `False`): Whether x counts something.
        settings: Of `Axes.set`: `title`, `xlabel`, …
    """
    axes.set(**settings)
    axes.grid(alpha=0.3)
    if not any(np.isfinite(line.get_ydata()).any() for line in axes.lines):
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


def logarithmic_perplexity(axes: Axes, label: str) -> None:
    """A logarithmic vertical axis with plain numbers, as many as fit: perplexities may span little."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 1)))
    axes.set_ylabel(label)


def logarithmic_values(axes: Axes, values: Sequence[int]) -> None:
    """A logarithmic horizontal axis that names the values themselves."""
    axes.set_xscale("log")
    axes.set_xticks(values, [str(value) for value in values])
    axes.minorticks_off()


def logarithmic_seconds(axes: Axes, label: str) -> None:
    """A logarithmic horizontal axis of seconds, with plain numbers."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_xlabel(label)


def entropy_axis(axes: Axes, span: float = 0.1) -> None:
    """A vertical axis of at least `span` nats: small differences must look small."""
    low, high = axes.get_ylim()
    wider = max(0, span - (high - low)) / 2
    axes.set_ylim(low - wider, high + wider)
    axes.set_ylabel("unigram entropy (nats)")
