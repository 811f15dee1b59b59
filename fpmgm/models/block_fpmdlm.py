# SPDX-License-Identifier: Apache-2.0
"""MDLM's transformer block: rotary self-attention and MLP, each under an adaptive layer norm.

Shapes: B batch, L length, C conditioning size, H heads, K head size.
"""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from .block_mgm import MGMAttention, MGMBlock
from .configuration_fpmdlm import FPMDLMConfig
from .layers import gated_residual, gelu, linear_of, modulate, wide
from .rotary import rotated


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
        half, dtype = TIMESTEP_FREQUENCIES // 2, self.mlp[0].bias.dtype
        places = torch.arange(half, device=noise.device, dtype=wide(dtype))
        angles = noise.to(wide(dtype))[:, None] * torch.exp(-math.log(10000) * places / half)
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)  # (B, 256)
        return F.silu(self.mlp(features.to(dtype)))  # (B, C)


class FPMDLMAttention(MGMAttention):
    """Rotary self-attention."""

    def heads(self, qkv: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], wanted: Callable):
        """Queries and keys are turned by their positions."""
        qkv = qkv.unflatten(-1, (3, -1, self.head_size))  # (B, L, 3, H, K)
        query, key, value = (z.transpose(1, 2) for z in rotated(qkv, rotary))  # (B, L, H, K)
        return wanted(query), key, value


class FPMDLMBlock(MGMBlock):
    """MDLM's block: rotary attention and an MLP with GELU, each after an adaptive layer norm."""

    def __init__(self, config: FPMDLMConfig):
        super().__init__()
        self._build(config, LayerNorm, config.layer_norm_eps, FPMDLMAttention)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def mlp(self, x, y, gate, training: bool, keep: torch.Tensor | None) -> torch.Tensor:
        """Dropout acts on its output."""
        y = linear_of(self.down_proj, gelu, self.up_proj(y))
        return gated_residual(x, gate, y, self.dropout, training, keep)
