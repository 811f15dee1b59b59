# SPDX-License-Identifier: Apache-2.0
"""What may be given to the image pipeline: classes by id or name, and masks of codes or pixels.

Shapes: E pictures given, L codes of a picture, H = W grid size, S image size.
"""

import difflib
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from .models.image_processing import RESAMPLES
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
        white = mask.convert("L").point(lambda value: 255 * (value > 127)).convert("RGB")
        options = {"resample": RESAMPLES["bilinear"], "do_normalize": False, "return_tensors": "pt"}
        pixels = processor(white, **options)["pixel_values"][0, 0] > 0  # (S, S)
    else:
        pixels = torch.as_tensor(mask).cpu() != 0
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
