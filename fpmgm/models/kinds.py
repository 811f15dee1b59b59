# SPDX-License-Identifier: Apache-2.0
"""What each kind of model is, beside its block and its configuration: a further kind is one more entry.

Shapes: B batch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .noise import arccos_ratio, diffusion_time, loss_weight, masked_probability


@dataclass(frozen=True)
class Kind:
    """How a kind of model is trained, adapted and named.

    Args:
        name, explicit_name (`str`): What a card calls a model with fixed-point layers, and one without.
        pipeline_tag (`str`, *optional*): The hub's task. `None`: the hub has none.
        tag (`str`): What the hub lists it under.
        columns (`tuple[str]`): What is read of a row of data, `input_ids` first.
        time (`Callable`): Maps uniforms to times t (B,).
        masked_probability (`Callable`): P(masked) at t.
        weights (`dict[str, Callable]`): Weights of a sequence's loss at t, by name, the default first; evaluation uses
            that. The mean of weight · P(masked) is 1, so that the loss per position is near the cross-entropy per
            masked token.
        lora_target_modules (`tuple[str]`): What LoRA adapts by default. Not the injection, whose mix of state and
            input holds F near a contraction.
    """

    name: str
    explicit_name: str
    pipeline_tag: str | None
    tag: str
    columns: tuple[str, ...]
    time: Callable[[torch.Tensor], torch.Tensor]
    masked_probability: Callable[[torch.Tensor], torch.Tensor]
    weights: dict[str, Callable[[torch.Tensor], torch.Tensor]]
    lora_target_modules: tuple[str, ...]

    def weight(self, name: str | None) -> Callable[[torch.Tensor], torch.Tensor]:
        """The weight of this name. `None`: the default."""
        return self.weights[next(iter(self.weights)) if name is None else name]


KINDS = {  # by `model_type`
    "fpmdlm": Kind(
        name="A fixed-point masked diffusion language model",
        explicit_name="An MDLM",
        pipeline_tag="fill-mask",
        tag="masked-diffusion",
        columns=("input_ids", "attention_mask", "labels", "completion_mask"),
        time=diffusion_time,
        masked_probability=masked_probability,
        weights={"elbo": loss_weight, "uniform": lambda t: torch.full_like(t, 2.0)},
        lora_target_modules=("qkv_proj", "o_proj", "up_proj", "down_proj"),
    ),
    "fpmaskgit": Kind(
        name="A fixed-point masked generative image model",
        explicit_name="A MaskGIT",
        pipeline_tag=None,
        tag="maskgit",
        columns=("input_ids", "attention_mask", "labels", "class_labels"),
        time=arccos_ratio,
        masked_probability=lambda t: t,  # t is the masking ratio itself
        weights={"uniform": lambda t: torch.full_like(t, math.pi / 2)},
        lora_target_modules=("qkv_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    ),
}
