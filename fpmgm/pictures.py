# SPDX-License-Identifier: Apache-2.0
"""Sheets of pictures, and the reveal of their codes as an animation; this needs Pillow.

Shapes: B batch, L codes of a picture, H = W grid size, S image size.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from .models.generation_mgm import GenerationStep
from .models.image_tokenizer import ImageTokenizerMixin, to_uint8
from .models.modes import evaluating


if TYPE_CHECKING:
    from PIL import Image

GAP = 2  # pixels between the pictures of a sheet
VISIBLE, LARGEST = 128, 2048  # pixels: width to which small pictures are enlarged, of a sheet at most
LETTERS = 14  # pixels: least size of labels
GREY = 0.0  # in [-1, 1]: where a code is masked


def to_pil(pixels: torch.Tensor) -> "list[Image.Image]":
    """Pictures of (B, 3, S, S) 8-bit pixels.

    >>> to_pil(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))[0].size
    (4, 4)
    """
    from PIL import Image

    return [Image.fromarray(rows) for rows in pixels.permute(0, 2, 3, 1).contiguous().numpy()]


def make_grid(
    images: "list[Image.Image]",
    columns: int | None = None,
    scale: int | None = None,
    row_labels: list[str] | None = None,
    column_labels: list[str] | None = None,
) -> "Image.Image":
    """A sheet of pictures of one size, row by row, on white.

    Args:
        images (`list[PIL.Image.Image]`): The pictures.
        columns (`int`, *optional*): Pictures in a row. `None`: about as many as there are rows.
        scale (`int`, *optional*): Enlargement of each pixel, a whole number. `None`: small pictures become about 128
            pixels wide, or what fits into a sheet of 2,048.
        row_labels, column_labels (`list[str]`, *optional*): Words beside each row and above each column. `None`: none.

    Raises:
        `ValueError`: without pictures, for less than one column or a scale below 1, and for more or fewer labels than
            rows or columns.

    Examples:
        >>> make_grid(to_pil(torch.zeros(5, 3, 4, 4, dtype=torch.uint8)), scale=1).size  # rows of three and two
        (16, 10)
    """
    from PIL import Image

    images = list(images)
    columns = math.ceil(len(images) ** 0.5) if columns is None else columns
    if not images or columns < 1 or (scale is not None and scale < 1):
        raise ValueError(
            f"`images` has {len(images)} pictures for `columns`={columns}, `scale`={scale}: each must be at least 1."
        )
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    for name, labels, count in (("row_labels", row_labels, rows), ("column_labels", column_labels, columns)):
        if labels is not None and len(labels) != count:
            raise ValueError(f"`{name}` has {len(labels)} labels for {count}: give one for each.")
    scale = _visible_scale(images[0].width, columns) if scale is None else scale
    width, height = (scale * side for side in images[0].size)
    sheet = Image.new("RGB", (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP), "white")
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        enlarged = image.resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (column * (width + GAP), row * (height + GAP)))
    centres = [[i * (side + GAP) + side // 2 for i in range(n)] for side, n in ((height, rows), (width, columns))]
    beside = [] if row_labels is None else list(zip(centres[0], row_labels, strict=True))
    above = [] if column_labels is None else list(zip(centres[1], column_labels, strict=True))
    return _labelled(sheet, beside, above, max(LETTERS, height // 6)) if beside or above else sheet


def _visible_scale(width: int, columns: int) -> int:
    return max(1, min(VISIBLE // width, LARGEST // (columns * width)))


def _labelled(
    sheet: "Image.Image", beside: list[tuple[int, str]], above: list[tuple[int, str]], letters: int
) -> "Image.Image":
    """`sheet` with words of a size in pixels at the heights and widths given, on white."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(letters)
    left, halves = (max((math.ceil(font.getlength(word)) for _, word in side), default=0) for side in (beside, above))
    left, top, right = max(left + letters, halves // 2), (2 * letters if above else 0), halves // 2
    page = Image.new("RGB", (left + sheet.width + right, top + sheet.height), "white")
    page.paste(sheet, (left, top))
    draw = ImageDraw.Draw(page)
    for y, word in beside:
        draw.text((left - letters // 2, top + y), word, "black", font, anchor="rm")
    for x, word in above:
        draw.text((left + x, top // 2), word, "black", font, anchor="mm")
    return page


def reveal_frames(
    steps: list[GenerationStep],
    tokenizer: ImageTokenizerMixin,
    columns: int | None = None,
    scale: int | None = None,
    decode_batch_size: int = 16,
) -> "list[Image.Image]":
    """What is known of the pictures after each step: a sheet of them for each, grey where a code is masked.

    Args:
        steps (`list[GenerationStep]`): Collected by `callback=steps.append` of a pipeline or `generate`.
        tokenizer ([`VQGANModel`] or [`XQGANModel`]): Decodes the codes.
        columns, scale (`int`): See [`make_grid`].
        decode_batch_size (`int`, defaults to 16): Pictures decoded at a time.

    Returns:
        `list[PIL.Image.Image]`, one for each step.
    """
    return [make_grid(to_pil(_known_pixels(s.sequences, tokenizer, decode_batch_size)), columns, scale) for s in steps]


def save_animation(
    frames: "list[Image.Image]", path: str | Path, seconds_per_frame: float = 0.2, hold: float = 2.0
) -> Path:
    """Write frames as an endless animation.

    Args:
        frames (`list[PIL.Image.Image]`): Of one size, as [`reveal_frames`] gives them.
        path (`str` or `Path`): `.gif` (256 colours a frame), `.png` or `.webp`.
        seconds_per_frame (`float`, defaults to 0.2): How long a frame is shown.
        hold (`float`, defaults to 2.0): How long the last one is.

    Returns:
        `Path` of the animation.

    Raises:
        `ValueError`: without frames.
    """
    if not frames:
        raise ValueError("`frames` is empty: collect the steps with `callback=steps.append`.")
    milliseconds = [round(1000 * seconds_per_frame)] * (len(frames) - 1) + [round(1000 * hold)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)
    return Path(path)


@torch.no_grad()
def _known_pixels(codes: torch.LongTensor, tokenizer: ImageTokenizerMixin, batch_size: int) -> torch.Tensor:
    """(B, 3, S, S) 8-bit pixels of (B, L) codes; a masked one is grey, and a zero vector to the decoder: any code in
    its place would tint its neighbours."""
    side, patch = tokenizer.grid_size, tokenizer.image_size // tokenizer.grid_size
    codebook, pictures = F.normalize(tokenizer.codebook, dim=-1), []
    for part in codes.to(tokenizer.device).view(-1, side, side).split(batch_size):  # (b, H, W)
        known = part < tokenizer.codebook_size
        latents = codebook[part.where(known, 0)] * known[..., None]  # (b, H, W, E)
        shown = known.repeat_interleave(patch, dim=1).repeat_interleave(patch, dim=2)[:, None]  # (b, 1, S, S)
        with evaluating(tokenizer):
            pixels = tokenizer.pixels(latents)
        pictures.append(to_uint8(pixels.where(shown, GREY)).cpu())
    return torch.cat(pictures)
