# SPDX-License-Identifier: Apache-2.0
"""Batches of which a model sees a part.

Shapes: B batch, L length, P masked positions.
"""

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from ..models.kinds import KINDS, Kind
from ..models.noise import mask_tokens, stream_generator
from ..models.transfer import to_device
from .batch import Noise, maskable, real
from .mgm_config import MGMTrainingConfig


@dataclass(frozen=True)
class NoisedBatch:
    """Sequences of which a model sees a part.

    Args:
        input_ids (`torch.LongTensor`): (B, L) with the mask id where a token is hidden.
        labels (`torch.LongTensor`): (B, L) the hidden tokens, -100 elsewhere.
        positions (`torch.LongTensor`): (P,) indices into B·L where logits are wanted, on the CPU.
        t (`torch.Tensor`): (B,) time.
        weights (`torch.Tensor`): (B,) of the sequences' cross-entropies.
        conditions (`dict`): What else the model is told: `attention_mask`, `class_labels`.
    """

    input_ids: torch.LongTensor
    labels: torch.LongTensor
    positions: torch.LongTensor
    t: torch.Tensor
    weights: torch.Tensor
    conditions: dict[str, torch.Tensor]

    def seen(self) -> dict[str, torch.Tensor]:
        """A model's arguments, without what is to be found."""
        seen = {"input_ids": self.input_ids, "timesteps": self.t, "logits_positions": self.positions}
        return {**self.conditions, **seen}

    def supervised(self) -> dict[str, torch.Tensor]:
        """A model's arguments with the tokens to predict."""
        return {**self.seen(), "labels": self.labels, "loss_weights": self.weights}


def drawn_mask(batch: dict[str, torch.Tensor], noise: Noise, kind: Kind) -> torch.Tensor:
    """(B, L) bool on the CPU: what the noise hides at its times."""
    return maskable(batch) & (noise.uniforms < kind.masked_probability(noise.t)[:, None])


def noised(
    batch: dict[str, torch.Tensor], masked: torch.Tensor, t: torch.Tensor, weights: torch.Tensor, mask_token_id: int
) -> NoisedBatch:
    """`batch` with the tokens at `masked` (B, L) hidden, at times `t` and with `weights` of the losses, both (B,).

    With `masked` on the CPU, positions are found there and cost the device no wait.
    """
    input_ids = batch["input_ids"]
    positions = masked.flatten().nonzero().squeeze(1).cpu()
    masked, t, weights = (to_device(x, input_ids.device) for x in (masked, t, weights))
    noisy, labels = mask_tokens(input_ids, masked, mask_token_id)
    conditions = {name: x for name, x in batch.items() if name not in ("input_ids", "labels")}
    return NoisedBatch(noisy, labels, positions, t, weights, conditions)


def check_loss(args: MGMTrainingConfig, config: PreTrainedConfig) -> None:
    """Raise a `ValueError` for a loss, or an option of its gradient, that this model does not have."""
    allowed = (None, *KINDS[config.model_type].weights)
    if args.loss_weighting not in allowed:
        raise ValueError(
            f"`loss_weighting`={args.loss_weighting!r} must be one of {allowed} for {config.model_type!r}."
        )
    if args.num_kept_iterations is not None and config.num_fixed_point_layers == 0:
        raise ValueError(
            f"`num_kept_iterations`={args.num_kept_iterations}, but the model has no fixed-point layers: leave it out."
        )


def drop_classes(batch: dict[str, torch.Tensor], noise: Noise, config) -> dict[str, torch.Tensor]:
    """`batch` with the null class for a share `class_dropout` of the sequences, each by its own stream.

    Args:
        batch (`dict`): Without `class_labels` (B,) it is left alone.
        noise ([`Noise`]): Places of its sequences.
        config: The model's, with `class_dropout` and `num_classes` where it has classes.
    """
    if "class_labels" not in batch:
        return batch
    uniforms = torch.stack([torch.rand((), generator=g) for g in noise.streams("class")])  # (B,)
    classes = batch["class_labels"]
    dropped = to_device(uniforms < config.class_dropout, classes.device)
    return {**batch, "class_labels": classes.masked_fill(dropped, config.num_classes)}


def random_length(args: MGMTrainingConfig, step: int) -> float | None:
    """What of the rows of optimizer step `step` stays, as a share of what may be masked; `None`: all of it.

    Drawn for the step, so that all of its rows become shorter, and the step cheaper.
    """
    drawn, share = torch.rand(2, generator=stream_generator(args.seed, "train", step, "length")).tolist()
    return share if drawn < args.random_length_share else None


def shortened(batch: dict[str, torch.Tensor], share: float) -> dict[str, torch.Tensor]:
    """`batch` with the first `share` of what may be masked in each row, at least one position, and what is before it.

    Args:
        batch (`dict`): Sequences (B, L), with `attention_mask` and `labels` or without.
        share (`float`): In [0, 1].

    >>> batch = {"input_ids": torch.tensor([[1, 2, 3, 4, 5]]), "labels": torch.tensor([[-100, 2, 3, 4, 5]])}
    >>> shortened(batch, 0.5)["input_ids"].tolist()
    [[1, 2, 3]]
    """
    candidates = maskable(batch)  # (B, L)
    kept = (share * candidates.sum(dim=1, keepdim=True)).ceil().clamp(min=1)  # (B, 1)
    count = candidates.cumsum(dim=1)
    seen = ((count < kept) | (candidates & (count == kept))) & real(batch)
    length = int(seen.any(dim=0).nonzero().max()) + 1
    batch, seen = {name: x[:, :length] for name, x in batch.items()}, seen[:, :length]
    batch.pop("attention_mask", None)
    if seen.all():
        return batch
    return {**batch, "attention_mask": to_device(seen.long(), batch["input_ids"].device)}
