# SPDX-License-Identifier: Apache-2.0
"""Arguments of [`MGMTrainer`]."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from ..models.arguments import number, one_of, optional, whole
from .options import REFUSED, REFUSED_BY_MGM, check_options, check_values, paths_as_text, plan_length
from .prompts import LONG_ROWS


ALLOWED = {
    "ema_decay": optional(number(0, 1, "()"), "keeps no average, as 0 does"),
    "loss_weighting": optional(one_of(("elbo", "uniform")), "is that of the kind of model"),
    "num_kept_iterations": optional(whole(0, unit="iterations"), "keeps all"),
    "eval_num_draws": optional(whole(1, unit="draws"), "takes as many as the error asks for"),
    "completion_multiple": whole(1, unit="tokens"),
    "long_rows": one_of(LONG_ROWS),
    "random_length_share": number(0, 1),
}


@dataclass
class MGMTrainingConfig(TrainingArguments):
    r"""
    Arguments of [`MGMTrainer`], beside those of `TrainingArguments`.

    Defaults that differ from `TrainingArguments`: `learning_rate=2e-4`, `lr_scheduler_type="constant_with_warmup"`,
    `warmup_steps=2500`, `max_steps=1_000_000`, `num_train_epochs=None` (given, it plans the run; both are an error),
    `per_device_train_batch_size=64`, `logging_steps=50`, `logging_nan_inf_filter=False` (a loss that is not finite
    stops the run), `ddp_find_unused_parameters=False`, `hub_strategy="end"` (what is pushed is the exported EMA).
    `greater_is_better` is `False` for a `metric_for_best_model` whose name ends with "perplexity", too.
    `dataloader_pin_memory` is off on a CPU. Arguments that would be ignored are refused:
    `fpmgm/trainers/options.py`.

    Args:
        ema_decay (`float`, *optional*, defaults to 0.9999): Decay of the average of the weights that is evaluated and
            exported. `None` or 0: no average.
        loss_weighting (`str`, *optional*): Weight of a sequence's cross-entropy: `"elbo"` is 1/t, the bound's, for
            text only; `"uniform"` gives every masked position the same weight. Both have the same best model; without
            rare large weights of small t, gradients are less noisy, which helps small batches. `None`: `"elbo"` for
            text, `"uniform"` for images, as always in evaluation.
        num_kept_iterations (`int`, *optional*): Of the solver's iterations with gradient, whose number is drawn for
            each optimizer step, the last this many keep their activations; earlier ones run again in the backward
            pass. Peak memory is then that of this many iterations, and only the steps that drew more pay for it.
            `None`: all are kept. Not together with `activation_checkpointing`, which runs all blocks again.
        eval_num_draws (`int`, *optional*): Times that each row of an evaluation is masked, at times and positions of
            its own. The perplexity is an estimate; more draws make its standard error, `eval_perplexity_stderr`,
            smaller. `None`: as many as bring it below 2 % of the perplexity, at most 64; few rows need many.
        completion_only_loss (`bool`, defaults to `True`): Whether of rows with a prompt the completion alone is
            masked, scored and counted. `False`: the prompt too.
        completion_multiple (`int`, defaults to 32): A completion that is given as text ends with EOS, and with as many
            more as bring it to a multiple of this, or to the model's length. 1: with one. Rows of ids stay as they
            are.
        long_rows (`str`, defaults to `"error"`): What happens to prompts and completions, given as text, of more
            tokens than the model reads: `"error"`; `"cut"`, the completion ends early, without EOS; `"drop"`, the row
            is left out.
        random_length_share (`float`, defaults to 0.0): Share of the optimizer steps whose rows are cut: of what may be
            masked in a row a part stays, drawn for the step uniformly from 0 to 1, and what is before it. Models that
            have seen one length alone repeat themselves where the most confident positions are written first; 0.01 is
            what others use against it. Of text only.
        data_description (`str`, *optional*): What the model is trained on, for its card. `None`: not said.
        ignore_data_change (`bool`, defaults to `False`): Whether a run may go on from a checkpoint with other data
            than it was made with, which is an error otherwise.

    Raises:
        `ValueError`: on a value that is not allowed.
    """

    learning_rate: float = 2e-4
    lr_scheduler_type: str = "constant_with_warmup"
    warmup_steps: float = 2500
    max_steps: int = field(default=1_000_000, metadata={"help": "Optimizer steps, unless by num_train_epochs."})
    num_train_epochs: float | None = field(default=None, metadata={"help": "Epochs. null: max_steps."})
    per_device_train_batch_size: int = 64
    logging_steps: float = 50
    logging_nan_inf_filter: bool = False
    ddp_find_unused_parameters: bool | None = False
    hub_strategy: str = "end"

    ema_decay: float | None = 0.9999
    loss_weighting: str | None = None
    num_kept_iterations: int | None = None
    eval_num_draws: int | None = None
    completion_only_loss: bool = True
    completion_multiple: int = 32
    long_rows: str = "error"
    random_length_share: float = 0.0
    data_description: str | None = None
    ignore_data_change: bool = False

    def __post_init__(self):
        if self.ema_decay == 0:
            self.ema_decay = None
        check_values(self, ALLOWED)
        paths_as_text(self)
        plan_length(self)
        if self.greater_is_better is None and str(self.metric_for_best_model).endswith("perplexity"):
            self.greater_is_better = False  # transformers takes the highest of what is not named "loss"
        super().__post_init__()
        check_options(self, REFUSED | REFUSED_BY_MGM)
        if self.ema_decay is not None and self.optim.value.startswith("schedule_free"):
            raise ValueError(
                f"`optim`={self.optim.value!r} with `ema_decay`={self.ema_decay}: this optimizer averages the weights "
                "itself, and swaps them for an evaluation too. Give `ema_decay=0`, or another optimizer."
            )
        self.dataloader_pin_memory &= self.device.type != "cpu"
        # The older name of `activation_checkpointing`, and equal to it.
        if self.num_kept_iterations is not None and self.gradient_checkpointing:
            raise ValueError(
                f"`num_kept_iterations`={self.num_kept_iterations} with `activation_checkpointing`=True, which runs "
                "all iterations again: give one of them."
            )
