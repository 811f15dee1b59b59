# SPDX-License-Identifier: Apache-2.0
"""Which positions are revealed at which step, and which token is drawn there.

All random numbers of a call are drawn before its first step. In the ancestral order the reveal steps do not depend on
the logits, so they are known beforehand, on the host: a step computes its head at the positions that it reveals and
nowhere else (exact, not an approximation), and never asks the device how many there are.

Shapes: B batch, L length, V vocabulary, P positions revealed at a step, T steps.
"""

import math
from typing import NamedTuple

import torch

from .noise import masked_probability, stream_generator


SMALLEST_TIME = 1e-5  # the time grid ends here
TIE = 2.0**-30  # probabilities whose logarithms differ by less are equal; rounding decides nothing
COARSE_TIE = 2.0**-16  # the same for logits of less than double precision
MOST_NUMBERS = 2**30  # random numbers of a call: 8 GiB
CHUNK_ELEMENTS = 2**25  # logits drawn at once in float64: bounds the memory of a first step that reveals everything


class RevealSchedule(NamedTuple):
    """T lists of ascending indices into B·L, on the CPU: what each step reveals, and what it masks again after that.

    `left_over` (P,) are the positions that the last step reveals only because nothing comes after it.
    """

    reveals: list[torch.Tensor]
    remasks: list[torch.Tensor]
    left_over: torch.Tensor


# --- randomness --------------------------------------------------------------------------------------------------


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


# --- which positions ---------------------------------------------------------------------------------------------


def time_grid(num_steps: int) -> torch.Tensor:
    """T + 1 times from 1 to 1e-5 in equal steps, float64."""
    return torch.linspace(1.0, SMALLEST_TIME, num_steps + 1, dtype=torch.float64, device="cpu")


def ancestral_reveal_steps(uniforms: torch.Tensor, num_steps: int) -> torch.Tensor:
    """The step at which each position is revealed by the ancestral sampler, (B, L) in 0..T; T: not revealed.

    A position masked at t stays masked at s < t with probability P_s/P_t, so it is masked after step i with
    probability P(t_{i+1})/P(1): one uniform decides its step.
    """
    remaining = masked_probability(time_grid(num_steps)[1:]) / masked_probability(time_grid(num_steps)[0])
    return torch.searchsorted(-remaining, -uniforms.contiguous())  # the first i with uniform >= P(t_{i+1})/P(1)


def ancestral_schedule(uniforms: torch.Tensor, wanted: torch.Tensor, num_steps: int) -> RevealSchedule:
    """Reveal each position of `wanted` (B, L) at the step that its uniform (B, L) decides, the rest at the last."""
    steps = ancestral_reveal_steps(uniforms, num_steps).masked_fill(~wanted, num_steps + 1).flatten()
    order = steps.argsort(stable=True)
    *reveals, left_over, _ = order.split(torch.bincount(steps, minlength=num_steps + 2).tolist())
    reveals[-1] = torch.cat([reveals[-1], left_over]).sort().values
    return RevealSchedule(reveals, [order[:0]] * num_steps, left_over)


def remasking_schedule(uniforms: torch.Tensor, wanted: torch.Tensor, num_steps: int, cap: float) -> RevealSchedule:
    """The ancestral order, but from t to s a visible token is masked again with probability σ (ReMDM).

    σ = min(cap, (1 − α_s)/α_t) and a masked position is revealed with probability (α_s − (1 − σ)α_t)/(1 − α_t), where
    α is the probability of being visible: the marginals at every step are those of the ancestral sampler.

    Args:
        uniforms (`torch.Tensor`): (T, B, L).
        wanted (`torch.Tensor`): (B, L) bool, what `generate` may write.
        cap (`float`): Largest σ, in (0, 1].
    """
    visible_probability = 1 - masked_probability(time_grid(num_steps))
    masked, reveals, remasks = wanted.clone(), [], []
    for step in range(num_steps):
        now, after = visible_probability[step], visible_probability[step + 1]
        sigma = torch.clamp((1 - after) / now, max=cap)
        revealed = masked & (uniforms[step] < (after - (1 - sigma) * now) / (1 - now))
        remasked = wanted & ~masked & (uniforms[step] < sigma)
        if step == num_steps - 1:
            left_over, revealed, remasked = masked & ~revealed, masked, torch.zeros_like(masked)
        masked = (masked & ~revealed) | remasked
        reveals.append(revealed.flatten().nonzero().squeeze(1))
        remasks.append(remasked.flatten().nonzero().squeeze(1))
    return RevealSchedule(reveals, remasks, left_over.flatten().nonzero().squeeze(1))


