# SPDX-License-Identifier: Apache-2.0
"""How the positions of a sequence are revealed over the steps of `generate`: in ancestral order, with or without
masking tokens again, by confidence, in the order of a Halton sequence or in a random one.

Both rules offer `candidates`, the positions whose logits a step needs, and `write`, which turns logits into tokens.

Shapes: B batch, L length, V vocabulary, P candidate positions of a step, T steps.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from .generation_config_mgm import MGMGenerationConfig
from .sampling import (
    COARSE_TIE,
    TIE,
    RevealSchedule,
    ancestral_schedule,
    arccos_counts,
    draw_tokens,
    draw_uniforms,
    equal_counts,
    halton_order,
    most_confident,
    ranked_schedule,
    remasking_schedule,
)
from .transfer import to_device


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


@dataclass(frozen=True)
class ScheduledReveal:
    """Reveals, and masks again, the positions that `schedule` names: known before the first step.

    `uniforms` (1 or T, B·L) draw the tokens, one for each position or one for each position and step.
    """

    schedule: RevealSchedule
    uniforms: torch.Tensor
    mask_token_id: int
    config: MGMGenerationConfig

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

    counts: torch.Tensor
    uniforms: torch.Tensor
    wanted: torch.Tensor
    mask_token_id: int
    config: MGMGenerationConfig

    def candidates(self, step: int, tokens: torch.Tensor) -> torch.Tensor:
        """(P,) ascending indices into B·L, on the CPU; which positions are left is known on the device."""
        masked = (tokens == self.mask_token_id).cpu() & self.wanted
        return masked.flatten().nonzero().squeeze(1)

    def write(
        self, step: int, tokens: torch.Tensor, positions: torch.Tensor, logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens after the step, (B, L), and what it revealed, (B, L) bool."""
        config, rows = self.config, positions // tokens.shape[1]
        uniforms = to_device(self.uniforms[step][positions], tokens.device)
        drawn, probabilities = draw_tokens(
            logits, uniforms, self.mask_token_id, config.temperature, config.top_k, config.top_p
        )
        tie = TIE if logits.dtype == torch.float64 else COARSE_TIE
        kept = most_confident(probabilities.cpu(), rows, self.counts[step], tie)
        return _write(tokens, to_device(positions[kept], tokens.device), drawn[to_device(kept, drawn.device)])


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


# The default first.
TEXT_ORDERS = {"ancestral": ancestral, "confidence": confidence}
IMAGE_ORDERS = {"halton": halton, "random": random, "confidence": partial(confidence, count=arccos_counts)}


def _write(tokens: torch.Tensor, positions: torch.Tensor, drawn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`tokens` (B, L) with those `drawn` (P,) at `positions`, and where these are, (B, L) bool."""
    written = tokens.flatten().index_copy(0, positions, drawn)
    revealed = torch.zeros_like(written, dtype=torch.bool).index_fill(0, positions, True)
    return written.view_as(tokens), revealed.view_as(tokens)
