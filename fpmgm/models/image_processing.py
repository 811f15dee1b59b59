# SPDX-License-Identifier: Apache-2.0
"""How pictures become an image tokenizer's pixels."""

from typing import TYPE_CHECKING

from transformers.utils import is_vision_available


if TYPE_CHECKING:
    from transformers import CLIPImageProcessorPil

RESAMPLES = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}  # Pillow's numbers


def make_image_processor(image_size: int, resample: str = "bilinear") -> "CLIPImageProcessorPil":
    """An image processor for tokenizers: shortest edge to `image_size`, centre crop, RGB, pixels in [-1, 1].

    Args:
        image_size (`int`): Pixels along one side.
        resample (`str`, defaults to `"bilinear"`): `"nearest"`, `"lanczos"`, `"bilinear"` or `"bicubic"`.

    Raises:
        `ValueError`: for another `resample`.
        `ImportError`: without Pillow.

    >>> make_image_processor(32).size["shortest_edge"]
    32
    """
    if not is_vision_available():
        raise ImportError("pictures need Pillow: pip install 'fpmgm[images]'")
    if resample not in RESAMPLES:
        raise ValueError(f"`resample`={resample!r} must be one of {tuple(RESAMPLES)}.")
    from transformers import CLIPImageProcessorPil

    return CLIPImageProcessorPil(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        resample=RESAMPLES[resample],
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


__all__ = ["make_image_processor"]
