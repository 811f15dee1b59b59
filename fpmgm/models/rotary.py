# SPDX-License-Identifier: Apache-2.0
"""Rotary position embeddings of queries and keys.

Shapes: B batch, L length, H heads, K head size.
"""

import torch

from .layers import wide


def rotary_embedding(
    length: int, head_size: int, theta: float, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of position × frequency, each (L, K/2)."""
    frequencies = theta ** -(torch.arange(0, head_size, 2, device=device, dtype=wide(dtype)) / head_size)
    angles = torch.arange(length, device=device, dtype=wide(dtype))[:, None] * frequencies  # (L, K/2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotated(qkv: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Queries and keys, turned, and values of `qkv` (B, L, 3, H, K), each (B, H, L, K).

    Channel i is turned with channel i + K/2, by the angles whose cos and sin (L, K/2) are in `rotary`.

    Example:

    ```python
    >>> import torch
    >>> qkv = torch.tensor([1.0, 0.0]).expand(1, 3, 3, 1, 2)  # a pair of channels at three positions
    >>> query, key, value = rotated(qkv, rotary_embedding(3, 2, 1e4, qkv.device, qkv.dtype))
    >>> query[0, 0]  # cos and sin of 0, 1 and 2
    tensor([[ 1.0000,  0.0000],
            [ 0.5403,  0.8415],
            [-0.4161,  0.9093]])
    >>> value[0, 0, 2]
    tensor([1., 0.])

    ```
    """
    if not torch.compiler.is_compiling():
        return _Rotated.apply(qkv, *rotary)
    cos, sin = (table[:, None, None] for table in rotary)
    first, second = qkv[:, :, :2].chunk(2, dim=-1)
    turned = torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)
    query_key = torch.cat(turned, dim=-1)
    return *query_key.permute(2, 0, 3, 1, 4), qkv[:, :, 2].transpose(1, 2)


class _Rotated(torch.autograd.Function):
    """`rotated` in few passes over memory: autograd's own steps move three times the bytes."""

    @staticmethod
    def forward(ctx, qkv, cos, sin):
        ctx.save_for_backward(cos, sin)
        heads = torch.empty_like(qkv)
        _turn(qkv[:, :, :2], cos[:, None, None], sin[:, None, None], out=heads[:, :, :2])
        heads[:, :, 2] = qkv[:, :, 2]  # a view would keep all of qkv for the backward pass
        return heads.permute(2, 0, 3, 1, 4).unbind()

    @staticmethod
    def backward(ctx, *slopes):
        return _TurnedBack.apply(*ctx.saved_tensors, *slopes), None, None


class _TurnedBack(torch.autograd.Function):
    """The slope of qkv from those of queries, keys and values; `_Rotated` is the slope of this."""

    @staticmethod
    def forward(ctx, cos, sin, *slopes):
        ctx.save_for_backward(cos, sin)
        query, key, value = (slope.transpose(1, 2) for slope in slopes)  # (B, L, H, K)
        slope = value.new_empty(*value.shape[:2], 3, *value.shape[2:])
        for place, x in enumerate((query, key)):
            _turn(x, cos[:, None], -sin[:, None], out=slope[:, :, place])
        slope[:, :, 2] = value
        return slope

    @staticmethod
    def backward(ctx, slope):
        return None, None, *_Rotated.apply(slope, *ctx.saved_tensors)


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor) -> None:
    """Write `x` (…, K) into `out`, its pairs of channels turned."""
    (first, second), (turned_first, turned_second) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(first, cos, out=turned_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=turned_second).addcmul_(first, sin)
