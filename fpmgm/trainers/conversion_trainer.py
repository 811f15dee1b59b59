# SPDX-License-Identifier: Apache-2.0
"""Adaptation of a converted model: a frozen teacher on the cleaner state (Section 3.4)."""

from collections.abc import Callable

import torch
from torch import nn

from .batch import MicroBatch
from .conversion_config import ConversionConfig
from .distillation import check_teacher, denoise, divergence_from
from .nested_trainer import NestedTrainer, Target


class ConversionTrainer(NestedTrainer):
    """Trains a student on L_base + λτ²·KL(teacher ‖ student), the mean over its masked positions.

    Args:
        model (`PreTrainedModel`): The student, from `convert_to_fixed_point`.
        args ([`ConversionConfig`]): Arguments.
        teacher (`PreTrainedModel`): The model it was converted from. It is frozen, sees the cleaner state, and runs
            its own number of iterations if it has a fixed point.
        kwargs: As for [`MGMTrainer`].

    Raises:
        `ValueError`: if the teacher reads other tokens, and as [`MGMTrainer`] does.

    Example:

    ```python
    >>> from fpmgm import convert_to_fixed_point, load_mdlm
    >>> from fpmgm.trainers import ConversionConfig, ConversionTrainer
    >>> teacher = load_mdlm("kuleshov-group/mdlm-owt")  # doctest: +SKIP
    >>> student = convert_to_fixed_point(teacher)  # doctest: +SKIP
    >>> args = ConversionConfig(output_dir="outputs/converted")  # doctest: +SKIP
    >>> trainer = ConversionTrainer(
    ...     model=student, args=args, teacher=teacher, train_dataset=blocks
    ... )  # doctest: +SKIP

    ```
    """

    distance_name = "divergence"

    def __init__(self, model: nn.Module, args: ConversionConfig, teacher: nn.Module, **kwargs):
        check_teacher(teacher, model)
        super().__init__(model, args, **kwargs)
        self.teacher = teacher.to(self.args.device)

    def teach(self, model, clean: dict, micro_batch: MicroBatch) -> Target:
        """The frozen teacher."""
        output = denoise(self.teacher, **clean)
        head = self.teacher.get_output_embeddings()
        return Target(output.last_hidden_state, output.normed_hidden_state, head.weight, head.bias)

    def distance_weight(self) -> float:
        """λ, after its warm-up."""
        return self.warmed_up(self.args.distillation_weight, self.args.distillation_warmup_steps)

    def logits_loss(self, target: Target, weights: torch.Tensor) -> Callable:
        """τ²·KL(p_t ‖ p_s) at temperature τ."""
        return divergence_from(
            target.normed_hidden_state,
            target.head_weight,
            target.head_bias,
            weights,
            self.model.config.mask_token_id,
            self.args.distillation_temperature,
        )
