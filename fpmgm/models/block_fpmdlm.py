# SPDX-License-Identifier: Apache-2.0
"""MDLM's transformer block: rotary self-attention and MLP, each under an adaptive layer norm.

Shapes: B batch, L length, D hidden size, C conditioning size, H heads, K head size, P positions, Q queries.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_fpmdlm import FPMDLMConfig
from .frozen_states import KeyValuesPart
from .layers import Modulation, draw_kept, eager_attention_forward, gated_residual, gelu, linear_of, modulate, wide
from .rotary import rotated
from .selection import Selection


TIMESTEP_FREQUENCIES = 256


# --- layers -----------------------------------------------------------------------------------------------------


class LayerNorm(nn.Module):
    """Layer norm in float32 or better, with a weight and no bias."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor, shift: torch.Tensor | None = None, scale: torch.Tensor | None = None):
        """norm(x)(1 + scale) + shift; vectors that all of `x` shares become the norm's own, without a pass."""
        precise = wide(x.dtype)
        weight, bias = self.weight.to(precise), None
        shared = shift is not None and shift.numel() == x.shape[-1]
        if shared:
            weight, bias = weight * (1 + scale.flatten().to(precise)), shift.flatten().to(precise)
        y = F.layer_norm(x.to(precise), x.shape[-1:], weight, bias, self.eps).to(x.dtype)
        return y if shared or shift is None else modulate(y, shift, scale)


class TimestepEmbedding(nn.Module):
    """The conditioning vector of a noise level: sinusoids of σ, then an MLP."""

    def __init__(self, size: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIMESTEP_FREQUENCIES, size), nn.SiLU(), nn.Linear(size, size))

    def forward(self, noise: torch.Tensor) -> torch.Tensor:
        half, dtype = TIMESTEP_FREQUENCIES // 2, self.mlp[0].weight.dtype
        places = torch.arange(half, device=noise.device, dtype=wide(dtype))
        angles = noise.to(wide(dtype))[:, None] * torch.exp(-math.log(10000) * places / half)
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)  # (B, 256)
        return F.silu(self.mlp(features.to(dtype)))  # (B, C)


class FPMDLMAttention(nn.Module):
    """Bidirectional rotary self-attention through Hugging Face's attention interface (SDPA by default)."""

    is_causal = False

    def __init__(self, config: FPMDLMConfig):
        super().__init__()
        self.config = config
        self.head_size = config.hidden_size // config.num_attention_heads
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        selection: Selection | None = None,
        key_values: KeyValuesPart | None = None,
    ) -> torch.Tensor:
        """(B, L, D), or (P, D) with queries at the selected positions only (keys and values are everywhere).

        `x` of some positions, (N, D), with their `rotary`, has the others' keys and values in `key_values`.
        """
        x = x if x.dim() == 3 else x[None]
        qkv = self.qkv_proj(x).unflatten(-1, (3, -1, self.head_size))  # (B, L, 3, H, K) or (1, N, 3, H, K)
        query, key, value = (z.transpose(1, 2) for z in rotated(qkv, rotary))  # (B, L, H, K)
        if key_values is not None:
            key, value = key_values.update(key, value)
        if selection is not None:
            query = selection.pad(selection.pick(query.flatten(0, 1)))  # (B, Q, H, K)
            attention_mask = None if attention_mask is None else attention_mask[:, :, :1]  # the same for every query
        query, key, value = (z.transpose(1, 2) for z in (query, key, value))  # (B, H, Q or L, K)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        out, _ = attend(self, query, key, value, attention_mask, scaling=self.head_size**-0.5, dropout=0.0)
        out = out.flatten(2)  # (B, L or Q, D)
        return self.o_proj(out if selection is None else selection.pack(out))  # (B, L, D) or (P, D)


class FPMDLMBlock(nn.Module):
    """MDLM's block: gated attention and gated MLP, each after an adaptive layer norm."""

    def __init__(self, config: FPMDLMConfig):
        super().__init__()
        self.dropout = config.dropout
        self.modulation = Modulation(config.conditioning_size, config.hidden_size, 6)
        self.norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attention = FPMDLMAttention(config)
        self.norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def dropout_masks(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What both dropouts keep of (B, L, D): drawn once where the block is iterated, so that it stays one map."""
        if self.dropout == 0:
            return None
        return tuple(draw_kept(h, h.shape[-1], self.dropout) for _ in range(2))

    def forward(
        self,
        x: torch.Tensor,
        modulation: tuple[torch.Tensor, ...],
        rotary: tuple[torch.Tensor, torch.Tensor],
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
        y = linear_of(self.down_proj, gelu, self.up_proj(self.norm2(x, shift2, scale2)))
        return gated_residual(x, gate2, y, self.dropout, training, keep2)
