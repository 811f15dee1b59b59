# SPDX-License-Identifier: Apache-2.0
"""Reuse of the previous step's fixed point as the start of the next: none, full, three-state (Algorithm 1).

Beyond the paper, a fourth state serves samplers that take tokens back: a position that was visible and is masked
again, or holds another token.

Pure functions of the two token states and the two hidden states. Shapes: B batch, L length, D hidden size.
"""

from typing import Any, NamedTuple

import torch
from torch.nn import functional as F


REUSES = ("none", "full", "3sr")
GAMMAS = ("gamma_unchanged", "gamma_masked", "gamma_changed", "gamma_remasked")
REUSE_STATES = ("changed", "unchanged", "masked", "remasked")  # what happened to a position since the previous step


class Solution(NamedTuple):
    """A step's fixed point: `state` (B, L, D), solved for the tokens `input_ids` (B, L)."""

    input_ids: torch.Tensor
    state: torch.Tensor


def reuse_states(previous_ids: torch.Tensor, input_ids: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    """What happened to each position since the previous step, as an index into `REUSE_STATES`.

    Args:
        previous_ids, input_ids (`torch.Tensor`): (B, L) token ids of the previous and of this step.

    Returns:
        `torch.Tensor`: (B, L) int64: 0 revealed since, 1 unchanged and visible, 2 still masked, 3 masked again or
        rewritten.
    """
    unchanged, was_masked = previous_ids == input_ids, previous_ids == mask_token_id
    return torch.where(unchanged, 1 + was_masked.long(), 3 * (~was_masked).long())


def reuse_weights(
    states: torch.Tensor,
    visible_fraction: torch.Tensor,
    reuse: str,
    gamma_unchanged: float = 1.0,
    gamma_masked: tuple[float, float] = (0.75, 0.9),
    gamma_changed: float = 0.2,
    gamma_remasked: float = 0.2,
) -> torch.Tensor:
    """The share γ of the previous solution in the next start, (B, L) (Algorithm 1, line 16).

    Args:
        states (`torch.Tensor`): (B, L) from [`reuse_states`].
        visible_fraction (`torch.Tensor`): (B,) share v of real positions that are not masked, the prompt included.
        reuse (`str`): `"full"` (γ = 1 everywhere) or `"3sr"`.
        gamma_unchanged, gamma_changed, gamma_remasked (`float`): γ of unchanged visible positions, of revealed ones,
            and of those masked again or rewritten.
        gamma_masked (`tuple[float, float]`): γ of still masked positions at v = 0 and at v = 1, linear between.
    """
    if reuse == "full":
        return torch.ones_like(states, dtype=torch.float32)
    low, high = gamma_masked
    masked = (low + (high - low) * visible_fraction)[:, None]
    # Each beside a tensor, whose type the result has, and not PyTorch's default.
    weights = torch.where(states == 1, gamma_unchanged, masked)
    weights = torch.where(states == 0, gamma_changed, weights)
    return torch.where(states == 3, gamma_remasked, weights)


def visible_fraction(
    input_ids: torch.Tensor, mask_token_id: int, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """(B,) float32: share of real positions that are not masked."""
    visible = (input_ids != mask_token_id).float()
    if attention_mask is None:
        return visible.mean(dim=1)
    return (visible * attention_mask).sum(dim=1) / attention_mask.sum(dim=1)


def step_weights(
    previous_ids: torch.Tensor,
    input_ids: torch.Tensor,
    model_config: Any,
    reuse: str,
    config: Any,
    attention_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reuse states of a step and its γ, both (B, L + R): registers come last, like positions that are masked still.

    Args:
        previous_ids, input_ids (`torch.Tensor`): (B, L) token ids of the previous and of this step.
        model_config: The model's.
        reuse (`str`): `"full"` or `"3sr"`.
        config ([`MGMGenerationConfig`]): Has the γ.
        attention_mask (`torch.Tensor`, *optional*): (B, L), 0 at padding. `None`: there is none.
    """
    mask, registers = model_config.mask_token_id, model_config.num_register_tokens
    states = reuse_states(*(F.pad(ids, (0, registers), value=mask) for ids in (previous_ids, input_ids)), mask)
    visible = visible_fraction(input_ids, mask, attention_mask)
    return states, reuse_weights(states, visible, reuse, **{name: getattr(config, name) for name in GAMMAS})


def warm_start(
    h_pre: torch.Tensor, previous_state: torch.Tensor | None = None, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """h⁰ = γ⊙h*_prev + (1 − γ)⊙h_pre, (B, L, D) (Algorithm 1, line 17).

    Args:
        h_pre (`torch.Tensor`): (B, L, D) output of the pre-stack, or (P, D) of some positions, as the others are then.
        previous_state (`torch.Tensor`, *optional*): (B, L, D) previous solution. `None`: start from `h_pre`.
        weights (`torch.Tensor`, *optional*): (B, L) γ. `None`: 1 everywhere.
    """
    if previous_state is None:
        return h_pre
    if weights is None:
        return previous_state
    return torch.lerp(h_pre, previous_state, weights[..., None].to(h_pre.dtype))