def ranked_schedule(priority: torch.Tensor, wanted: torch.Tensor, counts: torch.Tensor) -> RevealSchedule:
    """Reveal the positions of `wanted` (B, L) by rising `priority` (B, L), `counts` (T, B) at each step."""
    num_steps = len(counts)
    ranks = priority.double().masked_fill(~wanted, float("inf")).argsort(dim=1, stable=True).argsort(dim=1)
    steps = torch.searchsorted(counts.T.cumsum(dim=1), ranks, right=True)  # (B, L): the first whose total passes it
    steps = steps.masked_fill(~wanted, num_steps).flatten()
    *reveals, _ = steps.argsort(stable=True).split(torch.bincount(steps, minlength=num_steps + 1).tolist())
    nothing = steps[:0]
    return RevealSchedule(reveals, [nothing] * num_steps, nothing)


def halton_order(side: int) -> torch.Tensor:
    """(side²,) cells of a square, row by row, in the order in which the two-dimensional Halton sequence (bases 2 for
    rows and 3 for columns, from its first point on) visits them: spread evenly at every moment.

    >>> halton_order(2).tolist()
    [2, 1, 0, 3]
    """
    count, cells = 4 * side**2, {}
    while len(cells) < side**2:
        row, column = (_halton_cells(count, base, side) for base in (2, 3))
        cells, count = dict.fromkeys((row * side + column).tolist()), 2 * count  # the first visits count
    return torch.tensor(list(cells), device="cpu")


def _halton_cells(count: int, base: int, side: int) -> torch.Tensor:
    """⌊side · x⌋ of the first `count` points x of the van der Corput sequence, in whole numbers."""
    rest = torch.arange(1, count + 1, device="cpu")
    mirrored, scale = torch.zeros_like(rest), 1
    while rest.any():
        mirrored, rest, scale = mirrored * base + rest % base, rest // base, scale * base
    return mirrored * side // scale


def equal_counts(wanted: torch.Tensor, num_steps: int) -> torch.Tensor:
    """(T, B) tokens that each step reveals in each row of `wanted` (B, L): equal shares, larger ones first.

    Raises:
        `ValueError`: if a row has fewer positions to write than there are steps.
    """
    counts = _count_wanted(wanted, num_steps)
    return counts // num_steps + (torch.arange(num_steps, device="cpu")[:, None] < counts % num_steps)


def arccos_counts(wanted: torch.Tensor, num_steps: int) -> torch.Tensor:
    """(T, B) tokens that each step reveals in each row of `wanted` (B, L): n(1 − arccos(i/T)/(π/2)) of n are visible
    after step i = 1, …, T, rounded down but at least i (Halton-MaskGIT's: few at first, many at last).

    Raises:
        `ValueError`: if a row has fewer positions to write than there are steps.
    """
    counts = _count_wanted(wanted, num_steps)
    steps = torch.arange(1, num_steps + 1, device="cpu")[:, None]
    visible = 1 - torch.arccos(steps.double() / num_steps) / (math.pi / 2)  # (T, 1)
    # 1e-9: a whole number is whole whatever the rounding
    totals = torch.maximum((visible * counts + 1e-9).floor().long(), steps)  # (T, B)
    return totals.diff(dim=0, prepend=torch.zeros_like(totals[:1]))


def _count_wanted(wanted: torch.Tensor, num_steps: int) -> torch.Tensor:
    """(B,) positions to write in each row, at least one for each step."""
    counts = wanted.sum(dim=1)
    if int(counts.min()) < num_steps:
        raise ValueError(
            f"`num_steps`={num_steps} exceeds the {int(counts.min())} masked positions of a row, but in this `order` "
            "each step reveals at least one: give fewer steps or a smaller budget."
        )
    return counts


def most_confident(
    probabilities: torch.Tensor, rows: torch.Tensor, counts: torch.Tensor, tie: float = TIE
) -> torch.Tensor:
    """Ascending indices into P of the `counts[b]` most probable draws of each row b; `probabilities`, `rows` (P,).

    Neighbours in this order whose logarithms differ by at most `tie` are equal, and of equals the first positions
    come first: positions that see the same have the same probability but for rounding, which depends on the batch.
    """
    confidence = probabilities.log()
    order = confidence.argsort(descending=True, stable=True)
    order = order[rows[order].argsort(stable=True)]  # by row, then by falling probability
    row, falling = rows[order], confidence[order]
    begins = torch.ones_like(order)  # a group of equals
    begins[1:] = (row[1:] != row[:-1]) | (falling[:-1] - falling[1:] > tie)
    order = torch.empty_like(order).index_copy(0, order, begins.cumsum(0)).argsort(stable=True)
    sizes = torch.bincount(rows, minlength=len(counts))
    rank = torch.arange(len(rows), device=rows.device) - (sizes.cumsum(0) - sizes)[rows[order]]
    return order[rank < counts.to(rows.device)[rows[order]]].sort().values


# --- which token -------------------------------------------------------------------------------------------------


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
