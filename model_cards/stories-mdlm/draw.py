# SPDX-License-Identifier: Apache-2.0
"""Which token is drawn at a position, and from which random numbers.

All random numbers of a call are drawn before its first step, on the CPU.

Shapes: B batch, L length, V vocabulary, P positions revealed at a step.
"""

import torch

from .noise import stream_generator


TIE = 2.0**-30  # probabilities whose logarithms differ by less are equal; rounding decides nothing
COARSE_TIE = 2.0**-16  # the same for logits of less than double precision
MOST_NUMBERS = 2**30  # random numbers of a call: 8 GiB
CHUNK_ELEMENTS = 2**25  # logits drawn at once in float64: bounds the memory of a first step that reveals everything


def draw_uniforms(
    count: int,
    real: torch.Tensor,
    seed: int | list[int] | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """(count, B, L) float64 uniforms.

    Args:
        real (`torch.Tensor`): (B, L) bool, false at padding, which takes no numbers from a row's stream: a prompt
            draws the same padded or not.
        seed (`int` or `list[int]`, *optional*): Row k uses the stream (seed, k), or (seed[k], 0) for a list, so that
            a row does not depend on the others. `None`: one stream for the batch.
        generator (`torch.Generator`, *optional*): Source of that stream. `None`: PyTorch's global generator.

    Raises:
        `ValueError`: for more numbers than 2³⁰.
    """
    if count * real.numel() > MOST_NUMBERS:
        raise ValueError(
            f"`num_steps` and `batch_size` ask for {count:,} random numbers at {real.numel():,} positions, more than "
            f"{MOST_NUMBERS:,} at once: give fewer steps, or fewer sequences in each of several calls."
        )
    if seed is None:
        device = "cpu" if generator is None else generator.device
        return torch.rand((count, *real.shape), dtype=torch.float64, generator=generator, device=device).cpu()
    uniforms = torch.zeros(count, *real.shape, dtype=torch.float64, device="cpu")
    keys = [(int(s), 0) for s in seed] if isinstance(seed, list) else [(int(seed), row) for row in range(len(real))]
    for row, key in enumerate(keys):
        stream = stream_generator("generate", *key)
        size = (count, int(real[row].sum()))
        uniforms[:, row, real[row]] = torch.rand(size, dtype=torch.float64, generator=stream, device="cpu")
    return uniforms


def truncate(logits: torch.Tensor, top_k: int | None, top_p: float | None) -> torch.Tensor:
    """−inf at tokens outside the `top_k` most likely, then outside the smallest set that holds `top_p`; (P, V).

    Logits within `TIE` of the last of the `top_k` are kept like it, and a set that misses `top_p` by as little holds
    it.
    """
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:] - TIE, float("-inf"))
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        outside = before >= top_p * (1 - TIE)  # what is more likely already holds top_p
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), float("-inf"))
    return logits


def draw_tokens(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    mask_token_id: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw from softmax(logits / temperature) in float64 by the inverse of the distribution function.

    Args:
        logits (`torch.Tensor`): (P, V), any floating type.
        uniforms (`torch.Tensor`): (P,) in [0, 1), float64.
        mask_token_id (`int`): Never drawn.
        temperature, top_k, top_p: See [`MGMGenerationConfig`].

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: tokens (P,) and the probability that each had, (P,) float64.
    """
    size = max(1, CHUNK_ELEMENTS // logits.shape[-1])
    parts = [
        _draw(chunk, chunk_uniforms, mask_token_id, temperature, top_k, top_p)
        for chunk, chunk_uniforms in zip(logits.split(size), uniforms.split(size), strict=True)
    ]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def _draw(logits, uniforms, mask_token_id, temperature, top_k, top_p) -> tuple[torch.Tensor, torch.Tensor]:
    logits = logits.to(torch.float64, copy=True)  # (P, V)
    logits[:, mask_token_id] = float("-inf")
    logits.sub_(logits.amax(dim=-1, keepdim=True))  # the largest is 0, so that no temperature is too small
    if temperature == 0:
        likeliest = (logits >= -TIE).byte().argmax(dim=-1)  # the first of equals
        return likeliest, 1 / logits.exp_().sum(dim=-1)
    weights = truncate(logits / temperature if temperature != 1 else logits, top_k, top_p).exp_()
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1:]
    # Strictly under the total, so that a token of probability 0 behind the last possible one is never reached.
    target = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    tokens = torch.searchsorted(cumulative, target, right=True)  # (P, 1)
    tokens = tokens.clamp(max=logits.shape[-1] - 1)  # beyond the end where logits are no numbers, which is reported
    return tokens.squeeze(1), (weights.gather(-1, tokens) / total).squeeze(1)
