# SPDX-License-Identifier: Apache-2.0
"""Cross-step consistency post-training (Section 3.3): what the model holds at a noisier state is drawn to what it
holds, without gradient, at a cleaner state of the same sequence.

Shapes: B batch, L length, D hidden size, P masked positions of the student.
"""

import copy
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import ModelOutput, logging

from ..models.head import LogitsLoss
from ..models.layers import IdentityLinear, wide
from ..models.transfer import to_device
from .batch import Noise
from .checkpoints import reading
from .consistency_config import ConsistencyConfig
from .distillation import check_head, denoise, divergence_from, mean_over_sequences, nested_states, warmed_up
from .mgm_trainer import MGMTrainer
from .options import check_arguments
from .shards import part_from, part_of, whole_from
from .start import load_model


logger = logging.get_logger(__name__)

PROJECTION = "consistency_projection"  # what a model holds a learned projection as; it is saved beside the model
PROJECTION_FILE = "consistency_projection.safetensors"


class ConsistencyTrainer(MGMTrainer):
    """Post-trains a model, fixed-point or explicit, on L_base + λ·L_cons.

    Args:
        model (`PreTrainedModel`): The model to go on from; its weights should be the exported EMA.
        args ([`ConsistencyConfig`]): Arguments.
        kwargs: As for [`MGMTrainer`]. The stopping rule needs `eval_dataset`.

    Raises:
        `ValueError`: on arguments that exclude each other, and as [`MGMTrainer`] does.

    Example:

    ```python
    >>> from fpmgm.trainers import ConsistencyConfig, ConsistencyTrainer
    >>> args = ConsistencyConfig(output_dir="outputs/cofre", consistency_weight=0.1)  # doctest: +SKIP
    >>> trainer = ConsistencyTrainer(
    ...     model=model, args=args, train_dataset=blocks, eval_dataset=held_out
    ... )  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP

    ```
    """

    config_class = ConsistencyConfig

    def __init__(self, model: nn.Module | str | Path, args: ConsistencyConfig | None = None, **kwargs):
        args = ConsistencyConfig() if args is None else args
        check_arguments(self, args, ConsistencyConfig, kwargs)
        model = load_model(model)
        if args.consistency_loss == "projected_cosine":
            if hasattr(model, "peft_config") or kwargs.get("peft_config") is not None:
                raise ValueError(
                    "`consistency_loss`='projected_cosine' trains a projection beside the model, which adapters "
                    "alone would not save: use another loss, or train the whole model."
                )
            projection = IdentityLinear(model.config.hidden_size, [[1.0]])
            projection.initialize()
            model.add_module(PROJECTION, projection.to(model.device, model.dtype))
            names = {f"{PROJECTION}.{name}" for name, _ in projection.named_parameters()}
            model._keys_to_ignore_on_save = {*(model._keys_to_ignore_on_save or ()), *names}
        args = copy.copy(args)  # the user's stays as it is
        if kwargs.get("eval_dataset") is None and args.evaluates_if_it_can:
            args.eval_strategy = IntervalStrategy.NO
        if args.eval_on_start is None:
            args.eval_on_start = args.eval_strategy != IntervalStrategy.NO
        if args.eval_strategy == IntervalStrategy.NO and args.stop_at_perplexity_increase is not None:
            args.stop_at_perplexity_increase = None
            logger.warning_once(
                "`stop_at_perplexity_increase` is off, because nothing is evaluated: give `eval_dataset` and "
                "`eval_strategy`, or set it to None."
            )
        super().__init__(model, args, **kwargs)
        if args.consistency_loss == "logit_kl":
            check_head(self.model)
        if args.stop_at_perplexity_increase is not None:
            self.add_callback(StopAtPerplexity(args.stop_at_perplexity_increase))

    def micro_batch_loss(self, model, batch: dict, noise: Noise) -> tuple[torch.Tensor, ModelOutput]:
        """L_base + λ·L_cons: a mean over a sequence's compared positions, then over sequences."""
        args = self.args
        # 1. a noisier state for the student, a cleaner one for the teacher
        noisy, clean, masked, still_masked = nested_states(batch, noise, args.gap_range, self.kind, self.hide)
        compared = masked if args.consistency_positions == "student" else still_masked
        weights = to_device(mean_over_sequences(masked, noise, compared), noisy.input_ids.device)  # (P,)
        # 2. the teacher: the model, or its average, with as many iterations as the student
        with self._averaged() if args.teacher == "ema" else nullcontext():
            target = denoise(model, **clean.seen(), **self._without_gradient(noise.iterations))
            divergence = self._divergence_from(model, target, weights) if args.consistency_loss == "logit_kl" else None
        # 3. the student
        weight = warmed_up(args.consistency_weight, self.state.global_step, args.consistency_warmup_steps)
        further = {} if divergence is None else {"logits_loss": divergence, "logits_loss_weight": weight}
        student = model(**noisy.supervised(), **noise.iterations, **further, num_items_in_batch=noise.num_items)
        # 4. the distance of their hidden states; that of their logits is in the loss already
        loss, distance = student.loss, student.logits_loss
        if divergence is None:
            distance = (self.distances(student, target, weights) * weights).sum()
            loss = loss + weight * distance
        share = noise.share_of_sequences
        self.record(share, consistency=distance / share)
        return loss, student

    def distances(self, student: ModelOutput, target: ModelOutput, weights: torch.Tensor) -> torch.Tensor:
        """‖h_s − h_t‖², or 1 − cos(h_s, h_t), of the hidden states at P positions: (P,). The log gets the mean of
        ‖h_s − h_t‖² / ‖h_t‖² by `weights` (P,)."""
        name = "last_hidden_state" if self.args.consistency_at == "last" else "normed_hidden_state"
        h, h_target = getattr(student, name), getattr(target, name)  # (P, D)
        if self.args.consistency_loss == "projected_cosine":
            h = getattr(self.model, PROJECTION)(h)
        h, h_target = h.to(wide(h.dtype)), h_target.to(wide(h.dtype))
        if self.args.consistency_loss != "hidden_mse":
            return 1 - F.cosine_similarity(h, h_target, dim=-1)
        squares = (h - h_target).square().sum(dim=-1)  # (P,)
        relative = squares / h_target.square().sum(dim=-1).clamp(min=torch.finfo(h.dtype).tiny)
        compared = weights.sum()
        self.record(compared, relative_consistency=(relative * weights).sum() / compared.clamp(min=1e-12))
        return {"sum": squares, "mean": squares / h.shape[-1], "relative": relative}[self.args.consistency_reduction]

    def _without_gradient(self, drawn: dict[str, int | None]) -> dict[str, int]:
        """A teacher's iterations: as many as the student's `drawn` ones."""
        if self.model.config.num_fixed_point_layers == 0:
            return {}
        return {"num_iterations": drawn["num_no_grad_iterations"] + drawn["num_iterations"]}

    def _divergence_from(self, model, target: ModelOutput, weights: torch.Tensor) -> LogitsLoss:
        """KL(p_t ‖ p_s), with the head that `model` holds now."""
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        weight, bias = (whole_from(part_of(p).detach(), p) for p in (head.weight, head.bias))
        if self.args.teacher == "ema":
            weight, bias = weight.clone(), bias.clone()  # the average's, which the model holds only now
        return divergence_from(target.normed_hidden_state, weight, bias, weights, self.model.config.mask_token_id)

    def lineage(self) -> dict[str, str]:
        """Also the loss."""
        args = self.args
        method = (
            f"cross-step consistency, {args.consistency_loss}, λ = {args.consistency_weight:g}, teacher {args.teacher}"
        )
        return super().lineage() | {"method": method}

    def save_beside(self, folder: Path) -> None:
        """Also the learned projection."""
        super().save_beside(folder)
        if hasattr(self.model, PROJECTION):
            parameters = getattr(self.model, PROJECTION).named_parameters()
            projection = {name: whole_from(part_of(p).detach(), p).contiguous() for name, p in parameters}
            if self.args.should_save:
                save_file(projection, folder / PROJECTION_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and hasattr(self.model, PROJECTION):
            with reading(checkpoint, PROJECTION_FILE):
                saved = load_file(Path(checkpoint) / PROJECTION_FILE)
                for name, parameter in getattr(self.model, PROJECTION).named_parameters():
                    part_of(parameter).data.copy_(part_from(saved[name], parameter))


class StopAtPerplexity(TrainerCallback):
    """Stops at the first evaluation whose perplexity exceeds the one at step 0 by a share, and keeps that checkpoint
    (Appendix F.7: later perplexities may fall again, the lost diversity does not come back).

    The perplexity at step 0 is read from the log, which is saved in each checkpoint.

    Args:
        increase (`float`): The share, above 0.
    """

    def __init__(self, increase: float):
        self.increase = increase

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if state.global_step == 0 or not any(name.startswith("eval_") for name in metrics):
            return  # not one of the run's own
        before = [
            line["eval_perplexity"] for line in state.log_history if line["step"] == 0 and "eval_perplexity" in line
        ]
        if not before or "eval_perplexity" not in metrics:
            logger.warning_once(
                "`stop_at_perplexity_increase` is off: the perplexity before post-training is not in the log. Use "
                "`eval_on_start=True` and one evaluation set, or set `stop_at_perplexity_increase=None`."
            )
        elif metrics["eval_perplexity"] > (1 + self.increase) * before[0]:
            logger.info(
                f"Validation perplexity {metrics['eval_perplexity']:.2f} exceeds {before[0]:.2f} by more than "
                f"{self.increase:.0%}: post-training ends here, with this checkpoint."
            )
            control.should_save = control.should_training_stop = True
