# SPDX-License-Identifier: Apache-2.0
"""What `generate` is given, as the tensors that it works on, and what it refuses.

Shapes: B batch, L length.
"""

from typing import Any

import torch
from torch.nn import functional as F
from transformers import GenerationConfig

from .arguments import Allowed, is_whole, optional, shown, whole
from .fixed_point import has_whole_numbers
from .head import check_mask_id


# Arguments of a call that are no tensors; those of `MGMGenerationConfig` are in its file.
ALLOWED = {
    "batch_size": optional(whole(1, 2**20, "sequences"), "takes what `input_ids` and `class_labels` say"),
    "length": optional(whole(1, unit="tokens"), "is the longest"),
    "max_new_tokens": optional(whole(1, unit="tokens"), "leaves the masks to `input_ids`"),
    "generator": optional(
        Allowed("be a torch.Generator", lambda value: isinstance(value, torch.Generator)), "is PyTorch's own"
    ),
    "callback": optional(Allowed("be a function of a step", callable), "calls nothing"),
    "streamer": optional(
        Allowed("have `put` and `end`", lambda value: hasattr(value, "put") and hasattr(value, "end")), "shows nothing"
    ),
}


def read_tensor(name: str, value: Any) -> torch.Tensor:
    """A list, array or tensor as a tensor on the CPU.

    Raises:
        `ValueError`: for what has no numbers in rows of one length.
    """
    try:
        x = torch.as_tensor(value, device=value.device if torch.is_tensor(value) else "cpu").cpu()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"`{name}`={shown(value)} must be numbers in rows of one length: {error}") from error
    if x.layout != torch.strided or x.is_quantized:
        raise ValueError(f"`{name}`={shown(value)} must be an ordinary tensor, neither sparse nor quantised.")
    return x


def read_whole(name: str, value: Any) -> torch.Tensor:
    """The same for whole numbers, as int64; `True` and 1.0 are none."""
    x = read_tensor(name, value)
    if x.numel() and not has_whole_numbers(x):
        raise ValueError(f"`{name}`={shown(value)} must be whole numbers, not {x.dtype}.")
    return x.long()


def read_mask(name: str, value: Any) -> torch.Tensor:
    """The same for a mask of any type that holds 0 and 1 alone, as bool."""
    x = read_tensor(name, value)
    if x.is_complex() or not ((x == 0) | (x == 1)).all():
        raise ValueError(f"`{name}`={shown(value)} must hold 0 (padding) and 1 alone.")
    return x.bool()


def read_seeds(seed: Any, generator: torch.Generator | None, batch_size: int) -> int | list[int] | None:
    """The seed, or the seeds of the rows; at most one of `seed` and `generator` may be given."""
    if seed is not None and generator is not None:
        raise ValueError(f"`seed`={shown(seed)} and `generator` exclude each other: give one of them.")
    several = isinstance(seed, (list, tuple))
    if several and len(seed) != batch_size:
        raise ValueError(f"`seed` lists {len(seed)} seeds for {batch_size} sequences: give one per sequence.")
    if seed is not None and not all(map(is_whole, seed if several else [seed])):
        raise ValueError(f"`seed`={shown(seed)} must be a whole number or a list of them.")
    return [int(s) for s in seed] if several else seed


def continued(
    input_ids: torch.Tensor | None, attention_mask: Any, max_new_tokens: int, config
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Prompts, (B, L), with masks behind the last real token of each, and their mask (`None`: there is no padding).

    Padding stays on its side: `p p · ·` becomes `p p M M · ·`, and `· · p p` becomes `· · p p M M`.

    Raises:
        `ValueError`: without prompts, and if the longest and its masks are more than the model's longest text.
    """
    if input_ids is None:
        raise ValueError(
            f"`max_new_tokens`={max_new_tokens} are put behind a prompt: give `input_ids`, or `length` for a text "
            "from nothing."
        )
    if input_ids.dim() != 2 or len(input_ids) == 0:
        raise ValueError(f"`input_ids` of shape {tuple(input_ids.shape)} must be (batch, length): rows of token ids.")
    length, longest = input_ids.shape[1], config.max_position_embeddings
    if length + max_new_tokens > longest:
        raise ValueError(
            f"`max_new_tokens`={max_new_tokens} behind a prompt of {length} tokens are more than the model's longest "
            f"text, `max_position_embeddings`={longest}: give at most {max(0, longest - length)}, or a shorter prompt."
        )
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask
    real = read_mask("attention_mask", real)
    if real.shape != input_ids.shape:
        raise ValueError(
            f"`attention_mask` of shape {tuple(real.shape)} must have the shape {tuple(input_ids.shape)} of "
            "`input_ids`."
        )
    column = torch.arange(length + max_new_tokens, device="cpu")
    end = (real * (column[:length] + 1)).amax(dim=1, keepdim=True) if length else real.new_zeros(len(real), 1).long()
    new = (column >= end) & (column < end + max_new_tokens)  # (B, L + new)
    source = torch.where(column < end, column, column - max_new_tokens).clamp(min=0)
    given, real = (F.pad(x, (0, max_new_tokens)).gather(1, source) for x in (input_ids, real))
    real = real | new
    return given.masked_fill(new, config.mask_token_id), None if real.all() else real


def check_ids(input_ids: torch.Tensor, attention_mask: torch.Tensor | None, config) -> None:
    """Raise a `ValueError` for ids outside the vocabulary, a mask of another shape, or a row with nothing to write."""
    check_mask_id(config.mask_token_id, config.vocab_size)
    low, high = input_ids.min().item(), input_ids.max().item()
    if low < 0 or high >= config.vocab_size:
        raise ValueError(
            f"`input_ids` holds ids from {low} to {high}, but they must lie in [0, `vocab_size`={config.vocab_size}): "
            "use the tokenizer that the model was trained with."
        )
    wanted = input_ids == config.mask_token_id
    if attention_mask is not None:
        wanted = wanted & attention_mask
    complete = (~wanted.any(dim=1)).nonzero().flatten().tolist()
    if complete:
        raise ValueError(
            f"`input_ids` has no mask in row(s) {shown(complete)}: put `mask_token_id`={config.mask_token_id} where "
            "tokens are wanted."
        )


def check_generation_config(config: Any) -> None:
    """Raise a `ValueError` for a configuration that is not of our kind.

    That of a model loaded as remote code is another class of the same name.
    """
    if not hasattr(config, "tuned"):
        whose = "transformers' own for left-to-right models" if isinstance(config, GenerationConfig) else "not one"
        raise ValueError(
            f"`generation_config` is a {type(config).__name__}, {whose}: give an `fpmgm.MGMGenerationConfig`, or its "
            "values as arguments, such as `budget=96`."
        )
