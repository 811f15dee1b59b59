# SPDX-License-Identifier: Apache-2.0
"""Adaptation of a converted model: a frozen teacher on the cleaner state (Section 3.4)."""

from pathlib import Path

import torch
from torch import nn
from transformers.utils import ModelOutput

from ..models.transfer import to_device
from .batch import Noise
from .conversion_config import ConversionConfig
from .distillation import (
    check_teacher,
    denoise,
    divergence_from,
    mean_over_sequences,
    nested_states,
    warmed_up,
)
from .mgm_trainer import MGMTrainer
from .run_record import known, with_teacher
from .start import load_model


class ConversionTrainer(MGMTrainer):
    """Trains a student on L_base + λτ²·KL(teacher ‖ student), the mean over its masked positions.

    Args:
        model (`PreTrainedModel`): The student, from `convert_to_fixed_point`.
        args ([`ConversionConfig`]): Arguments.
        teacher (`PreTrainedModel`, `str` or `Path`): The model it was converted from, or its folder or its name on
            the hub. It is frozen, sees the cleaner state, and runs its own number of iterations if it has a fixed
            point.
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

    config_class = ConversionConfig

    def __init__(
        self,
        model: nn.Module | str | Path,
        args: ConversionConfig | None = None,
        teacher: nn.Module | str | Path | None = None,
        **kwargs,
    ):
        teacher = load_model(teacher, "teacher")
        super().__init__(model, args, **kwargs)
        check_teacher(teacher, self.model)
        self.teacher = teacher.to(self.args.device).eval()

    def run_record(self) -> dict[str, dict]:
        """Also the teacher, and its layers that the student was made of."""
        record = with_teacher(super().run_record(), self.teacher)
        return {**record, "options": {**record["options"], **known(layer_map=self.model.config.layer_map)}}

    def lineage(self) -> dict[str, str]:
        """Also the teacher, which of its layers became what, and the loss."""
        teacher = self.teacher.name_or_path or self.origin.base_model or "a model without a name"
        layer_map = self.model.config.layer_map
        layers = layer_map and " / ".join(", ".join(map(str, chosen)) for chosen in layer_map.values())
        args = self.args
        return super().lineage() | known(
            **{
                "method": "conversion to a fixed-point model, then distillation from the teacher, "
                f"λ = {args.distillation_weight:g}, τ = {args.distillation_temperature:g}",
                "teacher": teacher,
                "layers of the teacher (pre / fixed-point / post)": layers,
            }
        )

    def micro_batch_loss(self, model, batch: dict, noise: Noise) -> tuple[torch.Tensor, ModelOutput]:
        """L_base + λτ²·KL(p_t ‖ p_s): a mean over a sequence's masked positions, then over sequences."""
        args, head = self.args, self.teacher.get_output_embeddings()
        # 1. a noisier state for the student, a cleaner one for the teacher
        noisy, clean, masked, _ = nested_states(batch, noise, args.gap_range, self.kind, self.hide)
        # 2. the frozen teacher, up to its head
        with self.accelerator.autocast():  # which only the student is wrapped in
            hidden = denoise(self.teacher, **clean.seen()).normed_hidden_state  # (P, D)
        # 3. the student, its logits beside the teacher's
        weights = to_device(mean_over_sequences(masked, noise), hidden.device)  # (P,)
        divergence = divergence_from(
            hidden, head.weight, head.bias, weights, self.model.config.mask_token_id, args.distillation_temperature
        )
        weight = warmed_up(args.distillation_weight, self.state.global_step, args.distillation_warmup_steps)
        output = model(
            **noisy.supervised(), **noise.iterations, num_items_in_batch=noise.num_items,
            logits_loss=divergence, logits_loss_weight=weight,
        )  # fmt: skip
        share = noise.share_of_sequences
        self.record(share, divergence=output.logits_loss / share)
        return output.loss, output
