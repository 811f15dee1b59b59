# SPDX-License-Identifier: Apache-2.0
"""How the positions of a sequence are revealed over the steps of `generate`: in ancestral order, with or without
masking tokens again, in the order of a Halton sequence (of one dimension for text, of two for images) or in a random
one, by confidence, or as many at each step as the model is certain of.

In the first three the reveal steps do not depend on the logits, so they are known beforehand, on the host: a step
computes its head at the positions that it reveals and nowhere else (exact, not an approximation), and never asks the
device how many there are. Every rule offers `turn`, what a step is about, a `clock`, `write`, which turns logits into
tokens, and for frozen positions `masked`, what is left to write.

With `block_length` a sequence is written block by block: each order does within the steps of a block what it does
otherwise within all.

Shapes: B batch, L length, V vocabulary, P candidate positions of a step, T steps.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import torch

from .arguments import shown
from .blocks import Windows, block_windows, whole_window
from .certainty import (
    certain_enough,
    certainty,
    margin,
    most_certain,
    most_confident,
    negative_entropy,
    ranked,
    top_probability,
    within_entropy,
)
from .draw import COARSE_TIE, TIE, draw_tokens, draw_uniforms
from .generation_config_mgm import MGMGenerationConfig
from .schedules import (
    SMALLEST_TIME,
    RevealSchedule,
    ancestral_schedule,
    arccos_counts,
    equal_counts,
    halton_order,
    ranked_schedule,
    remasking_schedule,
    spread_schedule,
    time_grid,
)
from .transfer import to_device


# --- the orders ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class RevealTask:
    """What an order is given: the positions to write and the real ones, both (B, L) bool on the CPU, in how many
    steps, with which settings and random numbers."""

    wanted: torch.Tensor
    real: torch.Tensor
    num_steps: int
    mask_token_id: int
    config: MGMGenerationConfig
    seed: int | list[int] | None
    generator: torch.Generator | None

    @cached_property
    def windows(self) -> Windows:
        """The steps of each position: those of its block, or all."""
        if self.config.block_length is None:
            return whole_window(self.wanted, self.num_steps)
        return block_windows(self.wanted, self.num_steps, self.config.block_length)

    @property
    def clock(self) -> "Clock":
        """The time of each step: that of the masks left where these are not spread as in the ancestral order."""
        uneven = self.config.block_length is not None or self.config.stop_at_eos
        return Clock(self.num_steps, self.wanted if uneven else None)

    def uniforms(self, count: int) -> torch.Tensor:
        """(count, B, L) float64 in [0, 1)."""
        return draw_uniforms(count, self.real, self.seed, self.generator)

    def still_masked(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, L) bool, on the CPU: what is left to write in `tokens` (B, L)."""
        return (tokens == self.mask_token_id).cpu() & self.wanted

    def draw(self, logits: torch.Tensor, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (P,) of `logits` (P, V), sharpened and cut as asked, and their probabilities."""
        config = self.config
        return draw_tokens(logits, uniforms, self.mask_token_id, config.temperature, config.top_k, config.top_p)

    def likeliest(self, where: torch.Tensor, drawn: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """`drawn` (P,), but the most likely tokens of `logits` (P, V) `where` (P,) that is asked for, on the CPU."""
        if not where.any():
            return drawn
        zeros = torch.zeros_like(drawn, dtype=torch.float64)
        likeliest, _ = draw_tokens(logits, zeros, self.mask_token_id, temperature=0)
        return torch.where(to_device(where, drawn.device), likeliest, drawn)


class Moment(NamedTuple):
    """When the denoiser runs, for each row: its diffusion `times`, and how far the way is gone, `places` from 0 at the
    first step to 1, both (B,) float64 on the device."""

    times: torch.Tensor
    places: torch.Tensor


class Clock(NamedTuple):
    """When a step is: by the grid of `num_steps`, or, where `wanted` (B, L) is given, by the share of it that is
    masked still, which is what a model saw in training."""

    num_steps: int
    wanted: torch.Tensor | None = None

    def moment(self, step: int, masked: torch.Tensor) -> Moment:
        """That of a step before which some positions are `masked` (B, L)."""
        options = {"dtype": torch.float64, "device": masked.device}
        if self.wanted is None:
            place = step / (self.num_steps - 1) if self.num_steps > 1 else 1.0
            time = time_grid(self.num_steps)[step].item()
            return Moment(*(torch.full((len(masked),), x, **options) for x in (time, place)))
        wanted = to_device(self.wanted, masked.device)
        share = (masked & wanted).sum(dim=1, dtype=torch.float64) / wanted.sum(dim=1)
        return Moment(share.clamp(min=SMALLEST_TIME), 1 - share)


class Turn(NamedTuple):
    """What a step is about, on the CPU: the `positions` (P,) whose logits it needs, ascending indices into B·L; which
    rows are `unfinished`, (B,) bool; and which positions are `waiting` for their block, (B, L) bool."""

    positions: torch.Tensor
    unfinished: torch.Tensor
    waiting: torch.Tensor


@dataclass(frozen=True)
class ScheduledReveal:
    """Reveals, and masks again, the positions that `schedule` names: known before the first step.

    `uniforms` (1 or T, B·L) draw the tokens, one for each position or one for each position and step.
    """

    task: RevealTask
    schedule: RevealSchedule
    uniforms: torch.Tensor
    clock: Clock

    def turn(self, step: int, tokens: torch.Tensor) -> Turn:
        """Each row takes all steps up to its last one."""
        return Turn(self._reveals(step), self.last >= step, self.task.windows.first > step)

    @cached_property
    def last(self) -> torch.Tensor:
        """(B,) the last step that writes or masks anything in each row, -1 where none does."""
        last = torch.full((len(self.task.wanted),), -1, device="cpu")
        for step, again in enumerate(self.schedule.remasks):
            last[torch.cat([self._reveals(step), again]) // self.task.wanted.shape[1]] = step
        return last

    def write(
        self, step: int, tokens: torch.Tensor, positions: torch.Tensor, logits: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens after the step, (B, L), and what it revealed, (B, L) bool."""
        if len(positions) == 0:
            return self._remask(step, tokens), torch.zeros_like(tokens, dtype=torch.bool)
        uniforms = to_device(self.uniforms[min(step, len(self.uniforms) - 1)][positions], tokens.device)
        drawn, _ = self.task.draw(logits, uniforms)
        if self.task.config.final == "argmax":
            drawn = self.task.likeliest(torch.isin(positions, self.schedule.left_over), drawn, logits)
        tokens, revealed = _write(tokens, to_device(positions, tokens.device), drawn)
        return self._remask(step, tokens), revealed

    def masked(self, step: int, tokens: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """(B, L) bool, on the CPU: what is masked after the step, of what was masked `before` it."""
        flat = before.flatten().index_fill(0, self._reveals(step), False)
        return flat.index_fill(0, self.schedule.remasks[step], True).view_as(before)

    def _reveals(self, step: int) -> torch.Tensor:
        reveals = self.schedule.reveals[step]
        if self.task.config.final == "none":
            return reveals[~torch.isin(reveals, self.schedule.left_over)]
        return reveals

    def _remask(self, step: int, tokens: torch.Tensor) -> torch.Tensor:
        positions = self.schedule.remasks[step]
        if len(positions) == 0:
            return tokens
        positions = to_device(positions, tokens.device)
        return tokens.flatten().index_fill(0, positions, self.task.mask_token_id).view_as(tokens)


@dataclass(frozen=True)
class ConfidenceReveal:
    """Draws the masked tokens whose turn it is at each step and keeps the `counts` (T, B) most probable draws of each
    row; `uniforms` (T, B·L) draw them."""

    task: RevealTask
    counts: torch.Tensor
    uniforms: torch.Tensor
    clock: Clock

    def turn(self, step: int, tokens: torch.Tensor) -> Turn:
        """Each row takes all steps until it is written; which positions are left is known on the device."""
        windows, masked = self.task.windows, self.task.still_masked(tokens)
        begun = windows.first <= step
        now = masked & begun & (step <= windows.last)
        return Turn(now.flatten().nonzero().squeeze(1), masked.any(dim=1), ~begun)

    def masked(self, step: int, tokens: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """(B, L) bool, on the CPU: what is masked in `tokens` (B, L)."""
        return self.task.still_masked(tokens)

    def write(
        self, step: int, tokens: torch.Tensor, positions: torch.Tensor, logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens after the step, (B, L), and what it revealed, (B, L) bool."""
        drawn, probabilities = self.task.draw(logits, to_device(self.uniforms[step][positions], tokens.device))
        kept = most_confident(probabilities.cpu(), positions // tokens.shape[1], self.counts[step], _tie(logits))
        return _write(tokens, to_device(positions[kept], tokens.device), drawn[to_device(kept, drawn.device)])


@dataclass(frozen=True)
class AdaptiveReveal:
    """Reveals at each step the positions that `choose` finds certain enough together by their `measure`, and in each
    row at least as many as leave the last step of its window no more than the others. `uniforms` (B·L,) draw the
    tokens.

    A row goes on to its next block when one is written: steps that it did not need there it may take here.
    """

    task: RevealTask
    measure: Callable[[torch.Tensor], torch.Tensor]
    choose: Callable[..., torch.Tensor]
    bound: float
    uniforms: torch.Tensor
    clock: Clock

    def turn(self, step: int, tokens: torch.Tensor) -> Turn:
        """The first block of each row that is not written; which positions are left is known on the device."""
        masked = self.task.still_masked(tokens) & (step <= self.task.windows.last)
        last = self.task.windows.last.masked_fill(~masked, self.task.num_steps)
        now = masked & (last == last.amin(dim=1, keepdim=True))
        positions = now.flatten().nonzero().squeeze(1)
        return Turn(positions, now.any(dim=1), masked & ~now)

    def masked(self, step: int, tokens: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """(B, L) bool, on the CPU: what is masked in `tokens` (B, L)."""
        return self.task.still_masked(tokens)

    def write(
        self, step: int, tokens: torch.Tensor, positions: torch.Tensor, logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens after the step, (B, L), and what it revealed, (B, L) bool."""
        task, device, tie = self.task, tokens.device, _tie(logits)
        last = task.windows.last.flatten()[positions]  # (P,) one of each row
        certainties = certainty(logits, task.mask_token_id, self.measure).cpu()
        ranking = ranked(certainties, positions // tokens.shape[1], tie)
        sure, due = self.choose(ranking, self.bound, tie), most_certain(ranking, last - step + 1)
        left_over = (last == step).index_fill(0, sure, False)
        kept = torch.zeros_like(left_over).index_fill(0, torch.cat([sure, due]), True)
        kept = (kept & ~left_over if task.config.final == "none" else kept).nonzero().squeeze(1)
        chosen, logits = positions[kept], logits[to_device(kept, device)]
        drawn, _ = task.draw(logits, to_device(self.uniforms[chosen], device))
        if task.config.final == "argmax":
            drawn = task.likeliest(left_over[kept], drawn, logits)
        return _write(tokens, to_device(chosen, device), drawn)


def ancestral(task: RevealTask) -> ScheduledReveal:
    """The ancestral order: each masked position is revealed with probability (P_t − P_s)/P_t."""
    steps, remask, windows = task.num_steps, task.config.remask, task.windows
    if remask is None:
        uniforms = task.uniforms(2)
        schedule, draws = ancestral_schedule(uniforms[0], task.wanted, steps, windows), uniforms[1:]
    else:
        uniforms = task.uniforms(2 * steps)
        schedule, draws = remasking_schedule(uniforms[:steps], task.wanted, steps, remask, windows), uniforms[steps:]
    return ScheduledReveal(task, schedule, draws.flatten(1), task.clock)


def text_halton(task: RevealTask) -> ScheduledReveal:
    """Far apart, few at first: tokens of one step do not see each other, and near ones depend on each other most."""
    uniforms = task.uniforms(2)
    schedule = spread_schedule(uniforms[0], task.wanted, task.num_steps, task.windows)
    return ScheduledReveal(task, schedule, uniforms[1:].flatten(1), Clock(task.num_steps, task.wanted))


def confidence(task: RevealTask) -> ConfidenceReveal:
    """The most probable draws first, equally many at each step."""
    counts = equal_counts(task.wanted, task.num_steps, task.windows)
    return ConfidenceReveal(task, counts, task.uniforms(task.num_steps).flatten(1), task.clock)


def image_confidence(task: RevealTask) -> ConfidenceReveal:
    """The same, as many at each step as the arccosine says."""
    counts = arccos_counts(task.wanted, task.num_steps)
    return ConfidenceReveal(task, counts, task.uniforms(task.num_steps).flatten(1), task.clock)


def adaptive(measure: Callable, choose: Callable, bound: str, task: RevealTask) -> AdaptiveReveal:
    """The positions that are certain enough together by their `measure`, as the option `bound` has it."""
    uniforms, clock = task.uniforms(1).flatten(), Clock(task.num_steps, task.wanted)
    return AdaptiveReveal(task, measure, choose, getattr(task.config, bound), uniforms, clock)


def halton(task: RevealTask) -> ScheduledReveal:
    """The order of a Halton sequence on the square of tokens, the same for all sequences."""
    side = math.isqrt(task.wanted.shape[1])
    priority = halton_order(side).argsort().expand(task.wanted.shape)  # place in the order
    return _ranked(task, priority, task.uniforms(1))


def random(task: RevealTask) -> ScheduledReveal:
    """A random order, another one for each sequence."""
    uniforms = task.uniforms(2)
    return _ranked(task, uniforms[0], uniforms[1:])


def _ranked(task: RevealTask, priority: torch.Tensor, draws: torch.Tensor) -> ScheduledReveal:
    """By ascending `priority` (B, L), as many at each step as the arccosine says; `draws` (1, B, L)."""
    schedule = ranked_schedule(priority, task.wanted, arccos_counts(task.wanted, task.num_steps))
    return ScheduledReveal(task, schedule, draws.flatten(1), task.clock)


# How certain a position is, which are revealed together, and the option that bounds this.
ADAPTIVE = {
    "entropy": (negative_entropy, within_entropy, "entropy_bound"),
    "threshold": (top_probability, certain_enough, "confidence_threshold"),
    "margin": (margin, certain_enough, "margin_threshold"),
}
ADAPTIVE_ORDERS = {name: partial(adaptive, *how) for name, how in ADAPTIVE.items()}
# The default first.
TEXT_ORDERS = {"ancestral": ancestral, "halton": text_halton, "confidence": confidence, **ADAPTIVE_ORDERS}
IMAGE_ORDERS = {"halton": halton, "random": random, "confidence": image_confidence, **ADAPTIVE_ORDERS}


def _tie(logits: torch.Tensor) -> float:
    return TIE if logits.dtype == torch.float64 else COARSE_TIE


def _write(tokens: torch.Tensor, positions: torch.Tensor, drawn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`tokens` (B, L) with those `drawn` (P,) at `positions`, and where these are, (B, L) bool."""
    written = tokens.flatten().index_copy(0, positions, drawn)
    revealed = torch.zeros_like(written, dtype=torch.bool).index_fill(0, positions, True)
    return written.view_as(tokens), revealed.view_as(tokens)


def check_order(order: str, config: MGMGenerationConfig, given: Iterable[str], is_text: bool) -> None:
    """Raise a `ValueError` for what an order cannot honour, and for another's bound among what the caller has `given`.

    What an adaptive order does at its last step is `final`'s to say. None masks a token again: ReMDM's shares are made
    for the steps of the ancestral order.
    """
    if config.remask is not None and order != "ancestral":
        raise ValueError(
            f"`remask`={config.remask!r} needs `order`='ancestral', not {order!r}, which writes each token once."
        )
    if config.final != "sample" and order != "ancestral" and order not in ADAPTIVE_ORDERS:
        raise ValueError(
            f"`final`={config.final!r} needs `order`='ancestral' or one of {tuple(ADAPTIVE_ORDERS)}, not {order!r}, "
            "which leaves no token out."
        )
    for name, neutral in (("block_length", None), ("stop_at_eos", False)):
        if not is_text and getattr(config, name) != neutral:
            raise ValueError(f"`{name}`={getattr(config, name)!r} is about text, which an image is not: leave it out.")
    if config.stop_at_eos and config.remask is not None:
        raise ValueError(
            f"`stop_at_eos`=True and `remask`={config.remask!r} exclude each other: an end of text that is masked "
            "again would leave what is behind it unwritten. Give one of them."
        )
    for whose, (_, _, name) in ADAPTIVE.items():
        if name in given and order != whose:
            raise ValueError(f"`{name}`={shown(getattr(config, name))} needs `order`={whose!r}, not {order!r}.")
