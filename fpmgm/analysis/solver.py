# SPDX-License-Identifier: Apache-2.0
"""What the solver does from step to step: how far fixed points move, how far each start is from the solution, and how
residuals fall (Figure 3, Section 4.3.1, Appendix F.12).

Shapes: B batch, L length, R registers, D hidden size, T denoising steps, N iterations, U reuses, S reuse states.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput, logging

from ..models.modes import evaluating
from ..models.reuse import REUSE_STATES, REUSES, reuse_states, step_weights
from .trajectory import Trajectory


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class SolverMeasurements:
    """What [`measure_solver`] found, each field float32 on the CPU with the sequences last.

    S counts `REUSE_STATES`, what happened to a position since the previous step: "changed" (revealed), "unchanged"
    (visible), "masked" (still), "remasked". U counts `REUSES`: "none", "full", "3sr". At the first step nothing is
    reused and nothing has moved.

    Args:
        shares (`torch.Tensor`): (T, S, B) share of a sequence's positions in each state; 0 at the first step.
        movement (`torch.Tensor`): (T, S, B) mean over the positions of a state of ‖h*_s − h*_{s−1}‖ / ‖h*_s‖, the
            norms over channels; NaN where there is none, and where a solution was not reached.
        absolute_movement (`torch.Tensor`): (T, S, B) the same without the division, as in the paper's Figure 3.
        start_distances (`torch.Tensor`): (U, T, B) ‖h⁰ − h*‖ / ‖h*‖ over all positions and channels; NaN where h* was
            not reached.
        start_distances_by_state (`torch.Tensor`): (U, T, S, B) the same for each position, a mean over a state's.
        residuals (`torch.Tensor`): (U, T, N, B) relative residual of each iteration.
        solution_residuals (`torch.Tensor`): (T, B) that of the last iteration of h*.
    """

    shares: torch.Tensor
    movement: torch.Tensor
    absolute_movement: torch.Tensor
    start_distances: torch.Tensor
    start_distances_by_state: torch.Tensor
    residuals: torch.Tensor
    solution_residuals: torch.Tensor


def joined(parts: list[SolverMeasurements]) -> SolverMeasurements:
    """The measurements of several batches as of one."""
    names = [field.name for field in fields(SolverMeasurements)]
    return SolverMeasurements(*(torch.cat([getattr(part, name) for part in parts], dim=-1) for name in names))


@torch.no_grad()
def measure_solver(
    model: nn.Module,
    trajectory: Trajectory,
    num_iterations: int = 4,
    tolerance: float = 1e-5,
    most_iterations: int = 100,
    solver: str = "anderson",
) -> SolverMeasurements:
    """Solve every step of a trajectory well, and again as a sampler would with each reuse.

    h* is found from h_pre, by Anderson acceleration where plain iteration would circle around it; without one that
    reaches `tolerance` a sequence has no movement and no distances at that step. Each reuse goes its own way by plain
    iteration: its start is made of what it found itself at the previous step, with the γ of `model.generation_config`.

    Args:
        model (`PreTrainedModel`): With fixed-point layers.
        trajectory ([`Trajectory`]): The states to solve for.
        num_iterations (`int`, defaults to 4): Iterations N of a step with each reuse.
        tolerance (`float`, defaults to 1e-5): Relative residual of h*.
        most_iterations (`int`, defaults to 100): Iterations after which there is no h*.
        solver (`str`, defaults to `"anderson"`): `"anderson"` or `"picard"`, for h*.

    Raises:
        `ValueError`: for a model without fixed-point layers.
    """
    if not model.config.num_fixed_point_layers:
        raise ValueError(
            "`model` has `num_fixed_point_layers`=0, but only a fixed-point model has a solver to look at."
        )
    rows = []
    before = solution = None
    found = dict.fromkeys(REUSES)  # the state that each reuse found at the previous step
    for step in range(len(trajectory.times)):
        call = denoiser_call(trajectory, step, model.device)
        ids, previous = call["input_ids"], solution
        states = torch.full_like(ids, -1)
        if before is not None:
            states = reuse_states(before, ids, model.config.mask_token_id)
        _, output = solve(model, **call, num_iterations=most_iterations, tolerance=tolerance, solver=solver)
        reached = _last(output.residuals)
        solution = torch.where((reached <= tolerance)[:, None, None], output.fixed_point_state, float("nan"))
        row = _movement(previous, solution, states) | {"solution_residuals": reached}
        starts, residuals = [], []
        for reuse in REUSES:
            options = {}
            if before is not None and reuse != "none":
                _, weights = step_weights(before, ids, model.config, reuse, model.generation_config)
                options = {"fixed_point_state": found[reuse], "reuse_weights": weights}
            start, output = solve(model, **call, **options, num_iterations=num_iterations)
            found[reuse] = output.fixed_point_state
            starts.append(start)
            residuals.append(output.residuals)
        rows.append(row | _distances(starts, solution, states) | {"residuals": torch.stack(residuals)})
        before = ids
    measured = _stacked(rows)
    unsolved = (measured.solution_residuals > tolerance).float().mean().item()
    if unsolved > 0:
        logger.warning(
            f"{unsolved:.1%} of the solutions did not reach `tolerance`={tolerance} in `most_iterations`="
            f"{most_iterations} and are left out: give more, or see `solution_residuals` (F may be no contraction)."
        )
    return measured


def denoiser_call(trajectory: Trajectory, step: int, device: torch.device) -> dict[str, torch.Tensor]:
    """What `forward` is given at a step: `input_ids`, `timesteps` and, of images, `class_labels`."""
    ids = trajectory.states[step].to(device)
    call = {"input_ids": ids, "timesteps": torch.full((len(ids),), trajectory.times[step].item(), device=device)}
    if trajectory.class_labels is not None:
        call["class_labels"] = trajectory.class_labels.to(device)
    return call


@torch.no_grad()
def solve(model: nn.Module, input_ids: torch.Tensor, **options: Any) -> tuple[torch.Tensor, ModelOutput]:
    """One call of the denoiser without its head or dropout: the solver's start h⁰ (B, L + R, D), and the output.

    Args:
        model (`PreTrainedModel`): With fixed-point layers.
        input_ids (`torch.Tensor`): (B, L).
        options: Of the model's `forward`: `timesteps`, `class_labels`, `fixed_point_state`, `num_iterations`, …
    """
    starts = []

    def keep_first(module, args):
        if not starts:
            starts.append(args[0])

    hook = model.fixed_point.register_forward_pre_hook(keep_first)
    try:
        with evaluating(model):
            output = model(input_ids, output_logits=False, **options)
    finally:
        hook.remove()
    return starts[0], output


def mean_by_state(values: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Mean of `values` (B, L) over the positions of each reuse state, NaN where there is none: (S, B).

    Args:
        states (`torch.Tensor`): (B, L) from `reuse_states`; −1: in none.

    >>> mean_by_state(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0, 1, 1]])).flatten().tolist()
    [1.0, 3.0, nan, nan]
    """
    belongs = _belongs(states)
    return torch.where(belongs, values.float(), 0.0).sum(dim=-1) / belongs.sum(dim=-1)


