# SPDX-License-Identifier: Apache-2.0
"""The solver: iterates h ← F(h) from h⁰ and measures how far each iteration moved.

Nothing else in the library knows how to iterate. `solve_fixed_point` is the plain iteration with the training
gradient; `solve_adaptively` gives each sequence its own number of iterations, for sampling. `solve` takes the one that
[`SolverOptions`] ask for.

Shapes: B batch, L length, D hidden size, N iterations, A sequences still active, M remembered iterates.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from .arguments import checked, number, one_of, optional, whole


class FixedPointSolution(NamedTuple):
    """`state` (B, L, D) after the last iteration; `residuals` (N, B), the relative residual of each iteration."""

    state: torch.Tensor
    residuals: torch.Tensor


@dataclass(frozen=True, eq=False)
class SolverOptions:
    """How h* is found, and from where.

    They are the options of these names of a model's call, which `DenoiserOptions` describes.

    Raises:
        `ValueError`: for a value that is not allowed, and for options that exclude each other: `tolerance`, another
            solver than Picard's and iterations per sequence have no gradient, so that they need `torch.no_grad()`, and
            nothing that concerns a gradient can be asked of them.
    """

    num_iterations: int | torch.Tensor | None = None
    num_no_grad_iterations: int = 0
    num_kept_iterations: int | None = None
    tolerance: float | None = None
    solver: str = "picard"
    fixed_point_state: torch.Tensor | None = None
    reuse_weights: torch.Tensor | None = None

    def __post_init__(self):
        values = vars(self)
        checked(ALLOWED, {name: x for name, x in values.items() if not torch.is_tensor(x)})
        count = self.num_iterations
        if torch.is_tensor(count) and (count.dim() != 1 or not has_whole_numbers(count)):
            raise ValueError(
                f"`num_iterations` of shape {tuple(count.shape)} and type {count.dtype} must be one whole number, or "
                "(batch,) of them."
            )
        if self.reuse_weights is not None and self.fixed_point_state is None:
            raise ValueError("`reuse_weights` weigh `fixed_point_state`, which is None: give both, or none of them.")
        if self.adaptive is None:
            return
        for name, neutral in (("num_no_grad_iterations", 0), ("num_kept_iterations", None)):
            if values[name] != neutral:
                raise ValueError(
                    f"`{name}`={values[name]} is about a gradient, which {self.adaptive} has none of: leave it out."
                )
        if torch.is_grad_enabled():
            raise ValueError(f"{self.adaptive} has no gradient: call the model under `torch.no_grad()`.")

    @property
    def adaptive(self) -> str | None:
        """What gives each sequence its own number of iterations. `None`: all take the same."""
        if self.tolerance is not None:
            return f"`tolerance`={self.tolerance}"
        if self.solver != "picard":
            return f"`solver`={self.solver!r}"
        return "`num_iterations` for each sequence" if torch.is_tensor(self.num_iterations) else None

    def check_unused(self) -> None:
        """Raise a `ValueError` for options that a model without fixed-point layers cannot honour."""
        given = {
            "num_iterations": torch.is_tensor(self.num_iterations) or self.num_iterations not in (0, None),
            "num_no_grad_iterations": self.num_no_grad_iterations != 0,
            "num_kept_iterations": self.num_kept_iterations is not None,
            "tolerance": self.tolerance is not None,
            "solver": self.solver != "picard",
            "fixed_point_state": self.fixed_point_state is not None,
        }
        names = [f"`{name}`" for name, is_given in given.items() if is_given]
        if names:
            raise ValueError(f"{', '.join(names)}: the model has no fixed-point layers to solve for. Leave it out.")

    def check_looped(self) -> None:
        """Raise a `ValueError` for options that a model without an injection cannot honour."""
        if self.num_no_grad_iterations:
            raise ValueError(
                f"`num_no_grad_iterations`={self.num_no_grad_iterations}: without an injection the gradient reaches "
                "the pre-stack through the start alone, which they would cut off. Give 0."
            )
        if self.fixed_point_state is not None:
            raise ValueError(
                "`fixed_point_state`: without an injection the model sees its tokens through the start alone, which "
                "this would replace. Leave it out."
            )


def has_whole_numbers(x: torch.Tensor) -> bool:
    """Whether a tensor is of whole numbers."""
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


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


def solve(
    step: Callable[..., torch.Tensor],
    state: torch.Tensor,
    options: SolverOptions,
    attention_mask: torch.Tensor | None = None,
) -> FixedPointSolution:
    """Iterate from `state` as `options` say, which give `num_iterations`.

    Args:
        step (`Callable`): F on all sequences, (B, L, D) → (B, L, D), or with (A,) rows as the second argument on some,
            (A, L, D) → (A, L, D).
        state (`torch.Tensor`): (B, L, D) the start h⁰.
        options ([`SolverOptions`]): How.
        attention_mask (`torch.Tensor`, *optional*): (B, L), 0 at padding, which the residuals leave out.
    """
    count = options.num_iterations
    if torch.is_tensor(count) and len(count) != len(state):
        raise ValueError(f"`num_iterations` has {len(count)} numbers for {len(state)} sequences: give one for each.")
    if count.min() < 1 if torch.is_tensor(count) else count < 1:
        raise ValueError(f"`num_iterations`={count} must be at least 1.")
    if options.adaptive is not None:
        return solve_adaptively(step, state, count, options.tolerance, options.solver, attention_mask)
    return solve_fixed_point(
        step, state, count, options.num_no_grad_iterations, options.num_kept_iterations, attention_mask
    )


def solve_fixed_point(
    step: Callable[[torch.Tensor], torch.Tensor],
    state: torch.Tensor,
    num_iterations: int,
    num_no_grad_iterations: int = 0,
    num_kept_iterations: int | None = None,
    attention_mask: torch.Tensor | None = None,
) -> FixedPointSolution:
    """Picard iteration h ← `step`(h) with the stochastic Jacobian-free gradient (Appendix C.1).

    The first `num_no_grad_iterations` run without a graph, the following `num_iterations` with one.

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
        attention_mask (`torch.Tensor`, *optional*): (B, L), 0 at padding, which decides nothing.

    Returns:
        [`FixedPointSolution`]: the last F(h) of each sequence; residuals are NaN where it had stopped.
    """
    batch_size = len(state)
    limits = torch.as_tensor(num_iterations, device=state.device).expand(batch_size)
    size = (int(limits.max()), batch_size)
    residuals = torch.full(size, float("nan"), dtype=torch.float32, device=state.device)
    result, rows, points, images = state, torch.arange(batch_size, device=state.device), [state], []
    real = attention_mask  # of the rows
    for iteration in range(len(residuals)):
        images.append(step(points[-1], rows))
        residual = relative_residual(images[-1], points[-1], real)
        residuals[iteration, rows] = residual
        result = result.index_copy(0, rows, images[-1])
        going_on = limits[rows] > iteration + 1
        if tolerance is not None:
            going_on &= residual > tolerance
        if not going_on.any():
            return FixedPointSolution(result, residuals[: iteration + 1])
        rows = rows[going_on]
        points, images = ([x[going_on] for x in history[-MEMORY:]] for history in (points, images))
        real = None if real is None else real[going_on]
        points.append(SOLVERS[solver](points, images, real))
    return FixedPointSolution(result, residuals)


# --- the next point from the latest points h and their images F(h), at most MEMORY of each, (A, L, D), and what is
# real of them, (A, L), or `None` ---

MEMORY = 4


def picard(points: list[torch.Tensor], images: list[torch.Tensor], real: torch.Tensor | None) -> torch.Tensor:
    """h ← F(h)."""
    return images[-1]


def anderson(points: list[torch.Tensor], images: list[torch.Tensor], real: torch.Tensor | None) -> torch.Tensor:
    """Anderson acceleration (type II): the mix of the latest images whose mixed residual is smallest, without padding.

    minimise ‖Σ α_i (F(h_i) − h_i)‖ with Σ α_i = 1, slightly regularised; h ← Σ α_i F(h_i).
    """
    differences = torch.stack([image - point for point, image in zip(points, images, strict=True)], dim=1)
    differences = differences if real is None else differences * real[:, None, :, None]
    differences = differences.flatten(2).double()  # (A, M, L·D)
    gram = differences @ differences.transpose(1, 2)  # (A, M, M)
    scale = gram.diagonal(dim1=1, dim2=2).amax(dim=1)[:, None, None].clamp(min=1e-300)
    gram = gram / scale + 1e-10 * torch.eye(gram.shape[1], device=gram.device, dtype=gram.dtype)
    weights = torch.linalg.solve(gram, torch.ones_like(gram[:, :, :1]))  # (A, M, 1)
    weights = (weights / weights.sum(dim=1, keepdim=True)).to(images[-1].dtype)
    return sum(weights[:, i, :, None] * image for i, image in enumerate(images))


SOLVERS = {"picard": picard, "anderson": anderson}

ALLOWED = {
    "num_iterations": optional(whole(0, unit="iterations"), "takes the model's own number"),
    "num_no_grad_iterations": whole(0, unit="iterations"),
    "num_kept_iterations": optional(whole(0, unit="iterations"), "keeps all"),
    "tolerance": optional(number(0, float("inf"), words="be at least 0"), "takes all iterations"),
    "solver": one_of(SOLVERS),
}
