# SPDX-License-Identifier: Apache-2.0
"""Codes of pictures as `prepare_codes` wrote them, read again: whole, and what `preparation.json` says of them."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.compute
from datasets import Dataset, DatasetDict, load_from_disk

from ..models.image_tokenizer import ImageTokenizerMixin


PREPARATION = "preparation.json"
AGAIN = "prepare the pictures again in an empty folder."
MOST_CODES = 2**31 - 1


def load_codes(folder: str | Path) -> tuple[DatasetDict, dict]:
    """The codes that [`prepare_codes`] wrote to `folder`, and what `preparation.json` says of them.

    Args:
        folder (`str` or `Path`): The same as there.

    Returns:
        `DatasetDict` as from [`prepare_codes`], and a `dict` with `grid_size`, `codebook_size`, `classes` (names),
        `codebook` (a hash of its weights), `image_size`, `augment`, `counts`, …

    Raises:
        `ValueError`: for a folder without finished codes, or rows that `preparation.json` contradicts: not
            `grid_size` squared codes, codes outside the codebook, other classes or labels outside them.
    """
    folder = Path(folder)
    if not (folder / PREPARATION).is_file():
        raise ValueError(f"`folder`={str(folder)!r} has no {PREPARATION}: make codes with recipes/prepare_images.py.")
    if not (folder / "dataset_dict.json").is_file() or (folder / "parts").exists():
        raise ValueError(f"`folder`={str(folder)!r} is not finished: repeat the command that prepares it.")
    codes, preparation = load_folder(folder), read_json(folder / PREPARATION)
    _check_preparation(preparation, folder / PREPARATION)
    for split, rows in codes.items():
        _check_rows(rows, preparation, f"{split!r} of `folder`={str(folder)!r}")
    return codes, preparation


def codebook_hash(tokenizer: ImageTokenizerMixin) -> str:
    """What tells codes of one image tokenizer from another's: a hash of its codebook."""
    codebook = tokenizer.codebook.detach().float().cpu().numpy()
    return hashlib.sha256(codebook.tobytes()).hexdigest()


def encoder_hash(tokenizer: ImageTokenizerMixin) -> str:
    """A hash of what makes codes of pictures, beside the codebook: all weights but the decoder's."""
    hashed = hashlib.sha256()
    for name, weight in sorted(tokenizer.state_dict().items()):
        if not name.startswith(("decoder.", "post_quant_conv.")):
            hashed.update(name.encode() + weight.detach().float().cpu().numpy().tobytes())
    return hashed.hexdigest()


def load_folder(folder: Path) -> DatasetDict:
    """`load_from_disk`, with every offset checked: a damaged one would be read from outside the file.

    Raises:
        `ValueError`: names the folder.
    """
    try:
        codes = load_from_disk(folder)
        for rows in codes.values():
            rows.data.validate(full=True)
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ValueError(
            f"`folder`={str(folder)!r} cannot be read as codes that `prepare_codes` wrote ({reason}): {AGAIN}"
        ) from error
    return codes


def read_json(path: Path) -> Any:
    """What a file of JSON holds.

    Raises:
        `ValueError`: names the file.
    """
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is damaged ({error}): {AGAIN}") from error


def _check_preparation(preparation: Any, path: Path) -> None:
    """Raise a `ValueError` unless the sizes and the classes are there."""
    sizes = ("grid_size", "codebook_size")
    known = preparation if isinstance(preparation, dict) else {}
    classes = known.get("classes")
    whole = all(type(known.get(name)) is int and 0 < known[name] <= MOST_CODES for name in sizes)
    if not whole or not isinstance(classes, list) or not classes or not all(isinstance(c, str) for c in classes):
        raise ValueError(
            f"{str(path)!r} must hold `grid_size` and `codebook_size`, whole numbers from 1 to {MOST_CODES:,}, and "
            f"`classes`, names: {AGAIN}"
        )


def _check_rows(rows: Dataset, preparation: dict, where: str) -> None:
    """Raise a `ValueError` for rows that are not what `preparation` says."""
    missing = {"input_ids", "class_labels"} - set(rows.column_names)
    if missing:
        raise ValueError(f"{where} has no column {sorted(missing)}: it has {rows.column_names}. Prepare it again.")
    compute, ids, labels = pyarrow.compute, rows.data.column("input_ids"), rows.data.column("class_labels")
    whole = pyarrow.types.is_integer
    if not (hasattr(ids.type, "value_type") and whole(ids.type.value_type) and whole(labels.type)):
        raise ValueError(
            f"{where} has `input_ids` of {ids.type} and `class_labels` of {labels.type}, which must be lists of whole "
            f"numbers and whole numbers: {AGAIN}"
        )
    if empty := sum(values.null_count for values in (ids, labels, compute.list_flatten(ids))):
        raise ValueError(f"{where} has {empty} rows or codes that are empty: {AGAIN}")
    if not len(rows):
        raise ValueError(f"{where} has no rows: {AGAIN}")
    names = getattr(rows.features["class_labels"], "names", preparation["classes"])
    if names != preparation["classes"]:
        found, told = str(names)[:300], str(preparation["classes"])[:300]
        raise ValueError(f"{where} has classes {found}, but {PREPARATION} says {told}.")
    length, size, classes = preparation["grid_size"] ** 2, preparation["codebook_size"], len(names)
    for what, values, low, high in (
        ("numbers of codes in a row", compute.list_value_length(ids), length, length),
        ("codes", compute.list_flatten(ids), 0, size - 1),
        ("class labels", labels, 0, classes - 1),
    ):
        found = compute.min_max(values).as_py()
        if found["min"] < low or found["max"] > high:
            raise ValueError(
                f"{where} has {what} from {found['min']} to {found['max']}, but by {PREPARATION} (`grid_size`="
                f"{preparation['grid_size']}, `codebook_size`={size}, {classes} classes) they lie in [{low}, {high}]: "
                f"{AGAIN}"
            )
