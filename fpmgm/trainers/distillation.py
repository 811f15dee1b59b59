# SPDX-License-Identifier: Apache-2.0
"""What the trainers with a teacher share: two nested states of each sequence (Section 3.3, Appendix C.3.3), the
teacher's pass, distances at the student's masked positions, their weights.

Shapes: B batch, L length, D hidden size, V vocabulary, P masked positions of the student, R positions of a chunk.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.utils import ModelOutput

from ..models.head import LogitsLoss, forbid, wide
from ..models.kinds import Kind
from ..models.modes import evaluating
from ..models.noise import MINIMUM_TIME, nested_masks
from .batch import Noise, maskable
from .corruption import NoisedBatch


def nested_states(
    batch: dict, noise: Noise, gap_range: list[float], kind: Kind, hide: Callable
) -> tuple[NoisedBatch, NoisedBatch, torch.Tensor, torch.Tensor]:
    """A noisier state for the student and a cleaner one for the teacher, whose mask is a part of the student's; both
    want logits at the student's masked positions.

    Args:
        batch (`dict`): Clean sequences.
        noise ([`Noise`]): Of the student.
        gap_range (`list[float]`): The teacher's time is the student's less a gap drawn from it.
        kind ([`Kind`]): Says what is masked at a time.
        hide (`Callable`): Makes a state of `batch`, a mask and times.

    Returns:
        `tuple`: the student's and the teacher's [`NoisedBatch`], and what each of them masks, (B, L) bool.
    """
    low, high = gap_range
    gaps = low + (high - low) * torch.stack([torch.rand((), generator=g) for g in noise.streams("gap")])  # (B,)
    t_clean = (noise.t - gaps).clamp(min=MINIMUM_TIME)
    probabilities = (kind.masked_probability(t) for t in (noise.t, t_clean))
    masked, still_masked = nested_masks(noise.uniforms, *probabilities, maskable(batch))
    student, teacher = hide(batch, masked, noise.t), hide(batch, still_masked, t_clean)
    return student, replace(teacher, positions=student.positions), masked, still_masked


@torch.no_grad()
def denoise(model: Callable, **arguments: Any) -> ModelOutput:
    """The model's output without graph, dropout or head. A teacher of its own is in evaluation already and is not
    touched; a model that teaches itself trains on afterwards."""
    with evaluating(model):
        return model(**arguments, output_logits=False)


def mean_over_sequences(masked: torch.Tensor, noise: Noise, compared: torch.Tensor | None = None) -> torch.Tensor:
    """(P,) weights of the positions `masked` (B, L) that make a mean over each sequence's, then over all sequences of
    the optimizer step.

    A sequence with nothing to compare has no part in it.

    Args:
        masked (`torch.Tensor`): (B, L) bool, P of them true.
        noise ([`Noise`]): Of the sequences.
        compared (`torch.Tensor`, *optional*): (B, L) bool, those of `masked` that the mean is over; the others weigh
            0. `None`: all.
    """
    compared = masked if compared is None else compared
    counts = compared.sum(dim=1, keepdim=True).clamp(min=1)  # (B, 1)
    return (compared / (noise.num_sequences * counts))[masked].float()


def warmed_up(weight: float, step: int, warmup_steps: int) -> float:
    """`weight` at optimizer step `step` (the first is 0), after growing linearly over the first `warmup_steps`."""
    return weight * min(1.0, (step + 1) / max(1, warmup_steps))


class _Divergence(torch.autograd.Function):
    """See [`divergence`]: the slope is made in the forward pass, in three (R, V) tensors where autograd takes five."""

    @staticmethod
    def forward(ctx, student, target, temperature, kind):
        s, t = ((x if temperature == 1 else x / temperature).log_softmax(dim=-1) for x in (student, target))
        if kind == "reverse_kl":
            p = s.exp()
            terms = s.sub_(t).mul_(p)
            rows = terms.sum(dim=-1)
            slope = terms.sub_(p.mul_(rows[:, None]))
        else:
            p = t.exp()
            rows = t.sub_(s).mul_(p).sum(dim=-1)
            slope = s.exp_().sub_(p)
        ctx.save_for_backward(slope.mul_(temperature))
        return temperature**2 * rows

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_rows):
        (slope,) = ctx.saved_tensors
        return slope * grad_rows[:, None], None, None, None


def divergence(
    student: torch.Tensor, target: torch.Tensor, temperature: float = 1.0, kind: str = "forward_kl"
) -> torch.Tensor:
    """τ²·KL between softmax(·/τ) of two sets of logits (R, V): (R,), ≥ 0; a gradient for the student's alone.

    `"forward_kl"` is KL(target ‖ student), `"reverse_kl"` KL(student ‖ target).
    """
    return _Divergence.apply(student, target, temperature, kind)


def divergence_from(
    hidden: torch.Tensor,
    head_weight: torch.Tensor,
    head_bias: torch.Tensor,
    weights: torch.Tensor,
    mask_token_id: int,
    temperature: float = 1.0,
    kind: str = "forward_kl",
) -> LogitsLoss:
    """A loss of the student's logits, chunk by chunk: their weighted divergence from the teacher's.

    The teacher's logits are made for the same chunk from its head's input: neither model's are ever held whole.

    Args:
        hidden (`torch.Tensor`): (P, D) input of the teacher's head.
        head_weight, head_bias (`torch.Tensor`): The teacher's head, (V, D) and (V,). Not through the head's call: it
            may be the student's own, which is inside its call when this loss is made.
        weights (`torch.Tensor`): (P,).
        mask_token_id (`int`): Gets no probability from the teacher.
        temperature (`float`, defaults to 1): τ.
        kind (`str`, defaults to `"forward_kl"`): Or `"reverse_kl"`.
    """

    def loss(logits: torch.Tensor, rows: slice) -> torch.Tensor:
        with torch.no_grad():
            part = hidden[rows]
            target = F.linear(part, head_weight.to(part.dtype), head_bias.to(part.dtype))
            target = forbid(target.to(wide(part.dtype)), mask_token_id)
        return (divergence(logits, target, temperature, kind) * weights[rows]).sum()

    return loss


def check_head(model: nn.Module) -> None:
    """Raise a `ValueError` where an adapter wraps the head, of which a teacher's logits take the weight alone."""
    if hasattr(model.get_output_embeddings(), "base_layer"):
        raise ValueError(
            "`target_modules` names the head, but the teacher's logits are made without its adapter: leave it out, or "
            "train the head whole with `modules_to_save=['lm_head']`."
        )


def check_teacher(teacher: nn.Module, model: nn.Module) -> None:
    """Raise a `ValueError` unless `teacher` speaks the model's vocabulary, has as many classes (what stands for none
    is the id behind them), and is whole on this process."""
    for name in ("model_type", "vocab_size", "mask_token_id", "num_classes"):
        theirs, ours = getattr(teacher.config, name), getattr(model.config, name)
        if theirs != ours:
            raise ValueError(
                f"`teacher` has `{name}`={theirs!r}, but the model has {ours!r}: both must be of one kind and "
                "read the same tokens and classes."
            )
    if any(parameter.numel() == 0 for parameter in teacher.parameters()):
        raise ValueError(
            "`teacher` was split over processes when it was loaded (DeepSpeed ZeRO-3): load it before the training "
            "arguments are made, so that every process holds it whole."
        )
