# SPDX-License-Identifier: Apache-2.0
"""What a training starts from: a model, as it is or by its name, and the tokenizer that is saved beside it."""

from pathlib import Path, PurePath
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..models.kinds import KINDS
from ..models.text_input import boundary_ids


logger = logging.get_logger(__name__)


def load_model(model: nn.Module | str | Path | None, argument: str = "model") -> nn.Module:
    """`model` itself, or what its folder or its name on the hub holds, in float32 whatever the files are in: steps of
    training are smaller than bfloat16 resolves.

    Raises:
        `ValueError`: if there is no such folder, or no model.
    """
    if model is None:
        raise ValueError(f"`{argument}`=None: give a model, its folder, or its name on the hub.")
    if isinstance(model, PurePath) and not Path(model).exists():
        raise ValueError(f"`{argument}`={str(model)!r} does not exist: give the folder of a model.")
    return AutoModel.from_pretrained(str(model), dtype=torch.float32) if isinstance(model, (str, PurePath)) else model


def check_model(model: nn.Module) -> None:
    """Raise a `ValueError` for a model of another architecture or with weights that are not finite."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in KINDS:
        raise ValueError(
            f"`model` is of `model_type`={model_type!r}, but must be one of {tuple(KINDS)}: see `FPMDLMConfig` "
            "and `FPMaskGITConfig`."
        )
    bad = not_finite(model)
    if bad:
        raise ValueError(f"`model` has weights that are not finite: {bad}. Start from another checkpoint.")


def not_finite(model: nn.Module) -> list[str]:
    """Names of the parameters that are not finite."""
    return [name for name, p in model.named_parameters() if not p.is_meta and not p.isfinite().all()]


def check_trainable(model: nn.Module) -> None:
    """Raise a `ValueError` for a model whose parameters are all frozen."""
    if any(parameter.requires_grad for parameter in model.parameters()):
        return
    remedy = "`model.requires_grad_(True)` trains all of it."
    if hasattr(model, "peft_config"):
        remedy = (
            "an adapter is loaded for use. To train it, load it with `is_trainable=True`: "
            "`PeftModel.from_pretrained(model, adapter, is_trainable=True)`, or `model.load_adapter(adapter, "
            "is_trainable=True)`; `peft_config` makes a new one."
        )
    raise ValueError(f"`model` has nothing to train, all of its parameters are frozen: {remedy}")


def warn_of_half_precision(model: nn.Module) -> None:
    """Warn of weights that train in half precision: steps of training are smaller than what it resolves."""
    half = [(name, p.dtype) for name, p in model.named_parameters() if p.requires_grad and p.dtype.itemsize < 4]
    if half:
        (name, dtype), *_ = half
        logger.warning(
            f"`model` trains {len(half)} weights in half precision ({name} in {dtype}), which loses most steps: load "
            "it with `dtype=torch.float32`, or call `model.float()`. `bf16=True` computes in bfloat16 all the same."
        )


def fit_tokenizer(model: nn.Module, tokenizer: Any) -> None:
    """Take the ids of special tokens that a text model does not know yet from the tokenizer that is saved beside it.

    Raises:
        `ValueError`: if what is exported could not work together: another mask id, or more tokens than the model has.
    """
    config = model.config
    if config.model_type != "fpmdlm" or not isinstance(tokenizer, PreTrainedTokenizerBase):
        return
    if tokenizer.mask_token_id is None:
        raise ValueError(
            f"`processing_class` has no mask token, but the model has `mask_token_id`={config.mask_token_id}: "
            "`fpmgm.data.add_mask_token(tokenizer)` adds one."
        )
    if tokenizer.mask_token_id != config.mask_token_id or len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"`processing_class` has {len(tokenizer)} tokens and mask id {tokenizer.mask_token_id}, but the model has "
            f"`vocab_size`={config.vocab_size} and `mask_token_id`={config.mask_token_id}: give the tokenizer that "
            "the model was trained with, or make the model with `FPMDLMConfig(vocab_size=len(tokenizer), "
            "mask_token_id=tokenizer.mask_token_id)`."
        )
    begin, end = boundary_ids(tokenizer)  # as texts are packed, and completions end
    for name, value in (("bos_token_id", begin), ("eos_token_id", end), ("pad_token_id", tokenizer.pad_token_id)):
        for holder in (config, model.generation_config):
            if getattr(holder, name, None) is None and value is not None:
                setattr(holder, name, value)
