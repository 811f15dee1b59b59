# SPDX-License-Identifier: Apache-2.0
"""A causal language model as the truth: texts without end whose every probability is known.

Shapes: B texts of a batch, L tokens of a text without the start token, V vocabulary.
"""

from collections.abc import Sequence

import torch
from transformers import DynamicCache, PreTrainedModel


@torch.no_grad()
def sample_texts(truth: PreTrainedModel, seeds: Sequence[int], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts of a causal language model at temperature 1, each from its start token and from a seed of its own.

    Keys and values are kept. A text depends on its seed alone, but for rounding: how many others are drawn with it
    changes no more than that.

    Args:
        truth (`PreTrainedModel`): A causal language model with a `bos_token_id`.
        seeds (`Sequence[int]`): One for each of the B texts.
        length (`int`): Tokens L of a text. The start token is not one of them: it is given, and never drawn.

    Returns:
        `torch.LongTensor` (B, L) and `torch.Tensor` (B,) float64: the ids, and −log p of each text in nats.

    Raises:
        `ValueError`: if the model has no start token, or too few positions.
    """
    start = check_truth(truth, length)
    device = truth.device
    uniforms = torch.stack([torch.rand(length, generator=_generator(seed), dtype=torch.float64) for seed in seeds])
    uniforms = uniforms.to(device)  # (B, L)
    cache, token = DynamicCache(config=truth.config), torch.full((len(seeds), 1), start, device=device)
    tokens, surprise = [], torch.zeros(len(seeds), dtype=torch.float64, device=device)
    for position in range(length):
        logits = truth(token, past_key_values=cache, use_cache=True).logits[:, -1].double()  # (B, V)
        log_p = logits.log_softmax(dim=-1)
        sums = log_p.exp().cumsum(dim=-1)
        # The last sum is the total in its own rounding, so that no draw falls behind the last possible token.
        drawn = uniforms[:, position, None] * sums[:, -1:]
        token = torch.searchsorted(sums, drawn, right=True).clamp(max=logits.shape[-1] - 1)  # (B, 1)
        surprise -= log_p.gather(1, token).squeeze(1)
        tokens.append(token)
    return torch.cat(tokens, dim=1), surprise


def check_truth(truth: PreTrainedModel, length: int) -> int:
    """The start token of a causal language model that has room for it and `length` tokens."""
    start = truth.config.bos_token_id
    if start is None:
        raise ValueError(
            f"`truth`={truth.name_or_path!r} has no `bos_token_id`: its texts have nothing to start from."
        )
    longest = getattr(truth.config, "max_position_embeddings", length)
    if not 1 <= length <= longest:
        raise ValueError(
            f"`length`={length} must lie between 1 and the {longest} positions of `truth`={truth.name_or_path!r}."
        )
    return start


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
