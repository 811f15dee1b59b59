# SPDX-License-Identifier: Apache-2.0
"""Halton-MaskGIT's transformer block: self-attention with normalised queries and keys, and a gated MLP, each under an
adaptive RMS norm.

Shapes: B batch, L length, H heads, K head size.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from .block_mgm import MGMAttention, MGMBlock
from .configuration_fpmaskgit import FPMaskGITConfig
from .layers import draw_kept, linear_of, modulate, wide


def rms_norm(x: torch.Tensor, eps: float, weight: torch.Tensor | None = None) -> torch.Tensor:
    """x / √(mean x² + ε) over the last dimension in float32 or better, times `weight`. `None`: 1."""
    precise = wide(x.dtype)
    weight = None if weight is None else weight.to(precise)
    return F.rms_norm(x.to(precise), x.shape[-1:], weight, eps).to(x.dtype)


class RMSNorm(nn.Module):
    """RMS norm with a weight and, where `bias` is set, a bias."""

    def __init__(self, size: int, eps: float, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None
        self.eps = eps

    def forward(self, x: torch.Tensor, shift: torch.Tensor | None = None, scale: torch.Tensor | None = None):
        """norm(x)(1 + scale) + shift. `None`: norm(x)."""
        y = rms_norm(x, self.eps, self.weight)
        y = y if self.bias is None else y + self.bias
        return y if shift is None else modulate(y, shift, scale)


class FPMaskGITAttention(MGMAttention):
    """Self-attention with queries and keys RMS-normalised over all heads together, without a weight."""

    def heads(self, qkv: torch.Tensor, rotary: None, wanted: Callable):
        """Positions are part of the embeddings."""
        query, key, value = qkv.chunk(3, dim=-1)  # (B, L, H·K)
        query, key = (rms_norm(z, self.config.rms_norm_eps) for z in (wanted(query), key))
        return tuple(z.unflatten(-1, (-1, self.head_size)) for z in (query, key, value))


class FPMaskGITBlock(MGMBlock):
    """Halton-MaskGIT's block: attention and SwiGLU, each after an adaptive RMS norm."""

    def __init__(self, config: FPMaskGITConfig):
        super().__init__()
        self._build(config, RMSNorm, config.rms_norm_eps, FPMaskGITAttention)
        self.dropped = (config.hidden_size, config.intermediate_size)
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def mlp(self, x, y, gate, training: bool, keep: torch.Tensor | None) -> torch.Tensor:
        """Dropout acts on its hidden units."""
        if training and self.dropout and keep is None:
            keep = draw_kept(y, self.dropped[1], self.dropout)

        def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
            hidden = F.silu(gate) * up
            return hidden if keep is None else hidden * keep / (1 - self.dropout)

        return torch.addcmul(x, gate, linear_of(self.down_proj, swiglu, self.gate_proj(y), self.up_proj(y)))
