# SPDX-License-Identifier: Apache-2.0
"""Which positions `generate` computes at a step, and which it leaves as they are: frozen positions.

A position is active while it is masked and its block has begun, at the step after it was written, and, with a
tolerance, as long as its solution moves by more than that each time it is computed. The others are frozen: they have
keys and values, but no queries, MLP or updates. Their tokens do not change; what changes elsewhere they see when all
positions are computed again, every `refresh_every` steps. A prompt is frozen from the first step on, which computes
everything.

All of it is known on the CPU, without a question to the device, unless there is a tolerance.

Shapes: B batch, L length, R registers, W = L + R positions that a row has, D hidden size, T steps, P positions.
"""

import itertools
from collections.abc import Callable

import torch

from .budget import BudgetPlan, step_costs
from .frozen_states import FrozenStates
from .generation_config_mgm import MGMGenerationConfig
from .layers import wide
from .noise import masked_probability
from .reveal import Turn
from .runs import Runs, rows_to_run
from .schedules import arccos_counts, equal_counts, halton_counts, time_grid


# Orders in which the number of positions that a step reveals is known, in the ancestral one on average.
COUNTED = ("ancestral", "confidence", "halton", "random")


class Frozen:
    """Which positions of each row are computed, and the `states` of all.

    Args:
        wanted, real (`torch.Tensor`): (B, L) bool on the CPU: what `generate` writes, and what is no padding.
        plan ([`BudgetPlan`]): Of the run.
        model_config: Configuration with the layer counts.
        config ([`MGMGenerationConfig`]): Of the call.
    """

    def __init__(self, wanted: torch.Tensor, real: torch.Tensor, plan: BudgetPlan, model_config, config):
        self.states = FrozenStates.empty(model_config)
        self.registers = model_config.num_register_tokens
        self.every, self.tolerance, self.real = config.refresh_every, config.freeze_tolerance, real
        self.reusing = config.reuse != "none" and model_config.num_fixed_point_layers > 0
        self.begun = torch.zeros(len(wanted), 1, dtype=torch.bool, device="cpu")  # rows whose positions were computed
        self.whole = gains_nothing(plan, wanted, real)[:, None]  # (B, 1)
        self.masked = wanted
        self.written = torch.zeros_like(wanted)  # since they were last computed
        self.solution: torch.Tensor | None = None  # the last one that `moving` looked at
        self.moving = real if self.tolerance is not None else torch.zeros_like(wanted)
        # The position-blocks, positions times blocks, that a row may have taken after each step; in whole numbers.
        self.costs = step_costs(model_config, plan.iterations)
        self.spent = torch.zeros(len(wanted), dtype=torch.long, device="cpu")
        self.limits = None
        if plan.shares is not None:
            width = wanted.shape[1] + self.registers
            planned = [round(share * width) * cost for share, cost in zip(plan.shares, self.costs, strict=True)]
            self.limits = torch.tensor(planned, device="cpu").cumsum(0).tolist()
            self.budget = config.budget * width

    def active(self, step: int, turn: Turn) -> torch.Tensor:
        """(B, W) bool, on the CPU: what the step computes, in rows that are unfinished. Of blocks that have not begun,
        nothing."""
        needed = torch.zeros_like(self.masked).flatten().index_fill(0, turn.positions, True).view_as(self.masked)
        refreshed = self.every is not None and step % self.every == 0
        chosen = ((self.masked | self.moving | self.written) & ~turn.waiting) | needed | refreshed | ~self.begun
        chosen = chosen | self.whole
        if not self.reusing:  # a row that needs no logits is idle, as it is alone
            chosen = chosen & needed.any(dim=1, keepdim=True)
        chosen = chosen & turn.unfinished[:, None]
        if self.limits is not None:
            chosen = self._within_budget(step, chosen, needed, self.masked & ~turn.waiting)
        return torch.cat([chosen, chosen.any(dim=1, keepdim=True).expand(-1, self.registers)], dim=1)

    def _within_budget(
        self, step: int, chosen: torch.Tensor, needed: torch.Tensor, left: torch.Tensor
    ) -> torch.Tensor:
        """As many of the `chosen` (B, L) as each row can pay: first what is `needed` (B, L), then what was written,
        then what is masked.

        A plan expects a number of active positions; that of a row is random. What a row has not used it may use later,
        and it keeps what those `left` (B, L) to write need to be computed once more, when they are written.
        """
        later = (left.sum(dim=1) - needed.sum(dim=1)) * max(self.costs[step + 1 :], default=0)
        rest = torch.minimum(self.limits[step] - self.spent, self.budget - self.spent - later)
        paid = torch.maximum(rest // self.costs[step] - self.registers, needed.sum(dim=1))  # (B,)
        fits = (chosen.sum(dim=1, keepdim=True) <= paid[:, None]) | ~self.begun  # (B, 1)
        if fits.all():
            return chosen
        rank = chosen.long()  # from 0, what is not chosen, to 5, what is needed
        for worth, which in enumerate((self.moving, self.masked, self.written, needed), start=2):
            rank = rank.masked_fill(which & chosen, worth)
        place = rank.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        return chosen & (fits | (place < paid[:, None]))

    def runs(self, active, unfinished, copies: int, batch_size: int, classes, alike: bool) -> Runs | None:
        """As `rows_to_run`, but rows with nothing `active` (B, W) are run along: they cost nothing."""
        if alike:
            return rows_to_run(unfinished, copies, batch_size, classes, alike)
        idle, every = ~active.any(dim=1).repeat(copies), torch.arange(copies * batch_size, device="cpu")
        return Runs(every, every, idle) if idle.any() else None

    def options(self, active: torch.Tensor, copies: int) -> dict:
        """What the denoiser is told of a step with `active` (B, W), in a batch of `copies` times B rows."""
        options = {"frozen_states": self.states}
        if self.states.filled and not active.all():  # rows that begin later are not charged for the first step
            options["active_positions"] = active.repeat(copies, 1).flatten().nonzero().squeeze(1)
        return options

    def add(self, step: int, active: torch.Tensor, state: torch.Tensor | None, tokens: torch.Tensor, rule) -> None:
        """Note a step: what was `active` (B, W), and the solutions, `state` (B or 2B, W, D), and `tokens` (B, L) after
        it."""
        length, first = self.masked.shape[1], ~self.begun  # (B, 1): rows that others' steps alone have run before
        self.begun = self.begun | active.any(dim=1, keepdim=True)
        self.spent = self.spent + active.sum(dim=1) * self.costs[step]
        computed = active[:, :length]
        self.written = self.written & ~computed
        if self.tolerance is not None:
            moving = moved(self.solution, state, self.tolerance, len(active))[:, :length] | first
            self.moving, self.solution = torch.where(computed, moving & self.real, self.moving), state
        self.skip(step, tokens, rule)

    def skip(self, step: int, tokens: torch.Tensor, rule) -> None:
        """Note a step without the denoiser, and `tokens` (B, L) after it."""
        masked = rule.masked(step, tokens, self.masked)
        self.written = self.written | (self.masked & ~masked)
        self.masked = masked


class NothingFrozen:
    """The same where all positions are computed, of rows that are not finished."""

    def active(self, step: int, turn: Turn) -> None:
        """All."""

    def runs(self, active: None, unfinished, copies: int, batch_size: int, classes, alike: bool) -> Runs | None:
        """The rows to run."""
        return rows_to_run(unfinished, copies, batch_size, classes, alike)

    def options(self, active: None, copies: int) -> dict:
        """None."""
        return {}

    def add(self, step: int, active: None, state, tokens: torch.Tensor, rule) -> None:
        """Nothing to note."""

    def skip(self, step: int, tokens: torch.Tensor, rule) -> None:
        """Nothing to note."""


def gains_nothing(plan: BudgetPlan, wanted: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """(B,) bool: rows of which nothing is frozen: they have no prompt, and it buys neither a step nor an iteration."""
    buys = plan.shares is None or min(plan.shares) < 1
    return (wanted == real).all(dim=1) & (not buys)


def moved(before: torch.Tensor | None, after: torch.Tensor, tolerance: float, batch_size: int) -> torch.Tensor:
    """Which solutions moved by more than `tolerance` of their norm, in either half under guidance: (B, W) bool, on the
    CPU, for which this waits.

    Args:
        before, after (`torch.Tensor`): (B or 2B, W, D); before the first, `None`.
    """
    if before is None:
        return torch.ones(batch_size, after.shape[1], dtype=torch.bool, device="cpu")
    before, after = (x.to(wide(x.dtype)) for x in (before, after))
    found = (after - before).norm(dim=-1) > tolerance * after.norm(dim=-1)
    return found.unflatten(0, (-1, batch_size)).any(dim=0).cpu()


# --- what a plan expects ------------------------------------------------------------------------------------------


def expected_shares(
    config: MGMGenerationConfig, orders: dict[str, Callable], length: int, registers: int = 0
) -> Callable[[int], list[float]] | None:
    """The share of positions that is active at each of T steps, as a function of T, when all of a sequence is written.

    `None` where it is 1 or not known beforehand: all positions are computed, tokens are masked again, how many are
    revealed at a step depends on the logits, or blocks are written one after the other.

    Args:
        config ([`MGMGenerationConfig`]): Of the call.
        orders (`dict`): Of the model.
        length, registers (`int`): L and R.

    Example:

    ```python
    >>> from fpmgm import FPMDLMForMaskedDiffusion, MGMGenerationConfig
    >>> config = MGMGenerationConfig(freeze=True, order="confidence")
    >>> expected_shares(config, FPMDLMForMaskedDiffusion.orders, length=8)(4)
    [1.0, 1.0, 0.75, 0.5]

    ```

    The first step computes everything, a later one what was masked before the step before it.
    """
    order = next(iter(orders)) if config.order is None else config.order
    if not config.freeze or config.refresh_every == 1 or order not in COUNTED:
        return None
    if config.remask is not None or config.block_length is not None:
        return None
    is_text = "ancestral" in orders
    counted = equal_counts if is_text else arccos_counts

    def masked(num_steps: int) -> list[int]:
        """Positions masked before each step, rounded up."""
        if order == "ancestral":
            times = masked_probability(time_grid(num_steps)[:-1])
            return (length * times / times[0] - 1e-9).ceil().long().tolist()
        if order == "halton" and is_text:
            revealed = itertools.accumulate(halton_counts(length, num_steps)[:-1], initial=0)
            return [length - count for count in revealed]
        counts = counted(torch.ones(1, length, dtype=torch.bool, device="cpu"), num_steps)
        return (length - counts.cumsum(0) + counts).flatten().tolist()

    def shares(num_steps: int) -> list[float]:
        if order != "ancestral" and num_steps > length:  # too many steps for it, or some that reveal nothing
            return [1.0] * num_steps
        before = masked(num_steps)
        counts = [length, *before[:-1]]  # what is masked now, and what the step before has written
        if config.refresh_every is not None:
            counts = [length if step % config.refresh_every == 0 else count for step, count in enumerate(counts)]
        return [(count + registers) / (length + registers) for count in counts]

    return shares
