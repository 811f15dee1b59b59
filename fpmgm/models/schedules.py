# SPDX-License-Identifier: Apache-2.0
"""Which positions are revealed at which step, where that is known before the first one: in the ancestral order, with
or without masking tokens again, far apart, by a rank, and how many where the predictions say which.

Every position has a window of steps. Without blocks it is all of them; with blocks, those of its block.

Shapes: B batch, L length, T steps.
"""

import math
from typing import NamedTuple

import torch

from .blocks import Windows, whole_window
from .noise import masked_probability


SMALLEST_TIME = 1e-5  # the time grid ends here


class RevealSchedule(NamedTuple):
    """T lists of ascending indices into B·L, on the CPU: what each step reveals, and what it masks again after that.

    `left_over` (P,) are the positions that the last step of their window reveals only because it is the last.
    """

    reveals: list[torch.Tensor]
    remasks: list[torch.Tensor]
    left_over: torch.Tensor


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


def ancestral_schedule(
    uniforms: torch.Tensor, wanted: torch.Tensor, num_steps: int, windows: Windows
) -> RevealSchedule:
    """Reveal each position of `wanted` (B, L) at the step of its window that its uniform (B, L) decides, the rest at
    the window's last."""
    first, counts = windows
    steps = torch.zeros_like(first)
    for count in counts[wanted].unique().tolist():
        steps = torch.where(counts == count, ancestral_reveal_steps(uniforms, count), steps)
    left_over = wanted & (steps == counts)
    return _once(first + torch.minimum(steps, counts - 1), wanted, num_steps, left_over)


def spread_schedule(uniforms: torch.Tensor, wanted: torch.Tensor, num_steps: int, windows: Windows) -> RevealSchedule:
    """Reveal each block of `wanted` (B, L) over its window, what one step reveals as far apart as can be.

    The places of a block, its n positions to write, are visited in the order of [`halton_line`], after a rotation by
    the uniform (B, L) of its first position, as many at a step as [`halton_counts`] says.
    """
    first, counts = windows
    steps = torch.zeros_like(first)
    for start in first[wanted].unique().tolist():
        block = wanted & (first == start)
        sizes = block.sum(dim=1, keepdim=True)  # (B, 1) n
        shifts = (uniforms.gather(1, block.long().argmax(dim=1, keepdim=True)) * sizes).long()
        places = (block.cumsum(dim=1) - 1 + shifts) % sizes.clamp(min=1)  # (B, L) in the block, rotated
        for size, count in {*zip(sizes.expand_as(block)[block].tolist(), counts[block].tolist(), strict=True)}:
            visits = torch.tensor(halton_counts(size, count), device="cpu")  # of each step
            step = torch.arange(count, device="cpu").repeat_interleave(visits)[halton_line(size).argsort()]  # (n,)
            alike = block & (sizes == size) & (counts == count)
            steps = torch.where(alike, start + step[places.clamp(max=size - 1)], steps)
    return _once(steps, wanted, num_steps, torch.zeros_like(wanted))


def _once(steps: torch.Tensor, wanted: torch.Tensor, num_steps: int, left_over: torch.Tensor) -> RevealSchedule:
    """Reveal each position of `wanted` (B, L) at its step, for good."""
    steps = steps.masked_fill(~wanted, num_steps).flatten()
    *reveals, _ = steps.argsort(stable=True).split(torch.bincount(steps, minlength=num_steps + 1).tolist())
    return RevealSchedule(reveals, [steps[:0]] * num_steps, left_over.flatten().nonzero().squeeze(1))


def remasking_schedule(
    uniforms: torch.Tensor, wanted: torch.Tensor, num_steps: int, cap: float, windows: Windows
) -> RevealSchedule:
    """The ancestral order, but from t to s a visible token is masked again with probability σ (ReMDM).

    σ = min(cap, (1 − α_s)/α_t) and a masked position is revealed with probability (α_s − (1 − σ)α_t)/(1 − α_t), where
    α is the probability of being visible: the marginals at every step are those of the ancestral sampler. Each
    position's time runs down in its window; before and after it, nothing happens to it.

    Args:
        uniforms (`torch.Tensor`): (T, B, L).
        wanted (`torch.Tensor`): (B, L) bool, what `generate` may write.
        cap (`float`): Largest σ, in (0, 1].
    """
    masked, left_over, reveals, remasks = wanted.clone(), torch.zeros_like(wanted), [], []
    for step in range(num_steps):
        inside = wanted & (windows.first <= step) & (step <= windows.last)
        now, after = (_visible_probability(step + i - windows.first, windows.counts) for i in (0, 1))
        sigma = torch.clamp((1 - after) / now, max=cap)
        revealed = inside & masked & (uniforms[step] < (after - (1 - sigma) * now) / (1 - now))
        last = inside & (step == windows.last)
        remasked = inside & ~last & ~masked & (uniforms[step] < sigma)
        left_over = left_over | (last & masked & ~revealed)
        revealed = revealed | (last & masked)
        masked = (masked & ~revealed) | remasked
        reveals.append(revealed.flatten().nonzero().squeeze(1))
        remasks.append(remasked.flatten().nonzero().squeeze(1))
    return RevealSchedule(reveals, remasks, left_over.flatten().nonzero().squeeze(1))


