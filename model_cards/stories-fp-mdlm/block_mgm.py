# SPDX-License-Identifier: Apache-2.0
"""What the transformer blocks of all kinds share: attention and an MLP, each after a norm that the conditioning vector
modulates and before a gate, at all positions or at some.

A kind's attention says what its heads are, its block which norm it has and what its MLP is.

Shapes: B batch, L length, D hidden size, H heads, K head size, N positions that are computed, P positions, Q queries.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .frozen_states import KeyValuesPart
from .layers import Modulation, draw_kept, eager_attention_forward, gated_residual
from .selection import Selection


class MGMAttention(nn.Module):
    """Bidirectional self-attention through Hugging Face's attention interface (SDPA by default).

    The inner width is heads × head size, which need not be D.
    """

    is_causal = False

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.config = config
        self.head_size = config.hidden_size // config.num_attention_heads
        inner_size = config.num_attention_heads * self.head_size
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * inner_size, bias=False)
        self.o_proj = nn.Linear(inner_size, config.hidden_size, bias=False)

    def heads(
        self, qkv: torch.Tensor, rotary: Any, wanted: Callable
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries (B, L or Q, H, K), keys and values (B, L, H, K) of their projections, (B, L, 3·H·K).

        `wanted` leaves of queries (B, L, …) those that are asked for.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what its heads are.")

    def forward(
        self,
        x: torch.Tensor,
        rotary: Any,
        attention_mask: torch.Tensor | None,
        selection: Selection | None = None,
        key_values: KeyValuesPart | None = None,
    ) -> torch.Tensor:
        """(B, L, D), or (P, D) with queries at the selected positions only (keys and values are everywhere).

        `x` of some positions, (N, D), with their `rotary`, has the others' keys and values in `key_values`.
        """

        def wanted(query: torch.Tensor) -> torch.Tensor:
            return query if selection is None else selection.pad(selection.pick(query.flatten(0, 1)))

        x = x if x.dim() == 3 else x[None]
        query, key, value = self.heads(self.qkv_proj(x), rotary, wanted)
        if key_values is not None:
            key, value = key_values.update(key, value)
        if selection is not None and attention_mask is not None:
            attention_mask = attention_mask[:, :, :1]  # the same for every query
        query, key, value = (z.transpose(1, 2) for z in (query, key, value))  # (B, H, Q or L, K)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        out, _ = attend(self, query, key, value, attention_mask, scaling=self.head_size**-0.5, dropout=0.0)
        out = out.flatten(2)  # (B, L or Q, H·K)
        return self.o_proj(out if selection is None else selection.pack(out))  # (B, L, D) or (P, D)


class MGMBlock(nn.Module):
    """Gated attention and a gated MLP, each after an adaptive norm.

    A kind's block makes its norms and attention with `_build` and then the maps of its `mlp`.
    """

    def _build(
        self, config: PreTrainedConfig, norm: type[nn.Module], eps: float, attention: type[MGMAttention]
    ) -> None:
        self.dropout = config.dropout
        self.modulation = Modulation(config.conditioning_size, config.hidden_size, 6)
        self.norm1 = norm(config.hidden_size, eps)
        self.attention = attention(config)
        self.norm2 = norm(config.hidden_size, eps)
        self.dropped = (config.hidden_size, config.hidden_size)  # channels that both dropouts act on

    def mlp(self, x, y, gate, training: bool, keep: torch.Tensor | None) -> torch.Tensor:
        """x + gate · MLP(y), with dropout in `training`; `keep` is its mask, drawn beforehand. `None`: draw one."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its MLP is.")

    def dropout_masks(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What the dropouts of attention and MLP keep of (B, L, ·): drawn once where the block is iterated, so that it
        stays one map."""
        return None if self.dropout == 0 else tuple(draw_kept(h, size, self.dropout) for size in self.dropped)

    def forward(
        self,
        x: torch.Tensor,
        modulation: tuple[torch.Tensor, ...],
        rotary: Any = None,
        attention_mask: torch.Tensor | None = None,
        keep: tuple[torch.Tensor, torch.Tensor] | None = None,
        selection: Selection | None = None,
        training: bool | None = None,
        key_values: KeyValuesPart | None = None,
    ) -> torch.Tensor:
        """(B, L, D) → (B, L, D), or (P, D): the block's output at the selected positions, exactly. Dropout acts in
        `training`; `None`: as the module's mode says. `x` may be of some positions, (N, D), if `key_values` have the
        others' keys and values."""
        training = self.training if training is None else training
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        keep1, keep2 = keep or (None, None)
        y = self.attention(self.norm1(x, shift1, scale1), rotary, attention_mask, selection, key_values)
        if selection is not None:
            x = selection.pick(x.flatten(0, -2))
            gate1, shift2, scale2, gate2 = (selection.vector(z) for z in (gate1, shift2, scale2, gate2))
        x = gated_residual(x, gate1, y, self.dropout, training, keep1)
        return self.mlp(x, self.norm2(x, shift2, scale2), gate2, training, keep2)
