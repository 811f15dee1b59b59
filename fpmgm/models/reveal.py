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

import torch

from .generation_config_mgm import MGMGenerationConfig
from .sampling import (
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
        uniforms = self.uniforms[min(step, len(self.uniforms) - 1)][positions].to(device, non_blocking=True)
        drawn, _ = draw_tokens(logits, uniforms, self.mask_token_id, config.temperature, config.top_k, config.top_p)
        if config.final == "argmax" and step == len(self.schedule.reveals) - 1:
            likeliest, _ = draw_tokens(logits, uniforms, self.mask_token_id, temperature=0)
            drawn = torch.where(torch.isin(positions, self.schedule.left_over).to(device), likeliest, drawn)
        written = tokens.flatten().index_copy(0, positions.to(device, non_blocking=True), drawn)
        return self._remask(step, written.view_as(tokens)), _mark(positions, tokens)

    def _remask(self, step: int, tokens: torch.Tensor) -> torch.Tensor:
        positions = self.schedule.remasks[step]
        if len(positions) == 0:
            return tokens
        positions = positions.to(tokens.device, non_blocking=True)
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
        uniforms = self.uniforms[step][positions].to(tokens.device)
        drawn, probabilities = draw_tokens(
            logits, uniforms, self.mask_token_id, config.temperature, config.top_k, config.top_p
        )
        kept = most_confident(probabilities.cpu(), rows, self.counts[step])
        positions, drawn = positions[kept], drawn[kept.to(drawn.device)]
        written = tokens.flatten().index_copy(0, positions.to(tokens.device), drawn)
        return written.view_as(tokens), _mark(positions, tokens)


def ancestral(
    wanted: torch.Tensor,
    real: torch.Tensor,
    num_steps: int,
    mask_token_id: int,
    config: MGMGenerationConfig,
    seed: int | list[int] | None,
    generator: torch.Generator | None,
) -> ScheduledReveal:
    """The ancestral order: each masked position is revealed with probability (P_t − P_s)/P_t."""
    if config.remask is None:
        uniforms = draw_uniforms(2, real, seed, generator)
        schedule, draws = ancestral_schedule(uniforms[0], wanted, num_steps), uniforms[1:]
    else:
        uniforms = draw_uniforms(2 * num_steps, real, seed, generator)
        schedule = remasking_schedule(uniforms[:num_steps], wanted, num_steps, config.remask)
        draws = uniforms[num_steps:]
    return ScheduledReveal(schedule, draws.flatten(1), mask_token_id, config)


def confidence(
    wanted: torch.Tensor,
    real: torch.Tensor,
    num_steps: int,
    mask_token_id: int,
    config: MGMGenerationConfig,
    seed: int | list[int] | None,
    generator: torch.Generator | None,
    count: Callable[[torch.Tensor, int], torch.Tensor] = equal_counts,
) -> ConfidenceReveal:
    """The confidence order: the most probable draws first, as many at each step as `count` says."""
    counts = count(wanted, num_steps)
    uniforms = draw_uniforms(num_steps, real, seed, generator)
    return ConfidenceReveal(counts, uniforms.flatten(1), wanted, mask_token_id, config)


def halton(
    wanted: torch.Tensor,
    real: torch.Tensor,
    num_steps: int,
    mask_token_id: int,
    config: MGMGenerationConfig,
    seed: int | list[int] | None,
    generator: torch.Generator | None,
) -> ScheduledReveal:
    """The order of a Halton sequence on the square of tokens, the same for all sequences."""
    priority = halton_order(math.isqrt(wanted.shape[1])).argsort().expand(wanted.shape)  # place in the order
    schedule = ranked_schedule(priority, wanted, arccos_counts(wanted, num_steps))
    uniforms = draw_uniforms(1, real, seed, generator)
    return ScheduledReveal(schedule, uniforms.flatten(1), mask_token_id, config)


def random(
    wanted: torch.Tensor,
    real: torch.Tensor,
    num_steps: int,
    mask_token_id: int,
    config: MGMGenerationConfig,
    seed: int | list[int] | None,
    generator: torch.Generator | None,
) -> ScheduledReveal:
    """A random order, another one for each sequence."""
    uniforms = draw_uniforms(2, real, seed, generator)
    schedule = ranked_schedule(uniforms[0], wanted, arccos_counts(wanted, num_steps))
    return ScheduledReveal(schedule, uniforms[1:].flatten(1), mask_token_id, config)


# The default first.
TEXT_ORDERS = {"ancestral": ancestral, "confidence": confidence}
IMAGE_ORDERS = {"halton": halton, "random": random, "confidence": partial(confidence, count=arccos_counts)}


def _mark(positions: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    marks = torch.zeros(tokens.numel(), dtype=torch.bool)
    marks[positions] = True
    return marks.view(tokens.shape).to(tokens.device, non_blocking=True)
