# SPDX-License-Identifier: Apache-2.0
"""How each kind of model is masked in training, and how its losses are weighted.

Shapes: B batch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..models.noise import arccos_ratio, diffusion_time, loss_weight, masked_probability, stream_generator
from ..models.transfer import to_device
from .batch import MicroBatch
from .mgm_config import MGMTrainingConfig


@dataclass(frozen=True)
class Corruption:
    """The schedule of one kind of model: t (B,) from uniforms, P(masked) at t, and its losses.

    `weights` (name → weight of a sequence's loss at t) begins with the default, which evaluation uses. The mean of
    weight · P(masked) is 1, so that the loss per position is near the cross-entropy per masked token. `loss_on` says
    where a loss may be taken.
    """

    time: Callable[[torch.Tensor], torch.Tensor]
    masked_probability: Callable[[torch.Tensor], torch.Tensor]
    weights: dict[str, Callable[[torch.Tensor], torch.Tensor]]
    loss_on: tuple[str, ...]

    def weight(self, name: str | None) -> Callable[[torch.Tensor], torch.Tensor]:
        """The weight of this name. `None`: the default."""
        return self.weights[next(iter(self.weights)) if name is None else name]


# By `model_type`. Of images, t is the masking ratio itself. Text copies its visible tokens: no loss there.
CORRUPTIONS = {
    "fpmdlm": Corruption(
        diffusion_time,
        masked_probability,
        {"elbo": loss_weight, "uniform": lambda t: torch.full_like(t, 2.0)},
        ("masked",),
    ),
    "fpmaskgit": Corruption(
        arccos_ratio,
        lambda t: t,
        {"uniform": lambda t: torch.full_like(t, math.pi / 2)},
        ("masked", "all"),
    ),
}


def check_loss(args: MGMTrainingConfig, model_type: str) -> None:
    """Raise a `ValueError` for a loss that this kind of model does not have."""
    corruption = CORRUPTIONS[model_type]
    for name, allowed in (("loss_weighting", (None, *corruption.weights)), ("loss_on", corruption.loss_on)):
        if getattr(args, name) not in allowed:
            raise ValueError(f"`{name}`={getattr(args, name)!r} must be one of {allowed} for {model_type!r}.")


def drop_classes(inputs: dict[str, torch.Tensor], micro_batch: MicroBatch, config) -> dict[str, torch.Tensor]:
    """`inputs` with the null class for a share `class_dropout` of the sequences, each by its own stream.

    Args:
        inputs (`dict`): A batch; without `class_labels` (B,) it is left alone.
        micro_batch ([`MicroBatch`]): Places of its sequences.
        config: The model's, with `class_dropout` and `num_classes` where it has classes.
    """
    if "class_labels" not in inputs:
        return inputs
    streams = (stream_generator(*micro_batch.key, j, "class") for j in micro_batch.places.tolist())
    uniforms = torch.stack([torch.rand((), generator=stream) for stream in streams])  # (B,)
    classes = inputs["class_labels"]
    dropped = to_device(uniforms < config.class_dropout, classes.device)
    return {**inputs, "class_labels": classes.masked_fill(dropped, config.num_classes)}
