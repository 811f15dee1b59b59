# SPDX-License-Identifier: Apache-2.0
"""The vocabulary head, and losses of its logits that never hold more than a chunk of them.

Only masked positions carry loss, and a 50k-word vocabulary makes their logits the largest tensor of a training step.
Here the logits of a few hundred positions are made, turned into a loss and its gradient, and forgotten; the gradients
of the hidden states and of the head are complete when the loss is. Forward and backward cost three matrix products of
the dense computation's three.

Shapes: P positions, R positions of a chunk, D hidden size, V vocabulary.
"""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import initialization as init

from .layers import wide


LogitsLoss = Callable[[torch.Tensor, slice], torch.Tensor]


@dataclass(frozen=True)
class HeadLoss:
    """A loss of the logits at P positions: Σ weight · (−log p(label)) + λ · `logits_loss`.

    The mask id gets no probability (the SUBS parameterisation).

    Args:
        mask_token_id (`int`): The mask id.
        labels (`torch.LongTensor`, *optional*): (P,) tokens to predict. `None`: no cross-entropy.
        weights (`torch.Tensor`, *optional*): (P,) of the cross-entropies. `None`: 1.
        logits_loss (`Callable`, *optional*): A further loss: maps (R, V) logits of some of the positions, the mask id
            forbidden, and the slice of these positions to a scalar. `None`: none.
        logits_loss_weight (`float`, defaults to 1): λ, at least 0.
    """

    mask_token_id: int
    labels: torch.LongTensor | None = None
    weights: torch.Tensor | None = None
    logits_loss: LogitsLoss | None = None
    logits_loss_weight: float = 1.0

    def of_chunk(self, logits: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The loss of `logits` (R, V) of the positions `rows`, where the most likely id is the label, (R,) bool (empty
        without labels), and what `logits_loss` gave."""
        total = further = logits.new_zeros((), dtype=wide(logits.dtype))
        hits = logits.new_zeros(0, dtype=torch.bool)
        if self.logits_loss is not None:
            logits = logits.to(wide(logits.dtype))
            further = self.logits_loss(logits, rows)
            total = total + self.logits_loss_weight * further
        if self.labels is not None:
            labels = self.labels[rows]
            losses, likeliest = cross_entropy(logits, labels, overwrite=self.logits_loss is None)  # (R,)
            total = total + (losses if self.weights is None else losses * self.weights[rows]).sum()
            hits = likeliest == labels
        return total, hits, further.detach()


@functools.cache
def fused_cross_entropy(device_type: str) -> Callable | None:
    """Liger's cross-entropy kernel where it is installed and runs: on a GPU, or on a CPU in Triton's interpreter."""
    interpreted = device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if device_type != "cuda" and not interpreted:
        return None
    try:
        from liger_kernel.transformers.functional import liger_cross_entropy
    except ImportError:
        return None
    return liger_cross_entropy


def cross_entropy(
    logits: torch.Tensor, labels: torch.LongTensor, overwrite: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """−log softmax(logits)[label] of each row, (R,) in float32 or better, and its most likely id, (R,) without
    gradient.

    Args:
        logits (`torch.Tensor`): (R, V) of any type.
        labels (`torch.LongTensor`): (R,).
        overwrite (`bool`, defaults to `False`): Nothing else reads the logits, so that a fused kernel, where there is
            one and a gradient is due, may write it in their place. Its losses are rounded to the logits' type.

    Example:

    ```python
    >>> import torch
    >>> losses, likeliest = cross_entropy(torch.tensor([[0.0, 3.0]]).log1p(), torch.tensor([1]))
    >>> round(losses.item(), 4), likeliest.item()  # log 5/4
    (0.2231, 1)

    ```
    """
    fusible = overwrite and logits.requires_grad and logits.dtype != torch.float64
    fused = fused_cross_entropy(logits.device.type) if fusible else None
    precise = wide(logits.dtype)
    if fused is None:
        return F.cross_entropy(logits.to(precise), labels, reduction="none"), logits.detach().argmax(dim=-1)
    output = fused(logits, labels, reduction="none", return_predicted_tokens=True)
    return output.loss.to(precise), output.predicted_tokens


def forbid(logits: torch.Tensor, token_id: int) -> torch.Tensor:
    """`logits` (R, V) with no probability for an id, in place: its logit is −10⁶, or the type's least number.

    Finite, so that differences of log-probabilities exist.
    """
    check_mask_id(token_id, logits.shape[-1])
    logits[:, token_id] = max(-1e6, torch.finfo(logits.dtype).min)
    return logits


def check_mask_id(token_id: int, vocab_size: int) -> None:
    """Raise a `ValueError` for an id that the vocabulary does not have, whenever it got into the configuration."""
    if not 0 <= token_id < vocab_size:
        raise ValueError(f"`mask_token_id`={token_id} must lie in [0, `vocab_size`={vocab_size}).")


def chunk_rows(vocab_size: int, device: torch.device) -> int:
    """Positions whose logits are held at once: 64 MB in float32 on a CPU, 512 MB on a GPU, where calls cost more."""
    return max(1, 2 ** (24 if device.type == "cpu" else 27) // vocab_size)


class LMHead(nn.Linear):
    """(P, D) → (P, V), or what a [`HeadLoss`] makes of these logits, chunk by chunk.

    Args:
        hidden_size, vocab_size (`int`): D and V.
        tied (`bool`): Whether the weight is the embedding's, whose start it keeps; otherwise it starts at 0.

    `chunk_rows` may be set to the positions whose logits a loss holds at once. `None`: what suits the device.
    """

    chunk_rows: int | None = None

    def __init__(self, hidden_size: int, vocab_size: int, tied: bool):
        super().__init__(hidden_size, vocab_size)
        self.tied = tied

    def initialize(self) -> None:
        """Weight and bias at 0, a tied weight left alone."""
        init.zeros_(self.bias)
        if not self.tied:
            init.zeros_(self.weight)

    def forward(self, h: torch.Tensor, loss: HeadLoss | None = None):
        # A loss goes through the module's call like any other use of its weights: engines that shard them gather here.
        return super().forward(h) if loss is None else chunked_loss(h, self.weight, self.bias, loss, self.chunk_rows)


def head_loss(head: nn.Module, h: torch.Tensor, loss: HeadLoss) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`loss` of the logits of `h` (P, D), where the label is the most likely id, and what `logits_loss` gave."""
    if isinstance(head, LMHead):
        return head(h, loss)
    return loss.of_chunk(forbid(head(h).clone(), loss.mask_token_id), slice(None))  # an adapter's: all at once


def losses_of_positions(model: Callable, targets: torch.LongTensor, **inputs) -> torch.Tensor:
    """(P,) float64 of −log p of the `targets` (P,), at the masked positions of `inputs`; the logits of all of them are
    never there at once."""
    losses = torch.zeros(len(targets), dtype=torch.float64, device=targets.device)

    def collect(logits: torch.Tensor, chunk: slice) -> torch.Tensor:
        losses[chunk] = F.cross_entropy(logits, targets[chunk], reduction="none").double()
        return logits.new_zeros(())

    model(**inputs, logits_loss=collect)
    return losses


@torch.compiler.disable
def chunked_loss(
    h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, loss: HeadLoss, rows: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`loss.of_chunk` summed over chunks, with exact gradients; its hits of all positions, (P,), and its further loss,
    both without gradient.

    Args:
        h (`torch.Tensor`): (P, D) the head's input.
        weight, bias (`torch.Tensor`): (V, D) and (V,).
        loss ([`HeadLoss`]): Of logits in the products' type.
        rows (`int`, *optional*): R positions of a chunk. `None`: what suits the device.

    Example:

    ```python
    >>> import torch
    >>> h, weight, bias = torch.randn(5, 4), torch.zeros(3, 4), torch.zeros(3)
    >>> total, hits, _ = chunked_loss(h, weight, bias, HeadLoss(mask_token_id=2, labels=torch.zeros(5).long()))
    >>> round(total.item() / 5, 4), hits.shape  # log 2: two ids are left
    (0.6931, torch.Size([5]))

    ```
    """
    if not torch.is_grad_enabled():  # which a function's own forward cannot see
        h, weight, bias = h.detach(), weight.detach(), bias.detach()
    return _ChunkedLoss.apply(h, weight, bias, loss, rows or chunk_rows(len(weight), h.device))


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, bias, loss, size):
        needed = ctx.needs_input_grad[:3]
        dtype = torch.get_autocast_dtype(h.device.type) if torch.is_autocast_enabled(h.device.type) else weight.dtype
        h, weight_, bias_ = h.to(dtype), weight.to(dtype), bias.to(dtype)
        grads = [torch.zeros_like(x) if wanted else None for x, wanted in zip((h, weight, bias), needed, strict=True)]
        total, further = h.new_zeros(2, dtype=wide(dtype))
        hits = []
        with torch.autocast(h.device.type, enabled=False):
            for start in range(0, max(1, len(h)), size):  # without any position the loss is 0, and so are gradients
                rows = slice(start, start + size)
                logits = forbid(F.linear(h[rows], weight_, bias_), loss.mask_token_id)  # (R, V)
                with torch.enable_grad():
                    part, hit, added = loss.of_chunk(logits.requires_grad_(any(needed)), rows)
                total, further = total + part.detach(), further + added
                hits.append(hit)
                if any(needed):
                    (slope,) = torch.autograd.grad(part, logits)  # (R, V)
                    slope[:, loss.mask_token_id] = 0
                    _accumulate(grads, slope, h[rows], weight_, rows)
        ctx.save_for_backward(*grads)
        hits = torch.cat(hits)
        ctx.mark_non_differentiable(hits, further)
        return total, hits, further

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total, *_):
        grads = [None if grad is None else (grad * grad_total).to(grad.dtype) for grad in ctx.saved_tensors]
        return *grads, None, None


def _accumulate(grads: list, slope: torch.Tensor, h: torch.Tensor, weight: torch.Tensor, rows: slice) -> None:
    """Add a chunk's part to the gradients of h, weight and bias, where these are wanted."""
    grad_h, grad_weight, grad_bias = grads
    if grad_h is not None:
        grad_h[rows] = slope @ weight
    if grad_weight is not None:
        if grad_weight.dtype == slope.dtype:
            grad_weight.addmm_(slope.T, h)
        else:
            grad_weight += slope.T @ h
    if grad_bias is not None:
        grad_bias += slope.sum(dim=0)
