# SPDX-License-Identifier: Apache-2.0
"""How pictures become an image tokenizer's pixels."""

from typing import TYPE_CHECKING, Any

from transformers.utils import is_vision_available

from .arguments import one_of


if TYPE_CHECKING:
    from transformers import CLIPImageProcessorPil

RESAMPLES = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}  # Pillow's numbers
MOST_ASPECT = 20  # longer side over shorter: resized by the shorter, a line of pixels would fill the memory


def make_image_processor(image_size: int, resample: str = "bilinear") -> "CLIPImageProcessorPil":
    """An image processor for tokenizers: shortest edge to `image_size`, centre crop, RGB, pixels in [-1, 1].

    Args:
        image_size (`int`): Pixels along one side.
        resample (`str`, defaults to `"bilinear"`): `"nearest"`, `"lanczos"`, `"bilinear"` or `"bicubic"`.

    Raises:
        `ValueError`: for another `resample`.
        `ImportError`: without Pillow.

    Examples:
        >>> make_image_processor(32).size["shortest_edge"]
        32
    """
    if not is_vision_available():
        raise ImportError("pictures need Pillow: pip install 'fpmgm[images]'")
    one_of(RESAMPLES).check("resample", resample)
    from transformers import CLIPImageProcessorPil

    return CLIPImageProcessorPil(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        resample=RESAMPLES[resample],
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


def to_rgb(image: Any) -> Any:
    """The 8-bit RGB picture that a viewer shows: 16-bit grey is scaled down, what is transparent lies on white.

    Args:
        image (`PIL.Image.Image`): Of any mode but `"F"`, whose range is not known.

    Raises:
        `ValueError`: for sides beyond 1 : 20 and for values of more than 16 bits.
    """
    check_sides(*image.size)
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    elif image.mode == "F":
        raise ValueError("a picture of floating numbers has no range: save it with 8 or 16 bits")
    if image.has_transparency_data:
        above = image.convert("RGBA")
        image = above.copy()
        image.paste((255, 255, 255, 255), (0, 0, *image.size))
        image.alpha_composite(above)
    return image.convert("RGB")


def check_sides(width: int, height: int) -> None:
    """Raise a `ValueError` for a picture whose sides are beyond 1 : 20."""
    if max(width, height) > MOST_ASPECT * min(width, height):
        raise ValueError(f"{width} × {height} pixels: the longer side may be {MOST_ASPECT} times the shorter at most")


def _eight_bits(image: Any) -> Any:
    """16-bit grey as 8-bit grey; a grey marked as transparent as white."""
    image, transparent = image.convert("I"), image.info.get("transparency")
    low, high = image.getextrema()
    if low < 0 or high > 65535:
        raise ValueError(f"grey values from {low} to {high} are not of 16 bits: save it with 8 or 16 bits")
    levels = [round(value / 257) for value in range(65536)]
    if isinstance(transparent, int) and 0 <= transparent < 65536:
        levels[transparent] = 255
    image.info.pop("transparency", None)
    return image.point(levels, "L")


__all__ = ["check_sides", "make_image_processor", "to_rgb"]
