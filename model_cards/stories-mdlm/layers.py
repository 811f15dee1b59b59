# SPDX-License-Identifier: Apache-2.0
"""Small pieces that the blocks of all models share: linear maps with a start of their own, modulation, dropout, and
activations that the backward pass makes again instead of keeping them.

A module with `initialize` gives its own parameters their start; the others get their model's.

Shapes: B batch, L length, D hidden size, C conditioning size, H heads, K head size.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type for norms, angles and probabilities of a `dtype` model: float32, or float64 if it is that."""
    return torch.promote_types(dtype, torch.float32)


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x(1 + scale) + shift."""
    return torch.addcmul(shift, x, 1 + scale)


def draw_kept(x: torch.Tensor, size: int, p: float) -> torch.Tensor:
    """What a dropout with probability `p` keeps of something like `x` (…, D) with `size` channels: (…, size), bool."""
    return x.new_empty((*x.shape[:-1], size), dtype=torch.float32).uniform_() >= p


def linear_of(linear: nn.Module, activation: Callable, *inputs: torch.Tensor) -> torch.Tensor:
    """linear(activation(*inputs)), whose backward pass makes the activation's output again from its inputs.

    An MLP's hidden units are its largest tensors and cost next to nothing to make. The linear map itself does not run
    again: the checkpoint stops as soon as it has what the backward pass asks for, the map's input. A compiler makes
    such choices itself.

    Args:
        linear (`nn.Module`): Any module; an adapter may have taken the place of a linear map.
        activation (`Callable`): A function of `inputs` without randomness, elementwise or nearly so.
        inputs (`torch.Tensor`): What is kept.
    """
    # Measured at width 768: keeping the hidden units takes 0.98 of a step's time and 1.10 (text) to 1.13 (images) of
    # its memory.
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return linear(activation(*inputs))
    return checkpoint(lambda *inputs: linear(activation(*inputs)), *inputs, use_reentrant=False)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU in tanh's approximation."""
    return F.gelu(x, approximate="tanh")


def gated_residual(
    x: torch.Tensor, gate: torch.Tensor, y: torch.Tensor, p: float, training: bool, keep: torch.Tensor | None = None
) -> torch.Tensor:
    """x + gate · dropout(y) with probability `p`; `keep` (same shape, bool) is a mask drawn beforehand. `None`: draw
    one. The division by 1 − p goes into the gate, which is smaller than y."""
    if keep is None:
        return torch.addcmul(x, gate, F.dropout(y, p, training))
    return torch.addcmul(x, gate / (1 - p), y * keep)


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention written out: `query`, `key`, `value` (B, H, L, K), additive mask → output (B, L, H, K), weights."""
    scores = query @ key.transpose(2, 3) * scaling  # (B, H, L, L)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=wide(scores.dtype)).to(query.dtype)
    weights = F.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2), weights


class IdentityLinear(nn.Linear):
    """A linear map that starts as blocks of multiples of the identity.

    Args:
        size (`int`): Width of a block.
        blocks (`list[list[float]]`): Multiple of the identity in each block, in rows and columns.
        bias (`bool`, defaults to `True`): Whether there is a bias, 0 at the start.
    """

    def __init__(self, size: int, blocks: list[list[float]], bias: bool = True):
        super().__init__(size * len(blocks[0]), size * len(blocks), bias=bias)
        self.size, self.blocks = size, blocks

    def initialize(self) -> None:
        """The blocks, (size · rows, size · columns), and no bias."""
        init.copy_(self.weight, torch.kron(torch.tensor(self.blocks), torch.eye(self.size)))
        if self.bias is not None:
            init.zeros_(self.bias)


class Modulation(nn.Module):
    """Shifts, scales and gates of an adaptive layer norm from the conditioning vector; all 0 at the start.

    Not an `nn.Linear`: adapters and quantisers replace those by layers that give one tensor.
    """

    def __init__(self, conditioning_size: int, hidden_size: int, vectors: int):
        super().__init__()
        self.vectors = vectors
        self.weight = nn.Parameter(torch.empty(vectors * hidden_size, conditioning_size))
        self.bias = nn.Parameter(torch.empty(vectors * hidden_size))

    def initialize(self) -> None:
        """Weight and bias at 0."""
        init.zeros_(self.weight)
        init.zeros_(self.bias)

    def forward(self, conditioning: torch.Tensor) -> tuple[torch.Tensor, ...]:
        vectors = F.linear(conditioning, self.weight, self.bias)
        return vectors[:, None].chunk(self.vectors, dim=-1)  # each (B, 1, D)
