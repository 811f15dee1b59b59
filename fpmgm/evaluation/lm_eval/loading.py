# SPDX-License-Identifier: Apache-2.0
"""A model and its tokenizer from what a user types, and the checks of it."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForMaskedLM, PreTrainedTokenizerBase

from ...models.arguments import check_whole, one_of
from ...models.text_input import boundary_ids, read_tokenizer


DEFAULT_BATCH_SIZE = 64
DTYPES = ("auto", "float32", "float64", "bfloat16", "float16")


def load_model(
    pretrained: str | Path | torch.nn.Module,
    peft: str | Path | None,
    revision: str,
    dtype: str,
    trust_remote_code: bool,
) -> torch.nn.Module:
    """The masked language model of a folder or hub name (a PEFT adapter's too), in evaluation.

    Args:
        pretrained (`str`, `Path` or `torch.nn.Module`): A model is taken as it is.
        peft (`str` or `Path`, *optional*): Folder or hub name of an adapter to merge into the weights. `None`: none.
        revision (`str`): Of `pretrained` on the hub.
        dtype (`str`): One of `DTYPES`; `"auto"` is the checkpoint's.
        trust_remote_code (`bool`): For checkpoints of classes that this package does not have.

    Raises:
        `ValueError`: for another `dtype`, one or a `revision` of a model that is loaded, or a model that is no masked
            diffusion model.
    """
    one_of(DTYPES).check("dtype", dtype)
    model = pretrained
    if isinstance(pretrained, str | Path):
        model = AutoModelForMaskedLM.from_pretrained(
            str(pretrained), revision=revision, dtype=dtype, trust_remote_code=trust_remote_code
        )
    elif (dtype, revision) != ("auto", "main"):
        raise ValueError(
            f"`dtype`={dtype!r} and `revision`={revision!r} are for a model that is to be loaded: leave them out."
        )
    if peft is not None:
        try:
            from peft import PeftModel
        except ImportError as error:
            raise ImportError(f"`peft`={peft!r} needs peft: pip install 'fpmgm[train]'") from error
        model = PeftModel.from_pretrained(model, str(peft)).merge_and_unload()
    if getattr(model.config, "mask_token_id", None) is None or not hasattr(model, "generate"):
        raise ValueError(
            f"`pretrained`={pretrained!r} is a {type(model).__name__} without `mask_token_id` or `generate`: give a "
            "masked diffusion model (`load_mdlm(...).save_pretrained(...)` makes one of an MDLM checkpoint)."
        )
    return model.eval()


def load_tokenizer(
    tokenizer: str | Path | PreTrainedTokenizerBase | None, pretrained: Any, revision: str, trust_remote_code: bool
) -> PreTrainedTokenizerBase:
    """The tokenizer given or named, or else that of `pretrained`.

    Raises:
        `ValueError`: if there is none.
    """
    if tokenizer is not None and not isinstance(tokenizer, str | Path):
        return tokenizer
    if tokenizer is None and not isinstance(pretrained, str | Path):
        raise ValueError("`tokenizer`=None, and `pretrained` is a model without one: give a tokenizer.")
    options = {"trust_remote_code": trust_remote_code}
    if tokenizer is None:
        tokenizer, options["revision"] = pretrained, revision
    try:
        return read_tokenizer(tokenizer, **options)
    except ValueError as error:
        raise ValueError(f"{error} Give its folder or hub name as `tokenizer`.") from error


# --- checks: the value to use, or a `ValueError` that names the argument -------------------------------------------


def check_batch_size(batch_size: int | str) -> int:
    """Masked copies in a forward pass; lm-eval's `"auto"` is `DEFAULT_BATCH_SIZE`."""
    if str(batch_size).split(":")[0] == "auto":
        return DEFAULT_BATCH_SIZE
    if str(batch_size).isdecimal():
        batch_size = int(batch_size)
    return check_whole("batch_size", batch_size, minimum=1, unit="masked copies ('auto' is 64)")


def check_device(device: str | None) -> str | None:
    """A device that PyTorch has here; `None` stays."""
    if device is not None and torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"`device`={device!r}, but PyTorch sees no GPU here: leave it out, or take 'cpu'.")
    return device


def check_max_length(max_length: int | None, config) -> int:
    """Tokens of the longest input; `None`: all that the model takes."""
    longest = config.max_position_embeddings
    if max_length is None:
        return longest
    if check_whole("max_length", max_length, minimum=3, unit="tokens") > longest:
        raise ValueError(f"`max_length`={max_length} must be at most `max_position_embeddings`={longest}.")
    return max_length


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config, needs_eos: bool) -> None:
    """Whether the tokenizer fits the model."""
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"`tokenizer` has {len(tokenizer)} tokens, the model's `vocab_size` is {config.vocab_size}: give the "
            "tokenizer that the model was trained with."
        )
    mask = config.mask_token_id
    if mask < len(tokenizer) and mask != tokenizer.mask_token_id:
        raise ValueError(
            f"`tokenizer` has {tokenizer.convert_ids_to_tokens(mask)!r} at {mask}, the model's mask id, and the mask "
            f"token {tokenizer.mask_token!r}: give the tokenizer that the model was trained with."
        )
    if needs_eos and boundary_ids(tokenizer)[1] is None:
        raise ValueError("`tokenizer` has no EOS token, which `protocol`='pgm' needs: use 'llada' or 'smdm'.")
