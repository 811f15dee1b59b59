# SPDX-License-Identifier: Apache-2.0
"""Axes that several pictures share."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import LogFormatter, LogLocator, StrMethodFormatter


def logarithmic_perplexity(axes: Axes, label: str) -> None:
    """A logarithmic vertical axis with plain numbers instead of powers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
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
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.minorticks_off()
    axes.set_xlabel(label)


def entropy_axis(axes: Axes, span: float = 0.1) -> None:
    """A vertical axis of at least `span` nats: small differences must look small."""
    low, high = axes.get_ylim()
    wider = max(0, span - (high - low)) / 2
    axes.set_ylim(low - wider, high + wider)
    axes.set_ylabel("unigram entropy (nats)")
