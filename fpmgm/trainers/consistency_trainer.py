# SPDX-License-Identifier: Apache-2.0
"""Cross-step consistency post-training (Section 3.3): what the model holds at a noisier state is drawn to what it
holds, without gradient, at a cleaner state of the same sequence.

Shapes: B batch, L length, D hidden size, P masked positions of the student.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.nn import functional as F
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import ModelOutput, logging

from ..models.layers import IdentityLinear, wide
from .batch import MicroBatch
from .consistency_config import ConsistencyConfig
from .distillation import check_head, denoise, divergence_from
from .nested_trainer import NestedTrainer, Target
from .shards import part_of, whole_from


logger = logging.get_logger(__name__)

PROJECTION = "consistency_projection"  # what a model holds a learned projection as while it is trained


class ConsistencyTrainer(NestedTrainer):
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

    distance_name = "consistency"

    def __init__(self, model: nn.Module, args: ConsistencyConfig, **kwargs):
        if args.consistency_loss == "projected_cosine":
            if hasattr(model, "peft_config") or kwargs.get("peft_config") is not None:
                raise ValueError(
                    "`consistency_loss`='projected_cosine' trains a projection beside the model, which adapters "
                    "alone would not save: use another loss, or train the whole model."
                )
            projection = IdentityLinear(model.config.hidden_size, [[1.0]])
            projection.initialize()
            model.add_module(PROJECTION, projection.to(model.device, model.dtype))
        if kwargs.get("eval_dataset") is None:
            args.eval_strategy, args.eval_on_start = IntervalStrategy.NO, False
        if args.eval_strategy == IntervalStrategy.NO:
            _without_rule(args)
        super().__init__(model, args, **kwargs)
        if args.consistency_loss == "logit_kl":
            check_head(self.model)
        if args.stop_at_perplexity_increase is not None:
            self.add_callback(StopAtPerplexity(args.stop_at_perplexity_increase))

    def teach(self, model, clean: dict, micro_batch: MicroBatch) -> Target:
        """The model, or its average, with as many iterations as the student, all without gradient."""
        iterations = {}
        if self.model.config.num_fixed_point_layers:
            drawn = micro_batch.iterations
            iterations["num_iterations"] = drawn["num_no_grad_iterations"] + drawn["num_iterations"]
        with self._averaged() if self.args.teacher == "ema" else nullcontext():
            output = denoise(model, **clean, **iterations)
            head = self.accelerator.unwrap_model(model).get_output_embeddings()
            weight = bias = None
            if self.args.consistency_loss == "logit_kl":
                weight, bias = (whole_from(part_of(p).detach(), p) for p in (head.weight, head.bias))
                if self.args.teacher == "ema":
                    weight, bias = weight.clone(), bias.clone()  # the average's, which the model holds only here
        return Target(output.last_hidden_state, output.normed_hidden_state, weight, bias)

    def distance_weight(self) -> float:
        """λ, after its warm-up."""
        return self.warmed_up(self.args.consistency_weight, self.args.consistency_warmup_steps)

    def logits_loss(self, target: Target, weights: torch.Tensor) -> Callable | None:
        """KL(p_t ‖ p_s), for `"logit_kl"`."""
        if self.args.consistency_loss != "logit_kl":
            return None
        hidden, mask_token_id = target.normed_hidden_state, self.model.config.mask_token_id
        return divergence_from(hidden, target.head_weight, target.head_bias, weights, mask_token_id)

    def output_loss(self, student: ModelOutput, target: Target, weights: torch.Tensor) -> torch.Tensor:
        """‖h_s − h_t‖², or 1 − cos(h_s, h_t), of the hidden states."""
        name = "last_hidden_state" if self.args.consistency_at == "last" else "normed_hidden_state"
        h, h_target = getattr(student, name), getattr(target, name)  # (P, D)
        if self.args.consistency_loss == "projected_cosine":
            h = getattr(self.model, PROJECTION)(h)
        h, h_target = h.to(wide(h.dtype)), h_target.to(wide(h.dtype))
        if self.args.consistency_loss != "hidden_mse":
            distances = 1 - F.cosine_similarity(h, h_target, dim=-1)  # (P,)
        elif self.args.consistency_reduction == "sum":
            distances = (h - h_target).square().sum(dim=-1)
        else:
            distances = (h - h_target).square().mean(dim=-1)
        return (distances * weights).sum()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As [`MGMTrainer`] does; an export leaves out the learned projection."""
        with nullcontext() if _internal_call else self._without_projection():
            super().save_model(output_dir, _internal_call)

    def push_to_hub(self, *args, **kwargs):
        """As [`MGMTrainer`] does, without the learned projection."""
        with self._without_projection():
            return super().push_to_hub(*args, **kwargs)

    @contextmanager
    def _without_projection(self) -> Iterator[None]:
        projection = self.model._modules.pop(PROJECTION, None)
        try:
            yield
        finally:
            if projection is not None:
                self.model.add_module(PROJECTION, projection)


def _without_rule(args: ConsistencyConfig) -> None:
    if args.stop_at_perplexity_increase is not None:
        args.stop_at_perplexity_increase = None
        logger.warning_once(
            "`stop_at_perplexity_increase` is off, because nothing is evaluated: give `eval_dataset` and "
            "`eval_strategy`, or set it to None."
        )


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
