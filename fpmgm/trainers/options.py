# SPDX-License-Identifier: Apache-2.0
"""Options of `TrainingArguments` and of `Trainer` that our trainers cannot honour are refused by name."""

import math
from dataclasses import fields
from pathlib import PurePath
from typing import Any

from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from ..models.arguments import Allowed, checked, number


logger = logging.get_logger(__name__)

POSITIVE = number(0, float("inf"), words="be above 0", ends="()")
GAP = Allowed("be two times [low, high] with 0 < low <= high < 1", lambda x: len(x) == 2 and 0 < x[0] <= x[1] < 1)

LIGER = "the head takes Liger's kernel by itself where it is installed: pip install 'fpmgm[liger]'"
# By name: the values that are allowed, and why no other is.
REFUSED = {
    "label_smoothing_factor": ((0,), "the loss is a bound of the likelihood, which smoothed labels do not give"),
    "label_names": ((None, ["labels"]), "rows are read by the names of `fpmgm.trainers.rows`: rename their columns"),
    "average_tokens_across_devices": ((True,), "the loss is always divided by the positions of all devices"),
    "use_cache": ((False,), "a masked model has no cache of keys and values"),
    "use_liger_kernel": ((False,), LIGER),
    "liger_kernel_config": ((None,), LIGER),
    "fp16_full_eval": ((False,), "the weights would stay in float16 afterwards; `fp16`=True evaluates in float16 too"),
    "bf16_full_eval": (
        (False,),
        "the weights would stay in bfloat16 afterwards; `bf16`=True evaluates in bfloat16 too",
    ),
    "auto_find_batch_size": (
        (False,),
        "where memory runs out after the first step, the run would begin again from weights that are trained already",
    ),
    "debug": (([],), "a loss or gradient that is not finite ends the run and names its step by itself"),
}
REFUSED_BY_MGM = {
    "logging_nan_inf_filter": ((False,), "a loss that is not finite ends the run, so that there is none to hide"),
}


def check_values(args: TrainingArguments, allowed: dict[str, Allowed]) -> None:
    """Hold arguments against what they may be; they become what the code wants.

    Raises:
        `ValueError`: names the first that is not allowed.
    """
    vars(args).update(checked(allowed, {name: getattr(args, name) for name in allowed}))


def paths_as_text(args: TrainingArguments) -> None:
    """Turn each `Path` among the arguments into text, which can be logged and saved as JSON."""
    for field in fields(args):
        value = getattr(args, field.name)
        if isinstance(value, PurePath):
            setattr(args, field.name, str(value))


def check_options(args: TrainingArguments, refused: dict[str, tuple[tuple, str]]) -> None:
    """Raise a `ValueError` for an argument that would be ignored.

    Args:
        args (`TrainingArguments`): A configuration whose own checks are done.
        refused (`dict`): Allowed values and a reason by the name of the argument.
    """
    for name, (allowed, reason) in refused.items():
        if getattr(args, name) not in allowed:
            raise ValueError(f"`{name}`={getattr(args, name)!r} cannot be honoured: {reason}. Leave it out.")
    if args.accelerator_config.split_batches:
        raise ValueError(
            "`accelerator_config` with `split_batches`=True cannot be honoured: `per_device_train_batch_size` and "
            "`per_device_eval_batch_size` are those of one device. Leave it at False."
        )


def plan_length(args: TrainingArguments) -> None:
    """Let `num_train_epochs` plan the run where it is given: `max_steps` has a default of its own here.

    Raises:
        `ValueError`: if both are given.
    """
    default = next(field.default for field in fields(args) if field.name == "max_steps")
    if args.num_train_epochs is None:
        args.num_train_epochs = 3.0 if args.max_steps < 0 else 0.0  # 0: not by epochs
    elif args.num_train_epochs > 0 and args.max_steps not in (-1, default):
        raise ValueError(
            f"`num_train_epochs`={args.num_train_epochs} and `max_steps`={args.max_steps} plan two lengths: give one, "
            "with `max_steps`=-1 beside `num_train_epochs`."
        )
    elif args.num_train_epochs > 0:
        args.max_steps = -1


def warn_of_warmup(args: TrainingArguments, num_steps: int) -> None:
    """Warn of a run that ends within a warm-up, so that it never has the learning rate, or the weight of a loss, that
    is asked for; or before its last round has."""
    warmup = args.get_warmup_steps(num_steps)
    if warmup >= num_steps and args.lr_scheduler_type not in ("constant", "reduce_lr_on_plateau"):
        logger.warning(
            f"`warmup_steps`={warmup}, but the run has {num_steps} steps: `learning_rate`={args.learning_rate} is "
            "never reached. Give fewer, or a share of the steps below 1, such as `warmup_steps=0.1`."
        )
    for name in ("consistency_warmup_steps", "distillation_warmup_steps"):
        if getattr(args, name, 0) > num_steps:
            logger.warning(
                f"`{name}`={getattr(args, name)}, but the run has {num_steps} steps: the weight of that loss is never "
                "reached. Give fewer."
            )
    rounds, each = getattr(args, "rounds", 0), getattr(args, "steps_per_round", 0)
    if num_steps < rounds * each:
        logger.warning(
            f"`rounds`={rounds} of `steps_per_round`={each} take {rounds * each} steps, but the run has {num_steps} "
            f"and ends in round {math.ceil(num_steps / each)}. Give fewer, or leave `max_steps` out."
        )


def check_arguments(trainer: Trainer, args: Any, config_class: type, given: dict[str, Any]) -> None:
    """Raise a `ValueError` for arguments of a trainer that it does not take, or takes in another class.

    Args:
        trainer (`Trainer`): The trainer that is being made.
        args: Its configuration.
        config_class (`type`): What that must be; not that of another of our trainers.
        given (`dict`): What else was given for `transformers.Trainer`.
    """
    name, theirs = type(trainer).__name__, type(args).__name__
    if next((c for c in type(args).__mro__ if c.__module__.startswith(__package__)), None) is not config_class:
        raise ValueError(
            f"`args` is a {theirs}, but {name} takes a {config_class.__name__}, which has its own arguments beside "
            f"those of `TrainingArguments`: from fpmgm.trainers import {config_class.__name__}."
        )
    if given.get("model_init") is not None:
        raise ValueError(
            f"`model_init` cannot be honoured: {name} averages and exports the one model that it is given. Give "
            "`model`; a search makes a trainer for each trial."
        )
    if given.get("compute_loss_func") is not None:
        raise ValueError(
            f"`compute_loss_func` cannot be honoured: its loss is what {name} is. Write a subclass with another "
            "`compute_loss`."
        )
