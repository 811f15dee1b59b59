# SPDX-License-Identifier: Apache-2.0
"""The solver: iterates h ← F(h) from h⁰ and measures how far each iteration moved.

Nothing else in the library knows how to iterate. Shapes: B batch, L length, D hidden size, N iterations.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch


class FixedPointSolution(NamedTuple):
    """`state` (B, L, D) after the last iteration; `residuals` (N, B), the relative residual of each iteration."""

    state: torch.Tensor
    residuals: torch.Tensor


@torch.no_grad()
def relative_residual(
    new: torch.Tensor, old: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """‖F(h) − h‖ / ‖h‖ of each sequence over real positions and channels (Appendix F.12); 0/0 is 0.

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
    return torch.where(change == 0, 0.0, change / size)


def solve_fixed_point(
    step: Callable[[torch.Tensor], torch.Tensor],
    state: torch.Tensor,
    num_iterations: int,
    num_no_grad_iterations: int = 0,
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
        attention_mask (`torch.Tensor`, *optional*): (B, L), 0 at padding, which the residuals leave out.

    Example:

    ```python
    >>> import torch
    >>> solution = solve_fixed_point(lambda h: 0.5 * h + 1, torch.zeros(1, 1, 1), num_iterations=30)
    >>> round(solution.state.item(), 6)
    2.0

    ```
    """
    residuals = []
    state = state.detach()
    for iteration in range(num_no_grad_iterations + num_iterations):
        # A real no_grad: the iterations before the differentiated ones keep no activations.
        with torch.set_grad_enabled(torch.is_grad_enabled() and iteration >= num_no_grad_iterations):
            new_state = step(state)
        residuals.append(relative_residual(new_state, state, attention_mask))
        state = new_state
    return FixedPointSolution(state, torch.stack(residuals))
