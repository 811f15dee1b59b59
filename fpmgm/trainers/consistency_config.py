# SPDX-License-Identifier: Apache-2.0
"""Arguments of [`ConsistencyTrainer`]."""

from dataclasses import dataclass, field

from ..models.arguments import one_of, optional, whole
from .mgm_config import MGMTrainingConfig
from .options import GAP, POSITIVE, check_values


ALLOWED = {
    "consistency_loss": one_of(("hidden_mse", "hidden_cosine", "projected_cosine", "logit_kl")),
    "consistency_weight": POSITIVE,
    "consistency_warmup_steps": whole(0, unit="steps"),
    "consistency_at": one_of(("last", "normed")),
    "consistency_positions": one_of(("student", "both")),
    "consistency_reduction": one_of(("mean", "sum", "relative")),
    "teacher": one_of(("self", "ema")),
    "gap_range": GAP,
    "stop_at_perplexity_increase": optional(POSITIVE, "takes all steps, as 0 does"),
}


@dataclass
class ConsistencyConfig(MGMTrainingConfig):
    r"""
    Arguments of [`ConsistencyTrainer`], beside those of [`MGMTrainingConfig`]. The defaults are the paper's,
    but for the mean over channels, which is a width-th of the paper's sum (docs/choices.md). On a small scale no
    setting has made samples better, and a larger weight makes them worse: compare with a run without
    (docs/results/study.md).

    Defaults that differ from [`MGMTrainingConfig`]: `max_steps=30_000`, `eval_steps=1000`, `save_steps=1000`;
    `eval_strategy` is `"steps"` where the trainer has an `eval_dataset` and `"no"` where it has none, and
    `eval_on_start` is true where it evaluates (the perplexity before, from which the stopping rule counts).

    Args:
        consistency_loss (`str`, defaults to `"hidden_mse"`): What is compared at the student's masked positions:
            `"hidden_mse"`, ‖h_s − h_t‖²; `"hidden_cosine"`, 1 − cos(h_s, h_t); `"projected_cosine"`, the same with a
            learned projection of h_s; `"logit_kl"`, KL(p_t ‖ p_s).
        consistency_weight (`float`, defaults to 0.1): λ.
        consistency_warmup_steps (`int`, defaults to 5000): Steps over which λ grows from 0.
        consistency_at (`str`, defaults to `"last"`): h after the post-stack, or `"normed"`, the head's input, where
            shrinking the norm cannot lower the loss.
        consistency_positions (`str`, defaults to `"student"`): `"student"`, all that are masked in the student's
            state, or `"both"`, those that are masked in the teacher's too. At the others the teacher sees the token,
            and no loss gives its hidden state or its logits there a meaning: `"logit_kl"` wants `"both"`.
        consistency_reduction (`str`, defaults to `"mean"`): Over the channels of `"hidden_mse"`: `"mean"`, `"sum"`,
            which is the width times as much, or `"relative"`, ‖h_s − h_t‖² / ‖h_t‖², which does not depend on the size
            of the hidden states. The log has `relative_consistency` for all three.
        teacher (`str`, defaults to `"self"`): The model itself without gradient, or its average, `"ema"`.
        gap_range (`list[float]`, defaults to [0.05, 0.30]): The teacher's time is the student's less a gap from it.
        stop_at_perplexity_increase (`float`, *optional*, defaults to 0.15): Stop at the first evaluation whose
            perplexity exceeds that before post-training by this share, and keep that checkpoint, which is not the
            best by its loss: `load_best_model_at_end` and `save_strategy="best"` exclude it. `None` or 0: all steps.

    Raises:
        `ValueError`: on a value that is not allowed.
    """

    max_steps: int = 30_000
    eval_strategy: str | None = field(
        default=None, metadata={"help": "When to evaluate. null: steps, with an evaluation set."}
    )
    eval_steps: float = 1000
    save_steps: float = 1000
    eval_on_start: bool | None = field(
        default=None, metadata={"help": "Evaluate before training; the rule counts from it. null: if at all."}
    )

    consistency_loss: str = "hidden_mse"
    consistency_weight: float = 0.1
    consistency_warmup_steps: int = 5000
    consistency_at: str = "last"
    consistency_positions: str = "student"
    consistency_reduction: str = "mean"
    teacher: str = "self"
    gap_range: list[float] = field(default_factory=lambda: [0.05, 0.30])
    stop_at_perplexity_increase: float | None = 0.15

    def __post_init__(self):
        if self.stop_at_perplexity_increase == 0:
            self.stop_at_perplexity_increase = None
        check_values(self, ALLOWED)
        if self.consistency_loss == "logit_kl" and self.consistency_at != "last":
            raise ValueError(
                f"`consistency_at`={self.consistency_at!r} would be ignored: logits are made of the normed state. "
                "Leave it out with `consistency_loss`='logit_kl'."
            )
        if self.consistency_loss != "hidden_mse" and self.consistency_reduction != "mean":
            raise ValueError(
                f"`consistency_reduction`={self.consistency_reduction!r} would be ignored: it is for "
                f"`consistency_loss`='hidden_mse', not {self.consistency_loss!r}. Leave it out."
            )
        self.evaluates_if_it_can = self.eval_strategy is None
        self.eval_strategy = "steps" if self.eval_strategy is None else self.eval_strategy
        super().__post_init__()
        by_loss = self.load_best_model_at_end or self.save_strategy == "best"
        if by_loss and self.stop_at_perplexity_increase is not None:
            raise ValueError(
                "`load_best_model_at_end` and `save_strategy`='best' keep the checkpoint of the lowest loss, "
                "`stop_at_perplexity_increase` the one at which it stops: use one or the other."
            )
        if self.teacher == "ema" and self.ema_decay is None:
            raise ValueError("`teacher`='ema' needs an average: set `ema_decay`, or use `teacher`='self'.")
