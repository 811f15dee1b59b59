# SPDX-License-Identifier: Apache-2.0
"""What may be given to the image pipeline: classes by id or name, pictures, and masks of codes or pixels.

Shapes: E pictures given, L codes of a picture, H = W grid size, S image size.
"""

import difflib
from collections.abc import Iterator
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F

from .models.image_processing import RESAMPLES, to_rgb
from .models.image_tokenizer import ImageTokenizerMixin


if TYPE_CHECKING:
    from PIL import Image
    from transformers import CLIPImageProcessorPil

MOST_NAMED = 20  # classes that an error lists


def class_ids(class_labels: Any, id2label: dict[int, str]) -> list[int] | None:
    """Ids of classes given by id or name; ids are not checked.

    Raises:
        `ValueError`: for a name that no class has, or more than one.

    >>> class_ids(["tench", 1], {0: "tench, Tinca tinca", 1: "church"})
    [0, 1]
    """
    if class_labels is None:
        return None
    labels = class_labels.tolist() if hasattr(class_labels, "tolist") else class_labels
    labels = [labels] if isinstance(labels, (str, Integral)) else list(labels)
    return [class_id(label, id2label) if isinstance(label, str) else label for label in labels]


def class_id(label: str, id2label: dict[int, str]) -> int:
    """Id of the class that has this name, or has it among synonyms with ", " between them."""
    found = [i for i, name in id2label.items() if label in (name, *name.split(", "))]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"`class_labels`: {label!r} names the classes {found}: give an id.")
    names = list(id2label.values())
    if len(names) > MOST_NAMED:
        names = difflib.get_close_matches(label, names, n=5, cutoff=0.0)
    allowed = f"one of {names}" if len(names) == len(id2label) else f"such as {names}"
    raise ValueError(
        f"`class_labels`: {label!r} must be a name in `model.config.id2label`, {allowed}, or an id from 0 to "
        f"{len(id2label) - 1}."
    )


def as_list(values: Any) -> list:
    """What a list, tuple or iterator holds; anything else is one value.

    >>> as_list(range(2)), as_list(iter("ab"))
    ([range(0, 2)], ['a', 'b'])
    """
    return list(values) if isinstance(values, (list, tuple, Iterator)) else [values]


def pictures(images: Any, argument: str = "image") -> "list[Image.Image]":
    """RGB pictures, as viewers show them, of one picture or several.

    Args:
        images: `PIL.Image.Image`, 8-bit array (H, W, 3) or (E, H, W, 3), 8-bit tensor (3, H, W) or (E, 3, H, W), or a
            list or iterator of these.
        argument (`str`): What the caller calls them, for errors.

    Raises:
        `ValueError`: for anything else, above all an address or a path, which is never fetched or opened, and for
            sides beyond 1 : 20.
    """
    found = [picture for value in as_list(images) for picture in _opened(value, argument)]
    if not found:
        raise ValueError(f"`{argument}`={images!r} holds no picture: give one or more.")
    try:
        return [to_rgb(picture) for picture in found]
    except ValueError as error:
        raise ValueError(f"`{argument}`: {error}.") from error


def _opened(value: Any, argument: str) -> "list[Image.Image]":
    from PIL import Image

    if isinstance(value, Image.Image):
        return [value]
    if torch.is_tensor(value):
        rows = value.detach().cpu().movedim(-3, -1).numpy() if value.dim() in (3, 4) else None
    else:
        rows = value if isinstance(value, np.ndarray) and value.ndim in (3, 4) else None
    if rows is None or rows.dtype != np.uint8 or rows.shape[-1] != 3 or not rows.size:
        shape = f" of {value.dtype} and shape {tuple(value.shape)}" if hasattr(value, "shape") else f"={value!r:.200}"
        raise ValueError(
            f"`{argument}`{shape} must be pictures: `PIL.Image.Image`, 8-bit arrays (height, width, 3) or tensors "
            "(3, height, width). Addresses are not fetched and files not opened here: use `PIL.Image.open`."
        )
    return [Image.fromarray(np.ascontiguousarray(row)) for row in rows.reshape(-1, *rows.shape[-3:])]


def wanted_codes(
    mask: Any, image: "Image.Image", tokenizer: ImageTokenizerMixin, processor: "CLIPImageProcessorPil"
) -> torch.BoolTensor:
    """(L,) codes to draw anew: those with a pixel in the mask.

    Args:
        mask: A `PIL.Image.Image` of the size of `image`, white where it is to be drawn anew, or a tensor or array,
            true there, of (H, W) codes or (S, S) pixels.
        image (`PIL.Image.Image`): The picture that the mask belongs to.
        tokenizer ([`VQGANModel`] or [`XQGANModel`]): For its grid and image size.
        processor (`CLIPImageProcessorPil`): Resizes and crops a mask as it does the picture.

    Raises:
        `ValueError`: for another size, and for a mask that marks nothing.
    """
    grid, size = tokenizer.grid_size, tokenizer.image_size
    if hasattr(mask, "convert"):  # a PIL.Image
        if mask.size != image.size:
            raise ValueError(f"`mask` of size {mask.size} must have the size {image.size} of `image`.")
        white = to_rgb(mask).convert("L").point(lambda value: 255 * (value > 127)).convert("RGB")
        options = {"resample": RESAMPLES["bilinear"], "do_normalize": False, "return_tensors": "pt"}
        pixels = processor(white, **options)["pixel_values"][0, 0] > 0  # (S, S)
    else:
        try:
            pixels = torch.as_tensor(mask).cpu() != 0
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"`mask`={mask!r:.200} must be a `PIL.Image.Image`, a tensor or an array.") from error
    if pixels.shape not in ((grid, grid), (size, size)):
        raise ValueError(
            f"`mask` of shape {tuple(pixels.shape)} must be ({grid}, {grid}) codes or ({size}, {size}) pixels."
        )
    wanted = F.adaptive_max_pool2d(pixels[None].float(), grid).flatten().bool()
    if not wanted.any():
        raise ValueError("`mask` marks nothing: make it white, or true, where the picture is to be drawn anew.")
    return wanted


def entries(
    classes: list[int] | None, codes: torch.LongTensor | None, repeats: int
) -> tuple[list[int] | None, torch.LongTensor | None]:
    """Classes and (E, L) codes to begin with, one of either standing for all, each repeated.

    Raises:
        `ValueError`: for several of both that are not equally many.
    """
    if classes is not None and codes is not None and len(classes) != len(codes):
        if 1 not in (len(classes), len(codes)):
            raise ValueError(
                f"`image` lists {len(codes)} pictures for {len(classes)} entries of `class_labels`: give one for all "
                "or one for each."
            )
        count = max(len(classes), len(codes))
        classes, codes = classes * (count // len(classes)), codes.expand(count, -1)
    classes = None if classes is None else [label for label in classes for _ in range(repeats)]
    codes = None if codes is None else codes.repeat_interleave(repeats, dim=0)
    return classes, codes
