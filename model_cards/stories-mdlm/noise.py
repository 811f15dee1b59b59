# SPDX-License-Identifier: Apache-2.0
"""Corruption by masking: the log-linear and the arccos schedule, antithetic times, independent and nested masks.

Every random number comes from a generator that is made from a key (seed, step, sequence, …), so that it depends
neither on how a batch is split over ranks and micro-batches nor on what was drawn before.

Shapes: B batch, L length.
"""

import hashlib
import math
from collections.abc import Callable

import torch


SCHEDULE_EPSILON = 1e-3  # ε: at t = 1 a token is still visible with probability ε (training only)
MINIMUM_TIME = 1e-3  # smallest diffusion time seen in training
IGNORE_INDEX = -100  # label of a position without loss


def stream_generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by `key`: the same numbers for the same key on every machine, in every process.

    >>> torch.equal(torch.rand(3, generator=stream_generator(7, "mask", 2)),
    ...             torch.rand(3, generator=stream_generator(7, "mask", 2)))
    True
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def masked_probability(t: torch.Tensor) -> torch.Tensor:
    """P(masked at t) = (1 − ε)t, the log-linear schedule. `t` in (0, 1], any shape."""
    return (1 - SCHEDULE_EPSILON) * t


def sigma(t: torch.Tensor) -> torch.Tensor:
    """Total noise σ(t) = −log1p(−(1 − ε)t), so that P(masked) = 1 − exp(−σ)."""
    return -torch.log1p(-(1 - SCHEDULE_EPSILON) * t)


def loss_weight(t: torch.Tensor) -> torch.Tensor:
    """Weight of the masked cross-entropy in the ELBO: σ'(t) / expm1(σ(t)), here 1/t."""
    return 1 / t


def diffusion_time(uniforms: torch.Tensor) -> torch.Tensor:
    """Uniforms in [0, 1), mapped to times in [1e-3, 1]."""
    return MINIMUM_TIME + (1 - MINIMUM_TIME) * uniforms


def arccos_ratio(uniforms: torch.Tensor) -> torch.Tensor:
    """Masking ratio arccos(r)/(π/2) of r uniform in [0, 1): in (0, 1], 2/π on average (MaskGIT's schedule)."""
    return torch.arccos(uniforms) / (math.pi / 2)


def antithetic_times(
    shift: float,
    indices: torch.Tensor,
    total: int,
    time: Callable[[torch.Tensor], torch.Tensor] = diffusion_time,
) -> torch.Tensor:
    """`time` of (shift + j/n) mod 1: one in each n-th of the unit interval, for low variance.

    Args:
        shift (`float`): Uniform in [0, 1), shared by the whole global batch.
        indices (`torch.Tensor`): (B,) places j of the sequences in the global batch.
        total (`int`): Number n of sequences in the global batch.
        time (`Callable`, defaults to [`diffusion_time`]): Maps uniforms, float64, to times or masking ratios.

    >>> antithetic_times(0.5, torch.arange(2), 2)
    tensor([0.5005, 0.0010])
    """
    return time((shift + indices.double() / total) % 1).float()


def sequential_times(
    shift: float, indices: torch.Tensor, time: Callable[[torch.Tensor], torch.Tensor] = diffusion_time
) -> torch.Tensor:
    """`time` of (shift + jφ) mod 1 with the golden ratio φ: spread evenly however many there are.

    Args:
        shift (`float`): Uniform in [0, 1).
        indices (`torch.Tensor`): (B,) places j of the sequences in the data.
        time (`Callable`, defaults to [`diffusion_time`]): Maps uniforms, float64, to times or masking ratios.
    """
    golden = (5**0.5 - 1) / 2
    return time((shift + indices.double() * golden) % 1).float()


def mask_uniforms(length: int, *keys: tuple) -> torch.Tensor:
    """(B, L) uniforms, row k from the stream `keys[k]`: a position is masked where its uniform is under P(masked)."""
    streams = (stream_generator(*key) for key in keys)
    return torch.stack([torch.rand(length, dtype=torch.float32, generator=s, device="cpu") for s in streams])


def mask_tokens(
    input_ids: torch.Tensor,
    masked: torch.Tensor,
    mask_token_id: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Corrupted ids and labels, both (B, L): masked positions hold the mask id and, as labels, their tokens."""
    return input_ids.masked_fill(masked, mask_token_id), input_ids.masked_fill(~masked, IGNORE_INDEX)


def nested_masks(
    uniforms: torch.Tensor,
    student_probability: torch.Tensor,
    clean_probability: torch.Tensor,
    maskable: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated masks of a noisier student and a cleaner teacher state (Section 3.3, Appendix C.3).

    One uniform per token serves both, so the clean mask is a subset of the student's. Where the two coincide and
    anything is masked, the masked position with the largest uniform is shown in the clean state too: the subset is
    strict.

    Args:
        uniforms (`torch.Tensor`): (B, L) in [0, 1).
        student_probability, clean_probability (`torch.Tensor`): (B,), the clean one at most the student's.
        maskable (`torch.Tensor`, *optional*): (B, L) bool, false at padding. `None`: every position.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: student and clean masks, (B, L) bool.
    """
    student = uniforms < student_probability[:, None]
    clean = uniforms < clean_probability[:, None]
    if maskable is not None:
        student, clean = student & maskable, clean & maskable
    largest = uniforms.masked_fill(~student, -1).argmax(dim=1, keepdim=True)
    coincide = (student == clean).all(dim=1, keepdim=True)
    return student, clean & ~torch.zeros_like(clean).scatter(1, largest, coincide)
