# SPDX-License-Identifier: Apache-2.0
"""Which positions are revealed at which step, and which token is drawn there.

All random numbers of a call are drawn before its first step: two uniforms per position, one for the step at which it
is revealed, one for its token. The reveal steps do not depend on the logits, so that a step computes its head at the
positions that it reveals and nowhere else (exact, not an approximation).

Shapes: B batch, L length, V vocabulary, P positions revealed at a step, T steps.
"""

import torch

from .noise import masked_probability, stream_generator


SMALLEST_TIME = 1e-5  # the time grid ends here
CHUNK_ELEMENTS = 2**25  # logits drawn at once in float64: bounds the memory of a first step that reveals everything


def time_grid(num_steps: int) -> torch.Tensor:
    """T + 1 times from 1 to 1e-5 in equal steps, float64."""
    return torch.linspace(1.0, SMALLEST_TIME, num_steps + 1, dtype=torch.float64)


def draw_uniforms(
    batch_size: int, length: int, seed: int | list[int] | None = None, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The uniforms of the reveal steps and of the tokens, each (B, L) float64.

    Args:
        seed (`int` or `list[int]`, *optional*): Row k uses the stream (seed, k), or (seed[k], 0) for a list, so that
            a row does not depend on the others. `None`: one stream for the batch.
        generator (`torch.Generator`, *optional*): Source of that stream. `None`: PyTorch's global generator.
    """
    if seed is None:
        device = "cpu" if generator is None else generator.device
        both = torch.rand(2, batch_size, length, dtype=torch.float64, generator=generator, device=device)
        return both[0], both[1]
    keys = [(s, 0) for s in seed] if isinstance(seed, list) else [(seed, row) for row in range(batch_size)]
    rows = [torch.rand(2, length, dtype=torch.float64, generator=stream_generator("generate", *key)) for key in keys]
    both = torch.stack(rows, dim=1)
    return both[0], both[1]


def ancestral_reveal_steps(uniforms: torch.Tensor, num_steps: int) -> torch.Tensor:
    """The step at which each position is revealed by the ancestral sampler, (B, L) in 0..T; T: not revealed.

    A position masked at t stays masked at s < t with probability P_s/P_t, so it is masked after step i with
    probability P(t_{i+1})/P(1): one uniform decides its step.
    """
    remaining = masked_probability(time_grid(num_steps)[1:]) / masked_probability(torch.tensor(1.0))
    steps = torch.searchsorted(-remaining.to(uniforms.device), -uniforms.contiguous(), right=False)
    return steps  # the first i with uniform >= P(t_{i+1}) / P(1)


REVEAL_ORDERS = {"ancestral": ancestral_reveal_steps}


def truncate(logits: torch.Tensor, top_k: int | None, top_p: float | None) -> torch.Tensor:
    """−inf at tokens outside the `top_k` most likely, then outside the smallest set that holds `top_p`; (P, V)."""
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        outside = probabilities.cumsum(dim=-1) - probabilities >= top_p  # what is more likely already holds top_p
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), float("-inf"))
    return logits


def draw_tokens(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    mask_token_id: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> torch.Tensor:
    """Tokens (P,) drawn from softmax(logits / temperature) in float64 by the inverse of the distribution function.

    Args:
        logits (`torch.Tensor`): (P, V), any floating type.
        uniforms (`torch.Tensor`): (P,) in [0, 1), float64.
        mask_token_id (`int`): Never drawn.
        temperature, top_k, top_p: See [`MGMGenerationConfig`].
    """
    chunks = zip(*(x.split(max(1, CHUNK_ELEMENTS // logits.shape[-1])) for x in (logits, uniforms)), strict=True)
    drawn = [_draw(*chunk, mask_token_id, temperature, top_k, top_p) for chunk in chunks]
    return torch.cat(drawn) if drawn else torch.empty(0, dtype=torch.long, device=logits.device)


def _draw(logits, uniforms, mask_token_id, temperature, top_k, top_p) -> torch.Tensor:
    logits = logits.to(torch.float64, copy=True)
    logits[:, mask_token_id] = float("-inf")
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = truncate(logits / temperature, top_k, top_p)
    cumulative = (logits - logits.amax(dim=-1, keepdim=True)).exp().cumsum(dim=-1)  # (P, V)
    total = cumulative[:, -1]
    # Strictly under the total, so that a token of probability 0 behind the last possible one is never reached.
    target = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target[:, None], right=True).squeeze(1)
