# SPDX-License-Identifier: Apache-2.0
"""Classifier-free guidance: the denoiser runs each sequence with and without its class, in one batch.

Shapes: B batch, P positions, V vocabulary.
"""

from collections.abc import Callable

import torch

from .arguments import shown
from .generation_inputs import read_whole


# Share of the guidance at x, from 0 at the first step to 1 at the last.
GUIDANCE_SCHEDULES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "constant": torch.ones_like,
    "linear": lambda x: x,
}


def guidance_scales(scale: float, schedule: str, places: torch.Tensor) -> torch.Tensor:
    """The scale at each place on the way from 0 to 1: 1 + (scale − 1) · share.

    >>> guidance_scales(3.0, "linear", torch.tensor([0.0, 0.5, 1.0])).tolist()
    [1.0, 2.0, 3.0]
    """
    return 1 + (scale - 1) * GUIDANCE_SCHEDULES[schedule](places)


def guided_logits(logits: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """unconditional + scale · (conditional − unconditional) in float64, `scales` (P,): (2P, V), conditional first,
    → (P, V)."""
    conditional, unconditional = logits.double().chunk(2)
    return unconditional + scales[:, None] * (conditional - unconditional)


def check_classes(
    class_labels: int | list[int] | torch.Tensor | None, guidance_scale: float, num_classes: int
) -> torch.Tensor | None:
    """The classes as int64 on the CPU, () or (B,), or `None`.

    Raises:
        `ValueError`: for classes that a model with `num_classes` (0: without classes) does not have, and for
            guidance without classes.
    """
    if guidance_scale != 1 and class_labels is None:
        raise ValueError(
            f"`guidance_scale`={guidance_scale} needs `class_labels`: give them, or leave the scale at 1."
        )
    if class_labels is None:
        return None
    if num_classes == 0:
        raise ValueError(f"`class_labels`={shown(class_labels)} cannot be given: this model has no classes.")
    try:
        classes = read_whole("class_labels", class_labels)
    except ValueError as error:
        raise ValueError(
            f"`class_labels`={shown(class_labels)} must be a whole number or one for each sequence."
        ) from error
    if classes.dim() > 1 or classes.numel() == 0 or classes.min() < 0 or classes.max() > num_classes:
        raise ValueError(
            f"`class_labels`={shown(classes.tolist())} must be a whole number or one for each sequence, from 0 to "
            f"{num_classes - 1}, or {num_classes} for no class."
        )
    return classes


def class_rows(classes: torch.Tensor, batch_size: int, guidance_scale: float, num_classes: int) -> torch.Tensor:
    """(B,) classes of the sequences, and under guidance the null class of all of them behind: (2B,).

    Raises:
        `ValueError`: if there are as many classes as neither one nor B.
    """
    if classes.dim() and len(classes) != batch_size:
        raise ValueError(f"`class_labels` has {len(classes)} classes for {batch_size} sequences: give one for each.")
    classes = classes.expand(batch_size)
    if guidance_scale == 1:
        return classes
    return torch.cat([classes, torch.full_like(classes, num_classes)])
