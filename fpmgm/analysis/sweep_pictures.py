# SPDX-License-Identifier: Apache-2.0
"""Pictures of sweeps over sampling: plans, allocations, γ, checkpoints, latency (Figures 12 to 15, Tables 4 and 5).

They draw rows of `fpmgm.evaluation.sweep`; what a row sets is `row["sampling"]["options"]`.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .axes import entropy_axis, logarithmic_perplexity, logarithmic_seconds, logarithmic_values, new_figure, save


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage


PERPLEXITY, ENTROPY = "generative_perplexity", "unigram_entropy"
TITLES = {PERPLEXITY: "generative perplexity", ENTROPY: "unigram entropy (nats)"}
COLORS = {PERPLEXITY: ("Blues", 0.6, 0), ENTROPY: ("Greens", 0, 0.6)}  # light: black numbers are read on them
BARS = {PERPLEXITY: "× the lowest perplexity (dark: better)", ENTROPY: "nats (dark: more varied words)"}
LEAST_SPAN = {PERPLEXITY: 0.2, ENTROPY: 0.1}  # of the colours, in nats: small differences must look small
FRAME = "#e07b1f"
WITHIN_ERROR = "framed: the lowest, and what lies within two standard errors of it"
MARKERS = "osD^vP*X"


def plot_plans(rows: list[dict[str, Any]], config, path: str | Path, judge: str, budgets: list[int]) -> Path:
    """Heat maps over steps and iterations per step, with lines of equal budget (Figure 13).

    Args:
        rows (`list[dict]`): Rows that set `num_steps` and `iterations`, a whole number. A cell without a row is blank.
        config: The model's configuration with the three layer counts.
        path (`str` or `Path`): Picture to write; the suffix is the format.
        judge (`str`): Name of the judge, for the title.
        budgets (`list[int]`): Block evaluations of the lines.

    Returns:
        `Path` of the picture.
    """
    steps, iterations = _values(rows, "num_steps"), _values(rows, "iterations")
    figure = new_figure(7, 2.2 + 0.8 * len(steps))
    for axes, measure in zip(figure.subplots(2, 1, sharex=True), TITLES, strict=True):
        image = _heat_map(axes, rows, measure, "num_steps", "iterations", below=0.25)  # a line may cross the middle
        for budget in budgets:
            _budget_line(axes, config, steps, iterations, budget)
        axes.set(ylabel="denoising steps", xlabel="fixed-point iterations per step" if measure == ENTROPY else "")
        _share_colors(figure, [image], [axes], measure, location="right")
    figure.suptitle(f"judge: {judge}; {WITHIN_ERROR};\ndashed: equal budgets of block evaluations", fontsize=9)
    return save(figure, path)


def plot_allocations(rows: list[dict[str, Any]], path: str | Path, judge: str) -> Path:
    """Perplexity and entropy against the budget: a line per allocation, a column per reuse (Figure 14).

    Args:
        rows (`list[dict]`): Rows that set `budget`, `allocation` and `reuse`.
        path (`str` or `Path`): Picture to write; the suffix is the format.
        judge (`str`): Name of the judge, for the axis.

    Returns:
        `Path` of the picture.
    """
    reuses, allocations = _values(rows, "reuse"), _values(rows, "allocation")
    figure = new_figure(1 + 3.7 * len(reuses), 6)
    panels = figure.subplots(2, len(reuses), sharex=True, sharey="row", squeeze=False, height_ratios=[2, 1])
    for column, reuse in enumerate(reuses):
        for place, allocation in enumerate(allocations):
            line = sorted(_where(rows, reuse=reuse, allocation=allocation), key=lambda row: _options(row)["budget"])
            aside = 1.03 ** (place - (len(allocations) - 1) / 2)  # lines that agree stand beside each other
            budgets = [aside * _options(row)["budget"] for row in line]
            for axes, measure in zip(panels[:, column], TITLES, strict=True):
                _line(axes, budgets, line, measure, place, label=allocation)
        panels[0, column].set_title(f"reuse {reuse}", fontsize=10)
        logarithmic_values(panels[1, column], _values(rows, "budget"))
        panels[1, column].set_xlabel("budget (block evaluations)")
    _label_rows(panels, judge)
    panels[0, -1].legend(fontsize=8, title="allocation", title_fontsize=8)
    return save(figure, path)


def plot_gammas(rows: list[dict[str, Any]], path: str | Path, judge: str) -> Path:
    """Heat maps over the γ of masked and of revealed tokens: a row per budget (Tables 4 and 5).

    Args:
        rows (`list[dict]`): Rows that set `budget`, `gamma_masked`, `gamma_changed` and `gamma_unchanged`; each of the
            latter has rows of its own.
        path (`str` or `Path`): Picture to write; the suffix is the format.
        judge (`str`): Name of the judge, for the title.

    Returns:
        `Path` of the picture.
    """
    settings = [(b, g) for g in _values(rows, "gamma_unchanged") for b in _values(rows, "budget")]
    height = 1.1 + 0.34 * len(_values(rows, "gamma_masked"))
    figure = new_figure(7, 1.6 + height * len(settings))
    panels = figure.subplots(len(settings), 2, sharex=True, sharey=True, squeeze=False)
    images = {measure: [] for measure in TITLES}
    for (budget, unchanged), pair in zip(settings, panels, strict=True):
        cells = _where(rows, budget=budget, gamma_unchanged=unchanged)
        for axes, measure in zip(pair, TITLES, strict=True):
            images[measure].append(_heat_map(axes, cells, measure, "gamma_masked", "gamma_changed"))
            axes.set_title(f"{TITLES[measure]}\nbudget {budget}, γ unchanged {unchanged:g}", fontsize=9)
    for column, measure in enumerate(TITLES):
        panels[-1, column].set_xlabel("γ of revealed tokens")
        _share_colors(figure, images[measure], list(panels[:, column]), measure, location="bottom")
    figure.supylabel("γ of masked tokens, from all masked to all visible", fontsize=9)
    figure.suptitle(f"judge: {judge}\n{WITHIN_ERROR}", fontsize=9)
    return save(figure, path)


def plot_checkpoints(
    rows: list[dict[str, Any]],
    path: str | Path,
    judge: str,
    validation: list[dict[str, float]] | None = None,
    increase: float | None = 0.15,
) -> Path:
    """Perplexity and entropy of samples over training, a line per budget, and validation perplexity (Figure 12).

    Args:
        rows (`list[dict]`): Rows that set `budget`, with their optimizer step as `step`.
        path (`str` or `Path`): Picture to write; the suffix is the format.
        judge (`str`): Name of the judge, for the axis.
        validation (`list[dict]`, *optional*): `step` and `perplexity` on held-out text. `None`: not drawn.
        increase (`float`, *optional*, defaults to 0.15): Drawn above the first validation perplexity, where
            consistency training stops. `None`: not drawn.

    Returns:
        `Path` of the picture.
    """
    count = 3 if validation else 2
    figure = new_figure(4 * count, 3.8)
    panels = figure.subplots(1, count)
    for place, budget in enumerate(_values(rows, "budget")):
        line = sorted(_where(rows, budget=budget), key=lambda row: row["step"])
        for axes, measure in zip(panels, TITLES, strict=False):
            _line(axes, [row["step"] for row in line], line, measure, place, label=f"budget {budget}")
    logarithmic_perplexity(panels[0], f"generative perplexity\n({judge})")
    entropy_axis(panels[1])
    panels[1].legend(fontsize=8)
    if validation:
        points = sorted(validation, key=lambda point: point["step"])
        panels[2].plot([p["step"] for p in points], [p["perplexity"] for p in points], color="black", marker=".")
        panels[2].set_ylabel("validation perplexity")
        if increase is not None:
            limit = (1 + increase) * points[0]["perplexity"]
            panels[2].axhline(limit, color="tab:red", linestyle="--", label=f"{increase:.0%} above the first")
            panels[2].legend(fontsize=8)
    for axes in panels:
        axes.set_xlabel("optimizer steps")
        axes.grid(alpha=0.3)
    return save(figure, path)


def plot_latency(lines: dict[str, list[dict[str, Any]]], path: str | Path, judge: str) -> Path:
    """Perplexity and entropy against seconds per sequence, points named by their budget (Figure 15).

    Args:
        lines (`dict[str, list[dict]]`): For each method rows that set `budget`, with `measure_latency`'s result as
            `latency`.
        path (`str` or `Path`): Picture to write; the suffix is the format.
        judge (`str`): Name of the judge, for the axis.

    Returns:
        `Path` of the picture.
    """
    figure = new_figure(7.5, 6.2)
    panels = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1], squeeze=False)
    for place, (name, rows) in enumerate(lines.items()):
        rows = sorted(rows, key=lambda row: _options(row)["budget"])
        seconds = [row["latency"]["seconds_per_sequence"] for row in rows]
        for axes, measure in zip(panels[:, 0], TITLES, strict=True):
            _line(axes, seconds, rows, measure, place, label=name)
        for x, row in zip(seconds, rows, strict=True):
            aside = (4, 4) if place % 2 == 0 else (-14, -11)  # neighbouring lines on different sides
            style = {"fontsize": 7, "color": f"C{place}", "xytext": aside, "textcoords": "offset points"}
            panels[0, 0].annotate(str(_options(row)["budget"]), (x, row[PERPLEXITY]), **style)
    _label_rows(panels, judge)
    panels[0, 0].legend(fontsize=8)
    logarithmic_seconds(panels[1, 0], "seconds per sequence (generation only); numbers: budgets")
    return save(figure, path)


# --- pieces ----------------------------------------------------------------------------------------------------------


def _options(row: dict[str, Any]) -> dict[str, Any]:
    return row["sampling"]["options"]


def _values(rows: list[dict[str, Any]], name: str) -> list[Any]:
    """The different values of an argument: numbers and lists rising, names in the order of the rows."""
    found = []
    for row in rows:
        if _options(row)[name] not in found:
            found.append(_options(row)[name])
    return found if isinstance(found[0], str) else sorted(found)


def _where(rows: list[dict[str, Any]], **values: Any) -> list[dict[str, Any]]:
    return [row for row in rows if all(_options(row)[name] == value for name, value in values.items())]


def _line(axes: "Axes", x: list[float], rows: list[dict[str, Any]], measure: str, place: int, label: str) -> None:
    """A measure of the rows with its standard error, where it has one."""
    errors = [row.get(f"{measure}_standard_error") or 0 for row in rows]
    style = {"color": f"C{place}", "marker": MARKERS[place % len(MARKERS)], "markersize": 4, "linewidth": 1.2}
    axes.errorbar(x, [row[measure] for row in rows], errors, capsize=2, label=label, **style)


def _label_rows(panels: np.ndarray, judge: str) -> None:
    for column, axes in enumerate(panels[0]):
        logarithmic_perplexity(axes, "" if column else f"generative perplexity\n({judge})")
    entropy_axis(panels[1, 0])
    for axes in panels.flat:
        axes.grid(alpha=0.3, which="both")


def _heat_map(
    axes: "Axes", rows: list[dict[str, Any]], measure: str, vertical: str, horizontal: str, below: float = 0.0
) -> "AxesImage":
    """A cell for each pair of values with its number, `below` its middle; its colour is yet to be scaled."""
    from matplotlib import colormaps, colors, patches

    ys, xs = _values(rows, vertical), _values(rows, horizontal)
    values, errors = np.full((2, len(ys), len(xs)), np.nan)
    for row in rows:
        cell = ys.index(_options(row)[vertical]), xs.index(_options(row)[horizontal])
        values[cell], errors[cell] = row[measure], row.get(f"{measure}_standard_error") or np.nan
    lowest = np.unravel_index(np.nanargmin(values), values.shape)
    shades = np.log(values / values[lowest]) if measure == PERPLEXITY else values
    palette, first, last = COLORS[measure]
    shown = colors.ListedColormap(colormaps[palette](np.linspace(first, last, 256)))
    image = axes.imshow(shades, origin="lower", aspect="auto", cmap=shown)
    for y, x in np.argwhere(~np.isnan(values)):
        axes.text(x, y - below, _short(values[y, x]), ha="center", va="center", fontsize=9)
    if measure == PERPLEXITY:
        for y, x in np.argwhere(values - values[lowest] <= 2 * np.hypot(errors, errors[lowest])):
            frame = patches.Rectangle((x - 0.46, y - 0.44), 0.92, 0.88, fill=False, edgecolor=FRAME, linewidth=1.6)
            axes.add_patch(frame)
    axes.set_xticks(range(len(xs)), [str(x) for x in xs])
    axes.set_yticks(range(len(ys)), [str(y) for y in ys])
    axes.set_title(TITLES[measure], fontsize=10)
    return image


def _share_colors(
    figure: "Figure", images: list["AxesImage"], panels: list["Axes"], measure: str, location: str
) -> None:
    """One scale of colours for all `images`, wide enough for small differences to look small, and its bar."""
    low = min(image.get_array().min() for image in images)
    high = max(image.get_array().max() for image in images)
    wider = max(0, LEAST_SPAN[measure] - (high - low))
    if measure == PERPLEXITY:
        high += wider  # the lowest keeps the darkest colour
    else:
        low, high = low - wider / 2, high + wider / 2
    for image in images:
        image.set_clim(low, high)
    bar = figure.colorbar(images[0], ax=panels, location=location, aspect=30, label=BARS[measure])
    if measure == PERPLEXITY:
        fine, coarse = (1, 1.05, 1.1, 1.15, 1.2, 1.3, 1.4, 1.5), (1, 1.5, 2, 3, 5, 10, 20, 50, 100, 1000)
        ticks = [ratio for ratio in (fine if high < 0.4 else coarse) if np.log(ratio) <= high]
        bar.set_ticks(np.log(ticks), labels=[f"{ratio:g}" for ratio in ticks])


def _short(value: float) -> str:
    return f"{value:.{max(0, 2 - int(np.log10(max(value, 1))))}f}"


def _budget_line(axes: "Axes", config, steps: list[int], iterations: list[int], budget: int) -> None:
    """Where `budget` pays `steps` of how many iterations; between the cells both are linear."""
    explicit, shared = config.num_pre_layers + config.num_post_layers, config.num_fixed_point_layers
    if shared == 0:
        return
    x = np.linspace(0, len(iterations) - 1, 200)
    paid = budget / (explicit + shared * np.interp(x, range(len(iterations)), iterations))
    inside = (paid >= steps[0]) & (paid <= steps[-1])
    if not inside.any():
        return
    y = np.interp(paid, steps, range(len(steps)))
    axes.plot(x[inside], y[inside], color="#555555", linestyle="--", linewidth=1)
    end = (x[inside][-1], y[inside][-1])
    axes.annotate(str(budget), end, fontsize=8, color="#555555", xytext=(4, -3), textcoords="offset points")
