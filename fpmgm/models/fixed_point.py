# SPDX-License-Identifier: Apache-2.0
"""The solver: iterates h ← F(h) from h⁰ and measures how far each iteration moved.

Nothing else in the library knows how to iterate. `solve_fixed_point` is the plain iteration with the training
gradient; `solve_adaptively` gives each sequence its own number of iterations, for sampling.

Shapes: B batch, L length, D hidden size, N iterations, A sequences still active, M remembered iterates.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint


class FixedPointSolution(NamedTuple):
    """`state` (B, L, D) after the last iteration; `residuals` (N, B), the relative residual of each iteration."""

    state: torch.Tensor
    residuals: torch.Tensor


@torch.no_grad()
def relative_residual(
    new: torch.Tensor, old: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """‖F(h) − h‖ / ‖h‖ of each sequence over real positions and channels (Appendix F.12).

    0/0 is 0, and a state that has left the numbers has residual ∞.

    Args:
        new, old (`torch.Tensor`): (B, L, D) F(h) and h.
        attention_mask (`torch.Tensor`, *optional*): (B, L), 0 at padding. `None`: every position is real.

    Returns:
        `torch.Tensor`: (B,) float32.
    """
    change, size = (new - old).float(), old.float()
    if attention_mask is not None:
        real = attention_mask[:, :, None].to(change.dtype)
        change, size = change * real, size * real
    change, size = change.flatten(1).norm(dim=1), size.flatten(1).norm(dim=1)
    return torch.where(change == 0, 0.0, change / size).nan_to_num(nan=float("inf"), posinf=float("inf"))


def solve_fixed_point(
    step: Callable[[torch.Tensor], torch.Tensor],
    state: torch.Tensor,
    num_iterations: int,
    num_no_grad_iterations: int = 0,
    num_kept_iterations: int | None = None,
    attention_mask: torch.Tensor | None = None,
) -> FixedPointSolution:
    """Picard iteration h ← `step`(h) with the stochastic Jacobian-free gradient (Appendix C.1).

    The first `num_no_grad_iterations` run without a graph, the following `num_iterations` with one; the start is
    detached, so that what produced it learns through `step`'s own input alone.

    Args:
        step (`Callable`): One application of F, (B, L, D) → (B, L, D).
        state (`torch.Tensor`): (B, L, D) the start h⁰.
        num_iterations (`int`): Iterations with gradient, at least 1.
        num_no_grad_iterations (`int`, defaults to 0): Iterations without gradient before them.
        num_kept_iterations (`int`, *optional*): How many of those with gradient, the last ones, keep their activations
            for the backward pass; of earlier ones the state is kept, and they run again there. `None`: all.
        attention_mask (`torch.Tensor`, *optional*): (B, L), 0 at padding, which the residuals leave out.

    Example:

    ```python
    >>> import torch
    >>> solution = solve_fixed_point(lambda h: 0.5 * h + 1, torch.zeros(1, 1, 1), num_iterations=30)
    >>> round(solution.state.item(), 6)
    2.0

    ```
    """
    residuals, total = [], num_no_grad_iterations + num_iterations
    # The last iterations are kept: when the first ones run again, the backward pass has freed what those had kept.
    first_kept = 0 if num_kept_iterations is None else total - num_kept_iterations
    state = state.detach()
    for iteration in range(total):
        # A real no_grad: the iterations before the differentiated ones keep no activations.
        with torch.set_grad_enabled(torch.is_grad_enabled() and iteration >= num_no_grad_iterations):
            again = torch.is_grad_enabled() and iteration < first_kept
            new_state = checkpoint(step, state, use_reentrant=False) if again else step(state)
        residuals.append(relative_residual(new_state, state, attention_mask))
        state = new_state
    return FixedPointSolution(state, torch.stack(residuals))


@torch.no_grad()
def solve_adaptively(
    step: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    state: torch.Tensor,
    num_iterations: int | torch.Tensor,
    tolerance: float | None = None,
    solver: str = "picard",
    attention_mask: torch.Tensor | None = None,
) -> FixedPointSolution:
    """Iterate each sequence until its residual is at most `tolerance` or its iterations are used up; no gradient.

    A sequence that has stopped costs nothing more, and its result does not depend on the rest of the batch. Which
    sequences go on is known on the device, so each iteration waits for it.

    Args:
        step (`Callable`): F on some sequences: (A, L, D) states and (A,) their rows → (A, L, D).
        state (`torch.Tensor`): (B, L, D) the start h⁰.
        num_iterations (`int` or `torch.Tensor`): The most iterations, for all or (B,) for each sequence, at least 1.
        tolerance (`float`, *optional*): Relative residual that is small enough. `None`: take all iterations.
        solver (`str`, defaults to `"picard"`): A key of `SOLVERS`.
        attention_mask (`torch.Tensor`, *optional*): (B, L), 0 at padding, which the residuals leave out.

    Returns:
        [`FixedPointSolution`]: the last F(h) of each sequence; residuals are NaN where it had stopped.
    """
    batch_size = len(state)
    limits = torch.as_tensor(num_iterations, device=state.device).expand(batch_size)
    residuals = torch.full((int(limits.max()), batch_size), float("nan"), device=state.device)
    result, rows, points, images = state, torch.arange(batch_size, device=state.device), [state], []
    for iteration in range(len(residuals)):
        images.append(step(points[-1], rows))
        residual = relative_residual(images[-1], points[-1], None if attention_mask is None else attention_mask[rows])
        residuals[iteration, rows] = residual
        result = result.index_copy(0, rows, images[-1])
        going_on = limits[rows] > iteration + 1
        if tolerance is not None:
            going_on &= residual > tolerance
        if not going_on.any():
            return FixedPointSolution(result, residuals[: iteration + 1])
        rows = rows[going_on]
        points, images = ([x[going_on] for x in history[-MEMORY:]] for history in (points, images))
        points.append(SOLVERS[solver](points, images))
    return FixedPointSolution(result, residuals)


# --- the next point from the latest points h and their images F(h), at most MEMORY of each, (A, L, D) ---

MEMORY = 4


def picard(points: list[torch.Tensor], images: list[torch.Tensor]) -> torch.Tensor:
    """h ← F(h)."""
    return images[-1]


def anderson(points: list[torch.Tensor], images: list[torch.Tensor]) -> torch.Tensor:
    """Anderson acceleration (type II): the mix of the latest images whose mixed residual is smallest.

    minimise ‖Σ α_i (F(h_i) − h_i)‖ with Σ α_i = 1, slightly regularised; h ← Σ α_i F(h_i).
    """
    differences = torch.stack([image - point for point, image in zip(points, images, strict=True)], dim=1)
    differences = differences.flatten(2).double()  # (A, M, L·D)
    gram = differences @ differences.transpose(1, 2)  # (A, M, M)
    scale = gram.diagonal(dim1=1, dim2=2).amax(dim=1)[:, None, None].clamp(min=1e-300)
    gram = gram / scale + 1e-10 * torch.eye(gram.shape[1], device=gram.device, dtype=gram.dtype)
    weights = torch.linalg.solve(gram, torch.ones_like(gram[:, :, :1]))  # (A, M, 1)
    weights = (weights / weights.sum(dim=1, keepdim=True)).to(images[-1].dtype)
    return sum(weights[:, i, :, None] * image for i, image in enumerate(images))


SOLVERS = {"picard": picard, "anderson": anderson}
