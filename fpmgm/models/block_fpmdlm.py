# SPDX-License-Identifier: Apache-2.0
"""MDLM's transformer block: rotary self-attention and MLP, each under an adaptive layer norm.

Shapes: B batch, L length, D hidden size, C conditioning size, H heads, K head size, P selected positions, Q queries.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_fpmdlm import FPMDLMConfig
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
    ) -> torch.Tensor:
        """(B, L, D), or (P, D) with queries at the selected positions only (keys and values are everywhere)."""
        qkv = self.qkv_proj(x).unflatten(-1, (3, -1, self.head_size))  # (B, L, 3, H, K)
        query, key, value = rotated(qkv, rotary)  # (B, H, L, K)
        if selection is not None:
            batch = torch.arange(len(x), device=x.device)[:, None]
            query = query.transpose(1, 2)[batch, selection.queries].transpose(1, 2)  # (B, H, Q, K)
            attention_mask = None if attention_mask is None else attention_mask[:, :, :1]  # the same for every query
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        out, _ = attend(self, query, key, value, attention_mask, scaling=self.head_size**-0.5, dropout=0.0)
        out = out.flatten(2)  # (B, L or Q, D)
        return self.o_proj(out if selection is None else out.flatten(0, 1)[selection.slots])  # (B, L, D)


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
    ) -> torch.Tensor:
        """(B, L, D) → (B, L, D), or (P, D): the block's output at the selected positions, exactly. Dropout acts in
        `training`; `None`: as the module's mode says."""
        training = self.training if training is None else training
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        keep1, keep2 = keep or (None, None)
        y = self.attention(self.norm1(x, shift1, scale1), rotary, attention_mask, selection)
        if selection is not None:
            x, gate1, shift2, scale2, gate2 = (selection.pick(z) for z in (x, gate1, shift2, scale2, gate2))
        x = gated_residual(x, gate1, y, self.dropout, training, keep1)
        y = linear_of(self.down_proj, gelu, self.up_proj(self.norm2(x, shift2, scale2)))
        return gated_residual(x, gate2, y, self.dropout, training, keep2)