def _belongs(states: torch.Tensor) -> torch.Tensor:
    """(S, B, L) bool."""
    return states == torch.arange(len(REUSE_STATES), device=states.device)[:, None, None]


def _movement(previous: torch.Tensor | None, solution: torch.Tensor, states: torch.Tensor) -> dict[str, torch.Tensor]:
    """How far the solution (B, L + R, D) has moved since the previous one, each (S, B)."""
    length = states.shape[1]
    moved = torch.zeros_like(solution) if previous is None else solution - previous
    moved, size = moved[:, :length].norm(dim=-1), solution[:, :length].norm(dim=-1)  # (B, L)
    return {
        "shares": _belongs(states).float().mean(dim=-1),
        "movement": mean_by_state(moved / size, states),
        "absolute_movement": mean_by_state(moved, states),
    }


def _distances(starts: list[torch.Tensor], solution: torch.Tensor, states: torch.Tensor) -> dict[str, torch.Tensor]:
    """How far the starts, U of (B, L + R, D), are from the solution: (U, B), and by state (U, S, B)."""
    length, overall, by_state = states.shape[1], [], []
    for start in starts:
        distance = start - solution
        overall.append(distance.flatten(1).norm(dim=1) / solution.flatten(1).norm(dim=1))
        distance, size = distance[:, :length].norm(dim=-1), solution[:, :length].norm(dim=-1)  # (B, L)
        by_state.append(mean_by_state(distance / size, states))
    return {"start_distances": torch.stack(overall), "start_distances_by_state": torch.stack(by_state)}


def _last(residuals: torch.Tensor) -> torch.Tensor:
    """(B,) of (N, B): those of the last iteration that each sequence took; behind it they are NaN."""
    taken = (~residuals.isnan()).sum(dim=0, keepdim=True)
    return residuals.gather(0, taken - 1).squeeze(0)


def _stacked(rows: list[dict[str, torch.Tensor]]) -> SolverMeasurements:
    """The steps' rows as one, their axis behind that of the reuses where there is one."""
    columns = {name: torch.stack([row[name] for row in rows]).float().cpu() for name in rows[0]}
    for name in ("start_distances", "start_distances_by_state", "residuals"):
        columns[name] = columns[name].transpose(0, 1)
    return SolverMeasurements(**columns)