def _visible_probability(step: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """α at the beginning of each position's own `step`, (B, L), of `counts` (B, L) in equal parts of its time."""
    time = 1 - (step.clamp(min=0).double() / counts).clamp(max=1) * (1 - SMALLEST_TIME)
    return 1 - masked_probability(time)


def ranked_schedule(priority: torch.Tensor, wanted: torch.Tensor, counts: torch.Tensor) -> RevealSchedule:
    """Reveal the positions of `wanted` (B, L) by rising `priority` (B, L), `counts` (T, B) at each step."""
    num_steps = len(counts)
    ranks = priority.double().masked_fill(~wanted, float("inf")).argsort(dim=1, stable=True).argsort(dim=1)
    steps = torch.searchsorted(counts.T.cumsum(dim=1), ranks, right=True)  # (B, L): the first whose total passes it
    return _once(steps, wanted, num_steps, torch.zeros_like(wanted))


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


def halton_line(count: int) -> torch.Tensor:
    """(count,) places on a line in the order of their reversed binary digits, the Halton sequence of one dimension:
    the even ones come before the odd ones, among them those that are multiples of four before the others, and so on.

    >>> halton_line(8).tolist()
    [0, 4, 2, 6, 1, 5, 3, 7]
    """
    bits = (count - 1).bit_length()
    places = torch.arange(2**bits, device="cpu")
    turned = sum(((places >> i & 1) << (bits - 1 - i) for i in range(bits)), torch.zeros_like(places))
    return turned[turned < count]


def halton_counts(count: int, num_steps: int) -> list[int]:
    """How many of `count` places each of `num_steps` steps visits in the order of [`halton_line`].

    The odd places, which come last, get a third of the steps, the odd ones among the even halves a third of the rest,
    and so on: no step has neighbours of two kinds, and the first steps, which see little, reveal little. Where there
    are more steps than places, the last steps visit none.

    >>> halton_counts(128, 8)
    [8, 8, 16, 16, 16, 21, 21, 22]
    """
    if num_steps >= count:
        return [1] * count + [0] * (num_steps - count)
    if num_steps == 1:
        return [count]
    odd = count // 2
    steps = min(max(round(num_steps / 3), 1, num_steps - (count - odd)), odd, num_steps - 1)
    return halton_counts(count - odd, num_steps - steps) + [
        odd * (i + 1) // steps - odd * i // steps for i in range(steps)
    ]


def _halton_cells(count: int, base: int, side: int) -> torch.Tensor:
    """⌊side · x⌋ of the first `count` points x of the van der Corput sequence, in whole numbers."""
    rest = torch.arange(1, count + 1, device="cpu")
    mirrored, scale = torch.zeros_like(rest), 1
    while rest.any():
        mirrored, rest, scale = mirrored * base + rest % base, rest // base, scale * base
    return mirrored * side // scale


def equal_counts(wanted: torch.Tensor, num_steps: int, windows: Windows | None = None) -> torch.Tensor:
    """(T, B) tokens that each step reveals in each row of `wanted` (B, L): equal shares of those in whose window it
    lies, larger ones first. `windows` of `None`: all steps for all.

    Raises:
        `ValueError`: if a row has fewer positions to write than there are steps.
    """
    _count_wanted(wanted, num_steps)
    first, counts = whole_window(wanted, num_steps) if windows is None else windows
    step = torch.arange(num_steps, device="cpu")
    empty = torch.zeros(len(wanted), num_steps, dtype=torch.long, device="cpu")
    sizes, lengths = empty.scatter_add(1, first, wanted.long()), empty.scatter(1, first, counts)  # where one begins
    begun = torch.where(sizes > 0, step, 0).cummax(dim=1).values  # (B, T) first step of the window
    sizes, lengths = sizes.gather(1, begun), lengths.gather(1, begun)
    return (sizes // lengths + (step - begun < sizes % lengths)).T


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
