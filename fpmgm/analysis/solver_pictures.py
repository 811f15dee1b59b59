# SPDX-License-Identifier: Apache-2.0
"""Pictures of what the solver does from step to step (Figure 3, Section 4.3.1, Figure 16).

Shapes: B batch, T denoising steps, N iterations, U reuses, S reuse states.
"""

from pathlib import Path

import torch

from ..models.reuse import REUSE_STATES, REUSES
from .axes import finish, new_figure, save
from .solver import SolverMeasurements


STATE_STYLES = {  # of a position since the previous step; the colours of `plot_denoising`, darker
    "changed": ("newly revealed", "#e07b1f"),
    "masked": ("still masked", "#7f7f7f"),
    "unchanged": ("visible", "#4f9d4f"),
    "remasked": ("masked again", "#9467bd"),
}
REUSE_COLORS = {"none": "#8d99ae", "full": "#2b4570", "3sr": "#c8553d"}


def plot_movement(measured: dict[str, SolverMeasurements], path: str | Path) -> Path:
    """Draw how far fixed points move from one step to the next, by what happened to the token (Figure 3).

    Args:
        measured (`dict[str, SolverMeasurements]`): A panel for each name.
        path (`str` or `Path`): Picture to write; the suffix is the format.

    Returns:
        `Path` of the picture.
    """
    figure = new_figure(1.2 + 4.4 * len(measured), 4)
    panels = figure.subplots(1, len(measured), sharey=True, squeeze=False)[0]
    for axes, (name, found) in zip(panels, measured.items(), strict=True):
        for state, (label, color) in STATE_STYLES.items():
            curve = found.movement[:, REUSE_STATES.index(state)].nanmean(dim=-1)  # (T,)
            if not curve.isnan().all():
                axes.plot(_steps(curve), curve, color=color, marker=".", label=label)
        finish(axes, log=True, whole=True, title=name, xlabel="denoising step s")
    panels[0].set_ylabel("token's movement, ‖h*ₛ − h*ₛ₋₁‖ / ‖h*ₛ‖")
    return save(figure, path)


def plot_start_distances(measured: dict[str, SolverMeasurements], path: str | Path) -> Path:
    """Draw how far each reuse's start is from the solution, over all positions and by what happened to the token.

    Args:
        measured (`dict[str, SolverMeasurements]`): A row for each name.
        path (`str` or `Path`): Picture to write; the suffix is the format.

    Returns:
        `Path` of the picture.
    """
    states = [s for s in STATE_STYLES if any(_has(found, s) for found in measured.values())]
    figure = new_figure(3.4 * (1 + len(states)), 0.6 + 2.9 * len(measured))
    rows = figure.subplots(len(measured), 1 + len(states), sharex=True, sharey=True, squeeze=False)
    for (name, found), (whole, *by_state) in zip(measured.items(), rows, strict=True):
        for u, reuse in enumerate(REUSES):
            style = {"color": REUSE_COLORS[reuse], "marker": ".", "label": f"reuse {reuse}"}
            curve = found.start_distances[u].nanmean(dim=-1)  # (T,)
            whole.plot(_steps(curve), curve, **style)
            for axes, state in zip(by_state, states, strict=True):
                curve = found.start_distances_by_state[u, :, REUSE_STATES.index(state)].nanmean(dim=-1)
                axes.plot(_steps(curve), curve, **style)
        label = "start to solution, ‖h⁰ − h*‖ / ‖h*‖"
        finish(whole, log=True, whole=True, title=f"{name}: all tokens", ylabel=label)
        for axes, state in zip(by_state, states, strict=True):
            finish(axes, legend=False, log=True, whole=True, title=STATE_STYLES[state][0])
    for axes in rows[-1]:
        axes.set_xlabel("denoising step")
    return save(figure, path)


def plot_residuals(measured: dict[str, SolverMeasurements], path: str | Path) -> Path:
    """Draw the relative residual against the iteration, and at each step the first and the last one (Figure 16).

    Args:
        measured (`dict[str, SolverMeasurements]`): A row for each name.
        path (`str` or `Path`): Picture to write; the suffix is the format.

    Returns:
        `Path` of the picture.
    """
    figure = new_figure(10, 0.6 + 3.4 * len(measured))
    rows = figure.subplots(len(measured), 2, sharey=True, squeeze=False)
    for (name, found), (by_iteration, by_step) in zip(measured.items(), rows, strict=True):
        residuals = found.residuals.mean(dim=-1)  # (U, T, N)
        steps, iterations = _steps(residuals[0]), torch.arange(residuals.shape[2]) + 1
        for reuse, values in zip(REUSES, residuals, strict=True):
            color = REUSE_COLORS[reuse]
            by_iteration.plot(iterations, values[1:].mean(dim=0), color=color, marker="o", label=f"reuse {reuse}")
            by_step.plot(steps, values[:, 0], color=color, linestyle="--")
            by_step.plot(steps, values[:, -1], color=color)
        label = "relative residual, ‖F(h) − h‖ / ‖h‖"
        title = f"{name}: mean over the steps but the first"
        finish(by_iteration, log=True, title=title, xlabel="iteration", ylabel=label, xticks=iterations)
        title = f"iteration 1 (dashed) and {len(iterations)} (solid)"
        finish(by_step, legend=False, log=True, whole=True, title=title, xlabel="denoising step")
    return save(figure, path)


def _steps(curve: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(curve)) + 1


def _has(found: SolverMeasurements, state: str) -> bool:
    return bool(found.shares[:, REUSE_STATES.index(state)].any())
