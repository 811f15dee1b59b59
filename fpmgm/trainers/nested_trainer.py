# SPDX-License-Identifier: Apache-2.0
"""Training on two nested states of each sequence: a noisier one for the student, a cleaner one for a teacher
(Section 3.3, Appendix C.3.3).

Shapes: B batch, L length, P masked positions of the student.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from transformers.utils import ModelOutput

from ..models.noise import MINIMUM_TIME, nested_masks, stream_generator
from .batch import MicroBatch
from .distillation import mean_over_sequences
from .mgm_trainer import MGMTrainer


class Target(NamedTuple):
    """What a teacher holds at P positions: hidden states before and after the final norm (P, D); and its head, `None`
    where the distance is not one of logits."""

    last_hidden_state: torch.Tensor
    normed_hidden_state: torch.Tensor
    head_weight: torch.Tensor | None
    head_bias: torch.Tensor | None


class NestedTrainer(MGMTrainer):
    """Adds to the base loss of the noisier state a distance from a teacher that sees the cleaner one.

    A subclass says what the teacher holds (`teach`) and how far the student is from it: by a loss of its logits
    (`logits_loss`), made chunk by chunk with them, or by a loss of its output (`output_loss`). `args` give `gap_range`
    and the distance's weight with its warm-up (`distance_weight`).
    """

    distance_name = "distance"  # in the log

    def micro_batch_loss(self, model, inputs: dict, micro_batch: MicroBatch) -> tuple[torch.Tensor, ModelOutput]:
        """The base loss, and the weighted distance: a mean over a sequence's masked positions, then over sequences."""
        # 1. two states
        noisy, clean, masked = self.nested_states(inputs, micro_batch)
        weights = mean_over_sequences(masked, micro_batch.share_of_a_sequence, inputs["input_ids"].device)  # (P,)
        # 2. the teacher, without graph
        target = self.teach(model, clean, micro_batch)
        # 3. the student
        weight, share = self.distance_weight(), micro_batch.share_of_positions
        logits_loss = self.logits_loss(target, weights * (weight / share))
        student = model(**noisy, **micro_batch.iterations, logits_loss=logits_loss)
        loss = student.loss * share
        # 4. the distance, which a loss of the logits holds already
        if logits_loss is not None:
            distance = student.logits_loss * (share / weight)
        else:
            distance = self.output_loss(student, target, weights)
            loss = loss + weight * distance
        self._metrics[self.distance_name].append(distance.detach() / micro_batch.share_of_sequences)
        return loss, student

    def nested_states(self, inputs: dict, micro_batch: MicroBatch) -> tuple[dict, dict, torch.Tensor]:
        """The model's arguments for the student's state and for the teacher's, and the student's mask (B, L)."""
        low, high = self.args.gap_range
        gaps = torch.stack(
            [
                torch.rand((), generator=stream_generator(*micro_batch.key, j, "gap"))
                for j in micro_batch.places.tolist()
            ]
        )
        t = micro_batch.t
        t_clean = (t - (low + (high - low) * gaps)).clamp(min=MINIMUM_TIME)
        maskable = inputs["attention_mask"].bool().cpu() if "attention_mask" in inputs else None
        probability = self.corruption.masked_probability
        masked, still_masked = nested_masks(micro_batch.uniforms, probability(t), probability(t_clean), maskable)
        noisy, clean = self.training_inputs(inputs, masked, t), self.masked_inputs(inputs, still_masked, t_clean)
        clean["logits_positions"] = noisy["logits_positions"]
        for name in ("labels", "loss_weights"):
            del clean[name]
        return noisy, clean, masked

    def teach(self, model, clean: dict, micro_batch: MicroBatch) -> Target:
        """The teacher at the student's masked positions."""
        raise NotImplementedError

    def distance_weight(self) -> float:
        """λ of this optimizer step, above 0."""
        raise NotImplementedError

    def logits_loss(self, target: Target, weights: torch.Tensor) -> Callable | None:
        """A loss of the student's logits, Σ of `weights` (P,) times a distance; `None`: the distance is another."""
        return None

    def output_loss(self, student: ModelOutput, target: Target, weights: torch.Tensor) -> torch.Tensor:
        """Σ of `weights` (P,) times a distance of the outputs."""
        raise NotImplementedError

    def warmed_up(self, weight: float, steps: int) -> float:
        """`weight`, after growing linearly over the first `steps`."""
        return weight * min(1.0, (self.state.global_step + 1) / max(1, steps))
