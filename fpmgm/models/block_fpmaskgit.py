# SPDX-License-Identifier: Apache-2.0
"""Halton-MaskGIT's transformer block: self-attention with normalised queries and keys, and a gated MLP, each under an
adaptive RMS norm.

Shapes: B batch, L length, D hidden size, H heads, K head size, P positions, Q queries.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_fpmaskgit import FPMaskGITConfig
from .frozen_states import KeyValuesPart
from .layers import Modulation, draw_kept, eager_attention_forward, gated_residual, linear_of, modulate, wide
from .selection import Selection


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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = rms_norm(x, self.eps, self.weight)
        return normed if self.bias is None else normed + self.bias


class FPMaskGITAttention(nn.Module):
    """Bidirectional self-attention through Hugging Face's attention interface (SDPA by default).

    Queries and keys are RMS-normalised over all heads together, without a weight. The inner width is heads × head
    size, which need not be D.
    """

    is_causal = False

    def __init__(self, config: FPMaskGITConfig):
        super().__init__()
        self.config = config
        self.head_size = config.hidden_size // config.num_attention_heads
        inner_size = config.num_attention_heads * self.head_size
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * inner_size, bias=False)
        self.o_proj = nn.Linear(inner_size, config.hidden_size, bias=False)

    def forward(
        self,
        x: torch.Tensor,
        attention_mask: torch.Tensor | None,
        selection: Selection | None = None,
        key_values: KeyValuesPart | None = None,
    ) -> torch.Tensor:
        """(B, L, D), or (P, D) with queries at the selected positions only (keys and values are everywhere).

        `x` of some positions, (N, D), has the others' keys and values in `key_values`.
        """
        x = x if x.dim() == 3 else x[None]
        query, key, value = self.qkv_proj(x).chunk(3, dim=-1)  # (B, L, H·K) or (1, N, H·K)
        if selection is not None:
            query = selection.pad(selection.pick(query.flatten(0, 1)))  # (B, Q, H·K)
            attention_mask = None if attention_mask is None else attention_mask[:, :, :1]  # the same for every query
        query, key = (rms_norm(z, self.config.rms_norm_eps) for z in (query, key))
        query, key, value = (z.unflatten(-1, (-1, self.head_size)) for z in (query, key, value))
        if key_values is not None:
            key, value = key_values.update(key, value)
        query, key, value = (z.transpose(1, 2) for z in (query, key, value))  # (B, H, Q or L, K)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        out, _ = attend(self, query, key, value, attention_mask, scaling=self.head_size**-0.5, dropout=0.0)
        out = out.flatten(2)  # (B, L or Q, H·K)
        return self.o_proj(out if selection is None else selection.pack(out))


class FPMaskGITBlock(nn.Module):
    """Halton-MaskGIT's block: gated attention and gated SwiGLU, each after an adaptive RMS norm."""

    def __init__(self, config: FPMaskGITConfig):
        super().__init__()
        self.dropout, self.hidden_units = config.dropout, config.intermediate_size
        self.modulation = Modulation(config.conditioning_size, config.hidden_size, 6)
        self.norm1 = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = FPMaskGITAttention(config)
        self.norm2 = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def dropout_masks(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What the dropouts keep of attention (B, L, D) and of the MLP's hidden units: drawn once where the block is
        iterated, so that it stays one map."""
        if self.dropout == 0:
            return None
        return tuple(draw_kept(h, size, self.dropout) for size in (h.shape[-1], self.hidden_units))

    def forward(
        self,
        x: torch.Tensor,
        modulation: tuple[torch.Tensor, ...],
        rotary: None = None,  # positions are part of the embeddings
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
        y = self.attention(modulate(self.norm1(x), shift1, scale1), attention_mask, selection, key_values)
        if selection is not None:
            x = selection.pick(x.flatten(0, -2))
            gate1, shift2, scale2, gate2 = (selection.vector(z) for z in (gate1, shift2, scale2, gate2))
        x = gated_residual(x, gate1, y, self.dropout, training, keep1)
        y = modulate(self.norm2(x), shift2, scale2)
        if training and self.dropout and keep2 is None:
            keep2 = draw_kept(y, self.hidden_units, self.dropout)

        def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
            hidden = F.silu(gate) * up
            return hidden if keep2 is None else hidden * keep2 / (1 - self.dropout)

        return torch.addcmul(x, gate2, linear_of(self.down_proj, swiglu, self.gate_proj(y), self.up_proj(y)))
