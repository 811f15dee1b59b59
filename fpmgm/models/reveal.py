# SPDX-License-Identifier: Apache-2.0
"""How the positions of a sequence are revealed over the steps of `generate`: in ancestral order, with or without
masking tokens again, in the order of a Halton sequence or in a random one, by confidence, or as many at each step as
the model is certain of.

In the first three the reveal steps do not depend on the logits, so they are known beforehand, on the host: a step
computes its head at the positions that it reveals and nowhere else (exact, not an approximation), and never asks the
device how many there are. Every rule offers `candidates`, the positions whose logits a step needs, `moment`, at what
time that is, and `write`, which turns logits into tokens; one that `ends_early` has no candidates in a row that is
finished.

Shapes: B batch, L length, V vocabulary, P candidate positions of a step, T steps.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import torch

from .certainty import (
    certain_enough,
    certainty,
    margin,
    most_confident,
    negative_entropy,
    top_probability,
    within_entropy,
)
from .draw import COARSE_TIE, TIE, draw_tokens, draw_uniforms
from .generation_config_mgm import MGMGenerationConfig
from .noise import masked_probability
from .transfer import to_device


SMALLEST_TIME = 1e-5  # the time grid ends here


class RevealSchedule(NamedTuple):
    """T lists of ascending indices into B·L, on the CPU: what each step reveals, and what it masks again after that.

    `left_over` (P,) are the positions that the last step reveals only because nothing comes after it.
    """

    reveals: list[torch.Tensor]
    remasks: list[torch.Tensor]
    left_over: torch.Tensor


# --- which positions when -----------------------------------------------------------------------------------------


def time_grid(num_steps: int) -> torch.Tensor:
    """T + 1 times from 1 to 1e-5 in equal steps, float64."""
    return torch.linspace(1.0, SMALLEST_TIME, num_steps + 1, dtype=torch.float64, device="cpu")


def ancestral_reveal_steps(uniforms: torch.Tensor, num_steps: int) -> torch.Tensor:
    """The step at which each position is revealed by the ancestral sampler, (B, L) in 0..T; T: not revealed.

    A position masked at t stays masked at s < t with probability P_s/P_t, so it is masked after step i with
    probability P(t_{i+1})/P(1): one uniform decides its step.
    """
    remaining = masked_probability(time_grid(num_steps)[1:]) / masked_probability(time_grid(num_steps)[0])
    return torch.searchsorted(-remaining, -uniforms.contiguous())  # the first i with uniform >= P(t_{i+1})/P(1)


def ancestral_schedule(uniforms: torch.Tensor, wanted: torch.Tensor, num_steps: int) -> RevealSchedule:
    """Reveal each position of `wanted` (B, L) at the step that its uniform (B, L) decides, the rest at the last."""
    steps = ancestral_reveal_steps(uniforms, num_steps).masked_fill(~wanted, num_steps + 1).flatten()
    order = steps.argsort(stable=True)
    *reveals, left_over, _ = order.split(torch.bincount(steps, minlength=num_steps + 2).tolist())
    reveals[-1] = torch.cat([reveals[-1], left_over]).sort().values
    return RevealSchedule(reveals, [order[:0]] * num_steps, left_over)


def remasking_schedule(uniforms: torch.Tensor, wanted: torch.Tensor, num_steps: int, cap: float) -> RevealSchedule:
    """The ancestral order, but from t to s a visible token is masked again with probability σ (ReMDM).

    σ = min(cap, (1 − α_s)/α_t) and a masked position is revealed with probability (α_s − (1 − σ)α_t)/(1 − α_t), where
    α is the probability of being visible: the marginals at every step are those of the ancestral sampler.

    Args:
        uniforms (`torch.Tensor`): (T, B, L).
        wanted (`torch.Tensor`): (B, L) bool, what `generate` may write.
        cap (`float`): Largest σ, in (0, 1].
    """
    visible_probability = 1 - masked_probability(time_grid(num_steps))
    masked, reveals, remasks = wanted.clone(), [], []
    for step in range(num_steps):
        now, after = visible_probability[step], visible_probability[step + 1]
        sigma = torch.clamp((1 - after) / now, max=cap)
        revealed = masked & (uniforms[step] < (after - (1 - sigma) * now) / (1 - now))
        remasked = wanted & ~masked & (uniforms[step] < sigma)
        if step == num_steps - 1:
            left_over, revealed, remasked = masked & ~revealed, masked, torch.zeros_like(masked)
        masked = (masked & ~revealed) | remasked
        reveals.append(revealed.flatten().nonzero().squeeze(1))
        remasks.append(remasked.flatten().nonzero().squeeze(1))
    return RevealSchedule(reveals, remasks, left_over.flatten().nonzero().squeeze(1))


def ranked_schedule(priority: torch.Tensor, wanted: torch.Tensor, counts: torch.Tensor) -> RevealSchedule:
    """Reveal the positions of `wanted` (B, L) by rising `priority` (B, L), `counts` (T, B) at each step."""
    num_steps = len(counts)
    ranks = priority.double().masked_fill(~wanted, float("inf")).argsort(dim=1, stable=True).argsort(dim=1)
    steps = torch.searchsorted(counts.T.cumsum(dim=1), ranks, right=True)  # (B, L): the first whose total passes it
    steps = steps.masked_fill(~wanted, num_steps).flatten()
    *reveals, _ = steps.argsort(stable=True).split(torch.bincount(steps, minlength=num_steps + 1).tolist())
    nothing = steps[:0]
    return RevealSchedule(reveals, [nothing] * num_steps, nothing)


def halton_order(side: int) -> torch.Tensor:
    """(side²,) cells of a square, row by row, in the order in which the two-dimensional Halton sequence (bases 2 for
    rows and 3 for columns, from its first point on) visits them: spread evenly at every moment.

    >>> halton_order(2).tolist()
    [2, 1, 0, 3]
    """
    count, cells = 4 * side**2, {}
    while len(cells) < side**2:
        row, column = (_halton_cells(count, base, side) for base in (2, 3))
        cells, count = dict.fromkeys((row * side + column).tolist()), 2 * count  # the first visits count
    return torch.tensor(list(cells), device="cpu")


def _halton_cells(count: int, base: int, side: int) -> torch.Tensor:
    """⌊side · x⌋ of the first `count` points x of the van der Corput sequence, in whole numbers."""
    rest = torch.arange(1, count + 1, device="cpu")
    mirrored, scale = torch.zeros_like(rest), 1
    while rest.any():
        mirrored, rest, scale = mirrored * base + rest % base, rest // base, scale * base
    return mirrored * side // scale


def equal_counts(wanted: torch.Tensor, num_steps: int) -> torch.Tensor:
    """(T, B) tokens that each step reveals in each row of `wanted` (B, L): equal shares, larger ones first.

    Raises:
        `ValueError`: if a row has fewer positions to write than there are steps.
    """
    counts = _count_wanted(wanted, num_steps)
    return counts // num_steps + (torch.arange(num_steps, device="cpu")[:, None] < counts % num_steps)


def arccos_counts(wanted: torch.Tensor, num_steps: int) -> torch.Tensor:
    """(T, B) tokens that each step reveals in each row of `wanted` (B, L): n(1 − arccos(i/T)/(π/2)) of n are visible
    after step i = 1, …, T, rounded down but at least i (Halton-MaskGIT's: few at first, many at last).

    Raises:
        `ValueError`: if a row has fewer positions to write than there are steps.
    """
    counts = _count_wanted(wanted, num_steps)
    steps = torch.arange(1, num_steps + 1, device="cpu")[:, None]
    visible = 1 - torch.arccos(steps.double() / num_steps) / (math.pi / 2)  # (T, 1)
    # 1e-9: a whole number is whole whatever the rounding
    totals = torch.maximum((visible * counts + 1e-9).floor().long(), steps)  # (T, B)
    return totals.diff(dim=0, prepend=torch.zeros_like(totals[:1]))


def _count_wanted(wanted: torch.Tensor, num_steps: int) -> torch.Tensor:
    """(B,) positions to write in each row, at least one for each step."""
    counts = wanted.sum(dim=1)
    if int(counts.min()) < num_steps:
        raise ValueError(
            f"`num_steps`={num_steps} exceeds the {int(counts.min())} masked positions of a row, but in this `order` "
            "each step reveals at least one: give fewer steps or a smaller budget."
        )
    return counts


# --- the orders ----------------------------------------------------------------------------------------------------


class RevealTask(NamedTuple):
    """What an order is given: the positions to write and the real ones, both (B, L) bool on the CPU, in how many
    steps, with which settings and random numbers."""

    wanted: torch.Tensor
    real: torch.Tensor
    num_steps: int
    mask_token_id: int
    config: MGMGenerationConfig
    seed: int | list[int] | None
    generator: torch.Generator | None

    def uniforms(self, count: int) -> torch.Tensor:
        """(count, B, L) float64 in [0, 1)."""
        return draw_uniforms(count, self.real, self.seed, self.generator)


class Moment(NamedTuple):
    """When the denoiser runs, for each row: its diffusion `times`, and how far the way is gone, `places` from 0 at the
    first step to 1, both (B,) float64 on the device."""

    times: torch.Tensor
    places: torch.Tensor


def planned_moment(step: int, num_steps: int, tokens: torch.Tensor) -> Moment:
    """That of the time grid, the same for all rows of `tokens` (B, L)."""
    place = step / (num_steps - 1) if num_steps > 1 else 1.0
    options = {"dtype": torch.float64, "device": tokens.device}
    return Moment(*(torch.full((len(tokens),), x, **options) for x in (time_grid(num_steps)[step].item(), place)))


def moment_of_masks(tokens: torch.Tensor, wanted: torch.Tensor, mask_token_id: int) -> Moment:
    """That of the share of `wanted` (B, L) which is masked still in `tokens` (B, L), as a model saw it in training."""
    masked = ((tokens == mask_token_id) & wanted).sum(dim=1, dtype=torch.float64) / wanted.sum(dim=1)
    return Moment(masked.clamp(min=SMALLEST_TIME), 1 - masked)


@dataclass(frozen=True)
class ScheduledReveal:
    """Reveals, and masks again, the positions that `schedule` names: known before the first step.

    `uniforms` (1 or T, B·L) draw the tokens, one for each position or one for each position and step.
    """

    ends_early: ClassVar[bool] = False
    schedule: RevealSchedule
    uniforms: torch.Tensor
    mask_token_id: int
    config: MGMGenerationConfig

    def moment(self, step: int, tokens: torch.Tensor) -> Moment:
        """That of the time grid."""
        return planned_moment(step, len(self.schedule.reveals), tokens)

    def candidates(self, step: int, tokens: torch.Tensor) -> torch.Tensor:
        """(P,) ascending indices into B·L, on the CPU."""
        reveals = self.schedule.reveals[step]
        if self.config.final == "none" and step == len(self.schedule.reveals) - 1:
            return reveals[~torch.isin(reveals, self.schedule.left_over)]
        return reveals

    def write(
        self, step: int, tokens: torch.Tensor, positions: torch.Tensor, logits: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens after the step, (B, L), and what it revealed, (B, L) bool."""
        config, device = self.config, tokens.device
        if len(positions) == 0:
            return self._remask(step, tokens), torch.zeros_like(tokens, dtype=torch.bool)
        uniforms = to_device(self.uniforms[min(step, len(self.uniforms) - 1)][positions], device)
        drawn, _ = draw_tokens(logits, uniforms, self.mask_token_id, config.temperature, config.top_k, config.top_p)
        if config.final == "argmax" and step == len(self.schedule.reveals) - 1:
            likeliest, _ = draw_tokens(logits, uniforms, self.mask_token_id, temperature=0)
            drawn = torch.where(to_device(torch.isin(positions, self.schedule.left_over), device), likeliest, drawn)
        tokens, revealed = _write(tokens, to_device(positions, device), drawn)
        return self._remask(step, tokens), revealed

    def _remask(self, step: int, tokens: torch.Tensor) -> torch.Tensor:
        positions = self.schedule.remasks[step]
        if len(positions) == 0:
            return tokens
        positions = to_device(positions, tokens.device)
        return tokens.flatten().index_fill(0, positions, self.mask_token_id).view_as(tokens)


@dataclass(frozen=True)
class ConfidenceReveal:
    """Draws every masked token at each step and keeps the `counts` (T, B) most probable draws of each row."""

    ends_early: ClassVar[bool] = False
    counts: torch.Tensor
    uniforms: torch.Tensor
    wanted: torch.Tensor
    mask_token_id: int
    config: MGMGenerationConfig

    def moment(self, step: int, tokens: torch.Tensor) -> Moment:
        """That of the time grid."""
        return planned_moment(step, len(self.counts), tokens)

    def candidates(self, step: int, tokens: torch.Tensor) -> torch.Tensor:
        """(P,) ascending indices into B·L, on the CPU; which positions are left is known on the device."""
        return _masked(tokens, self.wanted, self.mask_token_id)

    def write(
        self, step: int, tokens: torch.Tensor, positions: torch.Tensor, logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens after the step, (B, L), and what it revealed, (B, L) bool."""
        config, rows = self.config, positions // tokens.shape[1]
        uniforms = to_device(self.uniforms[step][positions], tokens.device)
        drawn, probabilities = draw_tokens(
            logits, uniforms, self.mask_token_id, config.temperature, config.top_k, config.top_p
        )
        kept = most_confident(probabilities.cpu(), rows, self.counts[step], _tie(logits))
        return _write(tokens, to_device(positions[kept], tokens.device), drawn[to_device(kept, drawn.device)])


@dataclass(frozen=True)
class AdaptiveReveal:
    """Reveals at each step the positions that `choose` finds certain enough together by their `measure`, at least one
    in each row, and at the last of `num_steps` all that are left. `uniforms` (B·L,) draw the tokens."""

    ends_early: ClassVar[bool] = True
    measure: Callable[[torch.Tensor], torch.Tensor]
    choose: Callable[..., torch.Tensor]
    bound: float
    num_steps: int
    uniforms: torch.Tensor
    wanted: torch.Tensor
    mask_token_id: int
    config: MGMGenerationConfig

    def moment(self, step: int, tokens: torch.Tensor) -> Moment:
        """That of the masks that are left: how many depends on the row."""
        return moment_of_masks(tokens, to_device(self.wanted, tokens.device), self.mask_token_id)

    def candidates(self, step: int, tokens: torch.Tensor) -> torch.Tensor:
        """(P,) ascending indices into B·L, on the CPU; which positions are left is known on the device."""
        return _masked(tokens, self.wanted, self.mask_token_id)

    def write(
        self, step: int, tokens: torch.Tensor, positions: torch.Tensor, logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens after the step, (B, L), and what it revealed, (B, L) bool."""
        config, device = self.config, tokens.device
        certainties = certainty(logits, self.mask_token_id, self.measure).cpu()
        kept = self.choose(certainties, positions // tokens.shape[1], self.bound, _tie(logits))
        sure = torch.zeros(len(positions), dtype=torch.bool, device="cpu").index_fill(0, kept, True)
        if step == self.num_steps - 1 and config.final != "none":
            kept = torch.arange(len(positions), device="cpu")
        chosen, logits = positions[kept], logits[to_device(kept, device)]
        uniforms = to_device(self.uniforms[chosen], device)
        drawn, _ = draw_tokens(logits, uniforms, self.mask_token_id, config.temperature, config.top_k, config.top_p)
        if config.final == "argmax" and len(kept) > int(sure.sum()):
            likeliest, _ = draw_tokens(logits, uniforms, self.mask_token_id, temperature=0)
            drawn = torch.where(to_device(sure, device), drawn, likeliest)
        return _write(tokens, to_device(chosen, device), drawn)


def ancestral(task: RevealTask) -> ScheduledReveal:
    """The ancestral order: each masked position is revealed with probability (P_t − P_s)/P_t."""
    steps, remask = task.num_steps, task.config.remask
    if remask is None:
        uniforms = task.uniforms(2)
        schedule, draws = ancestral_schedule(uniforms[0], task.wanted, steps), uniforms[1:]
    else:
        uniforms = task.uniforms(2 * steps)
        schedule, draws = remasking_schedule(uniforms[:steps], task.wanted, steps, remask), uniforms[steps:]
    return ScheduledReveal(schedule, draws.flatten(1), task.mask_token_id, task.config)


def confidence(
    task: RevealTask, count: Callable[[torch.Tensor, int], torch.Tensor] = equal_counts
) -> ConfidenceReveal:
    """The confidence order: the most probable draws first, as many at each step as `count` says."""
    counts, uniforms = count(task.wanted, task.num_steps), task.uniforms(task.num_steps)
    return ConfidenceReveal(counts, uniforms.flatten(1), task.wanted, task.mask_token_id, task.config)


def entropy(task: RevealTask) -> AdaptiveReveal:
    """The most certain positions whose tokens depend on each other by no more than `entropy_bound` nats."""
    return _adaptive(task, negative_entropy, within_entropy, task.config.entropy_bound)


def threshold(task: RevealTask) -> AdaptiveReveal:
    """All positions whose most likely token has at least the probability `confidence_threshold`."""
    return _adaptive(task, top_probability, certain_enough, task.config.confidence_threshold)


def two_likeliest(task: RevealTask) -> AdaptiveReveal:
    """All positions whose two most likely tokens differ by at least `margin_threshold` in probability."""
    return _adaptive(task, margin, certain_enough, task.config.margin_threshold)


def _adaptive(task: RevealTask, measure: Callable, choose: Callable, bound: float) -> AdaptiveReveal:
    uniforms = task.uniforms(1).flatten()
    return AdaptiveReveal(
        measure, choose, bound, task.num_steps, uniforms, task.wanted, task.mask_token_id, task.config
    )


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
    return ScheduledReveal(schedule, draws.flatten(1), task.mask_token_id, task.config)


ADAPTIVE_ORDERS = {"entropy": entropy, "threshold": threshold, "margin": two_likeliest}
# The default first.
TEXT_ORDERS = {"ancestral": ancestral, "confidence": confidence, **ADAPTIVE_ORDERS}
IMAGE_ORDERS = {
    "halton": halton,
    "random": random,
    "confidence": partial(confidence, count=arccos_counts),
    **ADAPTIVE_ORDERS,
}


def _masked(tokens: torch.Tensor, wanted: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    """Where `wanted` (B, L), on the CPU, is masked in `tokens` (B, L): (P,) ascending indices into B·L, on the CPU."""
    return ((tokens == mask_token_id).cpu() & wanted).flatten().nonzero().squeeze(1)


def _tie(logits: torch.Tensor) -> float:
    return TIE if logits.dtype == torch.float64 else COARSE_TIE


def _write(tokens: torch.Tensor, positions: torch.Tensor, drawn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`tokens` (B, L) with those `drawn` (P,) at `positions`, and where these are, (B, L) bool."""
    written = tokens.flatten().index_copy(0, positions, drawn)
    revealed = torch.zeros_like(written, dtype=torch.bool).index_fill(0, positions, True)
    return written.view_as(tokens), revealed.view_as(tokens)
