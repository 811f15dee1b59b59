# SPDX-License-Identifier: Apache-2.0
"""What a batch must be that a model is trained or evaluated on. All of it is checked on the CPU.

Shapes: B rows of a batch, L length, S side of a picture.
"""

from collections.abc import Callable, Mapping

import torch
from transformers import PreTrainedConfig

from ..models.image_tokenizer import PIXEL_SLACK
from ..models.kinds import KINDS
from ..models.noise import IGNORE_INDEX
from .collator import BadRow


OTHER_NAMES = ("label", "label_ids")  # of classes elsewhere; `labels` is one too where it is one number a row
TOLERATED = ("token_type_ids",)  # every tokenizer of BERT's family makes it
NOT_CLASSES = (
    "is not read: the class of an image is `class_labels`, one number from 0 in each row. Rename the column, or "
    "remove it to train without classes."
)


def columns_of(config: PreTrainedConfig) -> tuple[str, ...]:
    """What is looked at in a row. Other columns are dropped, as `Trainer` drops them."""
    columns = KINDS[config.model_type].columns
    return (*columns, *OTHER_NAMES) if "class_labels" in columns else columns


def check_batch(
    batch: Mapping, config: PreTrainedConfig, completion_only_loss: bool = True
) -> dict[str, torch.Tensor]:
    """`batch` with whole numbers, without a mask that hides nothing and labels that leave out nothing.

    Args:
        batch (`Mapping`): `input_ids` (B, L) and what else the model's kind reads: `attention_mask` (B, L), 0 at
            padding; `labels` (B, L), the ids or -100 where a position is neither masked nor scored; or instead of
            them `completion_mask` (B, L), 0 there and 1 elsewhere; `class_labels` (B,).
        config (`PreTrainedConfig`): The model's.
        completion_only_loss (`bool`, defaults to `True`): Whether `completion_mask` becomes `labels`. Else it is left
            out.

    Raises:
        `ValueError`: for a column that is not read, and for a row that the model cannot be trained on.
    """
    known = KINDS[config.model_type].columns
    unknown = [name for name in batch if name not in (*columns_of(config), *TOLERATED)]
    if unknown or "input_ids" not in batch:
        raise ValueError(
            f"a batch has the columns {[*batch]}, but must have `input_ids` and may have {known[1:]}: drop {unknown}, "
            "or leave `remove_unused_columns` at True."
        )
    for name in OTHER_NAMES:
        if name in batch and "class_labels" not in batch:
            raise BadRow(0, name, NOT_CLASSES)
    batch = {name: torch.as_tensor(batch[name]) for name in known if name in batch}
    ids = batch["input_ids"] = _check_ids(batch["input_ids"], config)
    real = torch.ones_like(ids, dtype=torch.bool)
    if "attention_mask" in batch:
        real = _check_mask(batch.pop("attention_mask"), ids, "attention_mask", "1 at tokens, 0 at padding")
    _check_rows(ids, real, config)
    if not real.all():
        batch["attention_mask"] = real.long()
    if "completion_mask" in batch:
        if "labels" in batch:
            raise BadRow(0, "completion_mask", "is there beside `labels`, which say the same: remove one of them.")
        completion = batch.pop("completion_mask")
        completion = _check_mask(completion, ids, "completion_mask", "1 where the model is to write, 0 at the prompt")
        if completion_only_loss:
            batch["labels"] = ids.masked_fill(~completion, IGNORE_INDEX)
    if "labels" in batch:
        labels = _check_labels(batch.pop("labels"), ids, real, config)
        if (labels[real] == IGNORE_INDEX).any():
            batch["labels"] = labels
    if "class_labels" in batch:
        batch["class_labels"] = _check_classes(batch["class_labels"], len(ids), config)
    return batch


def _check_ids(ids: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    if ids.dim() != 2:
        raise BadRow(0, "input_ids", f"has {ids.dim() - 1} dimensions: flatten it into one list of ids.")
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise BadRow(0, "input_ids", f"holds numbers of type {ids.dtype}: ids are whole numbers.")
    ids = ids.long()
    _refuse(
        (ids < 0) | (ids >= config.vocab_size), "input_ids",
        lambda row, i: f"holds {ids[row, i]} at position {i}, but the model's ids are 0 to {config.vocab_size - 1}: "
        "encode with the model's own tokenizer.",
    )  # fmt: skip
    return ids


def _check_mask(mask: torch.Tensor, ids: torch.Tensor, column: str, meaning: str) -> torch.Tensor:
    """(B, L) bool, true where it is 1."""
    if mask.shape != ids.shape:
        raise BadRow(0, column, f"is of another shape than `input_ids`: a number for each of its {ids.shape[1]}.")
    _refuse((mask != 0) & (mask != 1), column, lambda row, i: f"holds {mask[row, i]} at position {i}: {meaning}.")
    return mask.bool()


def _check_rows(ids: torch.Tensor, real: torch.Tensor, config: PreTrainedConfig) -> None:
    length, mask_token_id = config.max_position_embeddings, config.mask_token_id
    counts, images = real.sum(dim=1), config.model_type == "fpmaskgit"
    _refuse(
        counts != length if images else counts == 0, "input_ids",
        lambda row: f"has {counts[row]} codes, but an image has {length}, and all are of one length." if images else
        "has no token that is not padding: leave the row out, say by `dataset.filter(lambda row: row['input_ids'])`.",
    )  # fmt: skip
    _refuse(
        counts > length, "input_ids",
        lambda row: f"has {counts[row]} tokens, but the model reads at most {length} (`max_position_embeddings`): cut "
        "the text into blocks, as `fpmgm.data.pack` does, or truncate it.",
    )  # fmt: skip
    _refuse(
        (ids == mask_token_id) & real, "input_ids",
        lambda row, i: f"holds the mask id {mask_token_id} at position {i} as data. "
        + (f"Codes are 0 to {mask_token_id - 1}." if images else
           "Encode plain text with `split_special_tokens=True`, so that no text becomes the mask token; padding needs "
           "an `attention_mask` of 0."),
    )  # fmt: skip


def _check_labels(
    labels: torch.Tensor, ids: torch.Tensor, real: torch.Tensor, config: PreTrainedConfig
) -> torch.Tensor:
    if labels.shape != ids.shape:
        classes = labels.dim() == 1
        if classes and config.model_type == "fpmaskgit":
            raise BadRow(0, "labels", NOT_CLASSES)
        raise BadRow(
            0, "labels",
            f"is {'one number' if classes else 'of another shape than `input_ids`'}: it holds, for each of "
            "`input_ids`, the same id, or -100 where a position is neither masked nor scored. Remove the column to "
            "train on all of them.",
        )  # fmt: skip
    _refuse(
        (labels != ids) & (labels != IGNORE_INDEX) & real, "labels",
        lambda row, i: f"holds {labels[row, i]} at position {i}, where `input_ids` holds {ids[row, i]}: it must be "
        "the same, or -100 where a position is neither masked nor scored. The trainer draws the masks; labels "
        "are not shifted.",
    )  # fmt: skip
    return labels.long()


def _check_classes(classes: torch.Tensor, size: int, config: PreTrainedConfig) -> torch.Tensor:
    if classes.shape != (size,) or classes.is_floating_point() or classes.dtype == torch.bool:
        raise BadRow(0, "class_labels", "must be one whole number.")
    _refuse(
        (classes < 0) | (classes > config.num_classes), "class_labels",
        lambda row: f"is {classes[row]}, but the model's classes are 0 to {config.num_classes - 1}, and "
        f"{config.num_classes} is no class.",
    )  # fmt: skip
    return classes.long()


def _refuse(bad: torch.Tensor, column: str, problem: Callable[..., str]) -> None:
    """Raise for the first place where `bad` (B,) or (B, L) is true, with what `problem` says of it."""
    if bad.any():
        place = bad.nonzero()[0].tolist()
        raise BadRow(place[0], column, problem(*place))


def check_pixels(batch: Mapping, size: int) -> dict[str, torch.Tensor]:
    """The `pixel_values` (B, C, S, S) of `batch`, for a tokenizer of pictures of `size` S.

    Raises:
        `ValueError`: for another shape, or a row whose pixels leave [-1, 1] or are not finite.
    """
    if "pixel_values" not in batch:
        raise ValueError(f"a batch has the columns {[*batch]}, but must have `pixel_values`: name the pictures so.")
    pixels = torch.as_tensor(batch["pixel_values"])
    if pixels.dim() != 4 or pixels.shape[-2:] != (size, size) or not pixels.is_floating_point():
        raise BadRow(
            0, "pixel_values",
            f"is of shape {tuple(pixels.shape[1:])} and {pixels.dtype}, but must be (channels, {size}, {size}) of "
            "floating-point numbers: prepare pictures with the tokenizer's image processor.",
        )  # fmt: skip
    _refuse(
        ~(pixels.abs() <= 1 + PIXEL_SLACK).flatten(1).all(dim=1), "pixel_values",
        lambda row: f"goes from {pixels[row].min():.4g} to {pixels[row].max():.4g}, but must lie in [-1, 1]: take "
        "`2 * image / 255 - 1` of 8-bit pictures, as the image processor does.",
    )  # fmt: skip
    return {"pixel_values": pixels}
