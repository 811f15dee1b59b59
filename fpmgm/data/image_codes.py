# SPDX-License-Identifier: Apache-2.0
"""Pictures become rows of codes: read from class folders or the hub, cropped, varied, and encoded before training.

Shapes: A variants of a picture, S image size, L codes of a picture.
"""

import hashlib
import json
import os
import shutil
import stat
import warnings
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute
import torch
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    List,
    Value,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)
from tqdm.auto import tqdm
from transformers import CLIPImageProcessorPil
from transformers.utils import logging

from ..models.arguments import one_of
from ..models.image_processing import check_sides, to_rgb
from ..models.image_tokenizer import ImageTokenizerMixin
from .codes import PREPARATION, codebook_hash, encoder_hash, load_folder, read_json


if TYPE_CHECKING:
    from PIL import Image as PILImage

logger = logging.get_logger(__name__)

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # Pillow's names; for others it may run programs
SYSTEM_FOLDERS = ("__MACOSX", "__pycache__", "@eaDir", "lost+found")
MOST_LISTED = 100  # unreadable pictures of a split that `preparation.json` names
ZOOM = 1.1  # of the shortest edge, for ten crops
PART = 1024  # pictures that an interruption can cost at most
NOTED_LATER = ("encoder", "sizes")  # earlier versions' preparations do not say


def load_images(
    image_dir: str | Path | None = None,
    dataset_name: str | None = None,
    dataset_config: str | None = None,
    train_split: str = "train",
    eval_split: str | None = "val",
    image_column: str = "image",
    label_column: str = "label",
) -> DatasetDict:
    """Pictures with their classes, not yet decoded.

    Args:
        image_dir (`str` or `Path`, *optional*): Folder of splits of classes, as ImageNette's: `train/<class>/*.JPEG`,
            `val/<class>/*.JPEG`. `None`: `dataset_name`.
        dataset_name (`str`, *optional*): Hub dataset with a column of images and one of class labels, instead.
        dataset_config (`str`, *optional*): Configuration of the hub dataset. `None`: its default.
        train_split (`str`, defaults to `"train"`): Folder or split to train on.
        eval_split (`str`, *optional*, defaults to `"val"`): Folder or split to validate on. `None`: none.
        image_column, label_column (`str`): Columns of the hub dataset.

    Returns:
        `DatasetDict` with `"train"` and, unless `eval_split` is `None`, `"validation"`: columns `image` (path or
        bytes) and `label`, a `ClassLabel` with the same names in both.

    Raises:
        `ValueError`: for a missing or empty folder, missing columns, rows without a class, or not exactly one source.
    """
    if (image_dir is None) == (dataset_name is None):
        raise ValueError(
            f"`image_dir`={image_dir} and `dataset_name`={dataset_name}: give one of them as the source of pictures."
        )
    splits = {"train": train_split, **({} if eval_split is None else {"validation": eval_split})}
    if image_dir is not None:
        return _image_folders({name: Path(image_dir) / folder for name, folder in splits.items()})
    found = {name: load_dataset(dataset_name, dataset_config, split=split) for name, split in splits.items()}
    for dataset in found.values():
        missing = {image_column, label_column} - set(dataset.column_names)
        if missing or not isinstance(dataset.features[label_column], ClassLabel):
            raise ValueError(
                f"`image_column`={image_column!r} and `label_column`={label_column!r} must be columns of "
                f"{dataset_name!r}, the second one of class labels; it has {dict(dataset.features)}."
            )
    for name, dataset in found.items():
        labels = dataset[label_column][:]
        if bad := [i for i, label in enumerate(labels) if label is None or label < 0]:
            raise ValueError(
                f"row {bad[0]} of the split {splits[name]!r} of {dataset_name!r}, and {len(bad) - 1} more, have no "
                f"class (`label_column`={label_column!r} holds {labels[bad[0]]}), as in splits to be submitted: give "
                "another."
            )
    renames = {image_column: "image", label_column: "label"}
    columns = {name: d.select_columns(list(renames)).rename_columns(renames) for name, d in found.items()}
    return DatasetDict({name: d.cast_column("image", Image(decode=False)) for name, d in columns.items()})


def _image_folders(folders: dict[str, Path]) -> DatasetDict:
    for folder in folders.values():
        if not folder.is_dir():
            raise ValueError(f"`image_dir`: {str(folder)!r} does not exist: give a folder of splits of class folders.")
    found = {split: _class_files(folder) for split, folder in folders.items()}
    names = sorted({name for classes in found.values() for name, files in classes.items() if files})
    if empty := sorted({name for classes in found.values() for name in classes} - set(names)):
        logger.warning(f"these folders hold no pictures, so that they are no classes: {empty[:MOST_LISTED]}")
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=names)})
    datasets = {}
    for split, classes in found.items():
        files = [(path, label) for label, name in enumerate(names) for path in classes.get(name, ())]
        if not files:
            folder = str(folders[split])
            raise ValueError(f"`image_dir`: {folder!r} has no pictures ({', '.join(SUFFIXES)}) in class folders.")
        paths, labels = zip(*files, strict=True)
        datasets[split] = Dataset.from_dict({"image": list(paths), "label": list(labels)}, features=features)
    return DatasetDict(datasets)


def _class_files(folder: Path) -> dict[str, list[str]]:
    """By class, the files that are named like pictures, without those that are hidden or a system's."""
    classes = [path for path in folder.iterdir() if path.is_dir() and not _is_hidden(path.name)]
    for path in classes:
        if path.name != _readable(path.name):
            raise ValueError(
                f"`image_dir`: the name of the class {_readable(path)!r} is not UTF-8: rename the folder."
            )
    return {
        path.name: [
            _readable(file)
            for file in sorted(path.rglob("*"))
            if file.suffix.lower() in SUFFIXES and not any(map(_is_hidden, file.relative_to(path).parts))
        ]
        for path in classes
    }


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in SYSTEM_FOLDERS


def _readable(path: str | Path) -> str:
    """A path as text; bytes that are not UTF-8 are escaped, so that no file has this name."""
    return os.fsencode(path).decode("utf-8", errors="backslashreplace")


def read_image(image: dict) -> "PILImage.Image":
    """The picture, an RGB `PIL.Image`, of an undecoded `{"path", "bytes"}`; its orientation tag is not applied.

    16-bit grey is scaled to 8 bits, what is transparent lies on white.

    Raises:
        `ValueError`: says why it cannot be read, whatever is wrong with it: no regular file, no picture of `FORMATS`,
            damaged, sides beyond 1 : 20, or so many pixels that Pillow warns of them
            (`PIL.Image.MAX_IMAGE_PIXELS`).
    """
    from PIL import Image as PILImage

    try:
        if image["bytes"] is None and not stat.S_ISREG(os.stat(image["path"]).st_mode):
            raise ValueError("it is no regular file")  # opening a named pipe would wait for ever
        with warnings.catch_warnings():
            warnings.simplefilter("error", PILImage.DecompressionBombWarning)
            source = image["path"] if image["bytes"] is None else BytesIO(image["bytes"])
            PILImage.init()
            with PILImage.open(source, formats=[name for name in FORMATS if name in PILImage.OPEN]) as opened:
                check_sides(*opened.size)  # before pixels are made
                opened.load()
                return to_rgb(opened)
    except FileNotFoundError as error:
        raise ValueError("there is no such file; one whose name is not UTF-8 must be renamed") from error
    except PILImage.UnidentifiedImageError as error:
        raise ValueError(f"it is none of {', '.join(FORMATS)}, or its header is damaged") from error
    except Exception as error:  # Pillow's decoders raise errors of every kind
        raise ValueError(" ".join(str(error).split())[:200] or type(error).__name__) from error


def centre_crop(image: "PILImage.Image", processor: CLIPImageProcessorPil) -> np.ndarray:
    """(1, 3, S, S) pixels of a picture: the middle."""
    return np.stack(processor(image)["pixel_values"])


def flips(image: "PILImage.Image", processor: CLIPImageProcessorPil) -> np.ndarray:
    """(2, 3, S, S) pixels of a picture: the middle, and the same mirrored."""
    middle = centre_crop(image, processor)
    return np.concatenate([middle, middle[..., ::-1]])


def ten_crop(image: "PILImage.Image", processor: CLIPImageProcessorPil) -> np.ndarray:
    """(10, 3, S, S) pixels of a picture whose shortest edge is 1.1 times as long: corners and middle, and mirrored."""
    size = processor.crop_size["height"]
    zoomed = round(ZOOM * size)
    (pixels,) = processor(image, size={"shortest_edge": zoomed}, do_center_crop=False)["pixel_values"]  # (3, ·, ·)
    height, width = pixels.shape[1:]
    bottom, right = height - size, width - size
    corners = [(0, 0), (0, right), (bottom, 0), (bottom, right), (round(bottom / 2), round(right / 2))]
    crops = np.stack([pixels[:, top : top + size, left : left + size] for top, left in corners])
    return np.concatenate([crops, crops[..., ::-1]])


AUGMENTS = {"none": centre_crop, "flip": flips, "ten_crop": ten_crop}


def prepare_codes(
    images: DatasetDict,
    tokenizer: ImageTokenizerMixin,
    processor: CLIPImageProcessorPil,
    folder: str | Path,
    augment: str = "none",
    batch_size: int = 32,
    notes: dict[str, Any] | None = None,
) -> DatasetDict:
    """Encode every picture and write the codes to `folder`; an interrupted call, repeated, goes on where it was.

    Beside the codes lie the image processor and `preparation.json`: how they were made, how many there are, how many
    pictures could not be read, and the first hundred of them in each split with the reason.

    Args:
        images (`DatasetDict`): Columns `image` (undecoded) and `label`, as [`load_images`] gives them.
        tokenizer: An image tokenizer, whose `encode` gives (B, H, W) codes.
        processor (`CLIPImageProcessorPil`): Makes the tokenizer's pixels.
        folder (`str` or `Path`): Where `load_from_disk` will find the codes.
        augment (`str`, defaults to `"none"`): Rows for each training picture; one, two with `"flip"` (the second
            mirrored), ten with `"ten_crop"`. Variants are made of pixels: codes of a mirrored picture are not mirrored
            codes. Pictures to validate on always give one row.
        batch_size (`int`, defaults to 32): Pictures read and encoded at once.
        notes (`dict`, *optional*): What else `preparation.json` is to say, such as where the tokenizer is from. It
            decides nothing. `None`: nothing.

    Returns:
        `DatasetDict` with `input_ids` (L codes, row-major) and `class_labels`, a `ClassLabel`. Pictures that cannot be
        read ([`read_image`] says which) are left out and warned about.

    Raises:
        `ValueError`: for an unknown `augment`, a `folder` that holds another preparation, or if no picture of a split
            can be read.
    """
    one_of(AUGMENTS).check("augment", augment)
    folder = Path(folder)
    settings = _settings(images, tokenizer, processor, augment)
    _check_same(folder, settings)
    if (folder / "dataset_dict.json").is_file() and not (folder / "parts").exists():
        return load_folder(folder)
    codes, unreadable = {}, {}
    for split, rows in images.items():
        vary = AUGMENTS[augment if split == "train" else "none"]
        codes[split], unreadable[split] = _encode(
            rows, tokenizer, processor, vary, folder / "parts" / split, batch_size
        )
    processor.save_pretrained(folder)
    counts = {split: {"pictures": len(images[split]), "rows": len(codes[split])} for split in codes}
    left_out = {split: len(names) for split, names in unreadable.items()}
    listed = {split: names[:MOST_LISTED] for split, names in unreadable.items()}
    found = {"counts": counts, "left_out": left_out, "unreadable": listed}
    _write_json(folder / PREPARATION, {**(notes or {}), **settings, **found})
    DatasetDict(codes).save_to_disk(folder)
    shutil.rmtree(folder / "parts")
    return load_folder(folder)


def _encode(rows: Dataset, tokenizer, processor, vary, parts: Path, batch_size: int) -> tuple[Dataset, list[str]]:
    """Codes of `rows`, made part by part, and the names of pictures that cannot be read."""
    encoded, unreadable = [], []
    for start in tqdm(range(0, len(rows), PART), desc=f"encoding {parts.name}", unit="part"):
        part = parts / f"{start:09d}"
        if not part.is_dir():
            chosen = rows.select(range(start, min(start + PART, len(rows))))
            _write_part(part, chosen, start, tokenizer, lambda image: vary(image, processor), batch_size)
        unreadable += read_json(part / "unreadable.json")
        if (part / "codes").is_dir():
            encoded.append(load_from_disk(part / "codes"))
    if not encoded:
        raise ValueError(f"none of the {len(rows)} pictures in {parts.name!r} can be read, such as {unreadable[0]}.")
    if unreadable:
        logger.warning(
            f"left out {len(unreadable)} of the {len(rows)} pictures in {parts.name!r}, which cannot be read; "
            f"{PREPARATION} names up to {MOST_LISTED}, such as {unreadable[0]}"
        )
    return concatenate_datasets(encoded), unreadable


def _write_part(part: Path, rows: Dataset, start: int, tokenizer, vary: Callable, batch_size: int) -> None:
    """Encode `rows`, the first of which is row `start` of all, and write them in one move."""
    ids, labels, unreadable = [], [], []
    for pixels, classes in _pixel_batches(rows, start, vary, batch_size, unreadable):
        codes = tokenizer.encode(torch.from_numpy(pixels).to(tokenizer.device, tokenizer.dtype))  # (B·A, H, W)
        ids.append(codes.flatten(1).cpu().numpy())
        labels += np.repeat(classes, len(codes) // len(classes)).tolist()
    unfinished = part.with_suffix(".unfinished")
    unfinished.mkdir(parents=True, exist_ok=True)
    if ids:
        small = "uint16" if tokenizer.codebook_size <= 2**16 else "int32"
        features = Features({"input_ids": List(Value(small)), "class_labels": rows.features["label"]})
        table = {"input_ids": np.concatenate(ids), "class_labels": labels}
        Dataset.from_dict(table, features=features).save_to_disk(unfinished / "codes")
    (unfinished / "unreadable.json").write_text(json.dumps(unreadable), encoding="utf-8")
    unfinished.rename(part)


def _pixel_batches(
    rows: Dataset, start: int, vary: Callable, batch_size: int, unreadable: list[str]
) -> Iterator[tuple[np.ndarray, list[int]]]:
    """(B·A, 3, S, S) pixels and B labels of the pictures that can be read; the names of others go to `unreadable`."""
    for first in range(0, len(rows), batch_size):
        pixels, labels = [], []
        for i in range(first, min(first + batch_size, len(rows))):
            row = rows[i]
            try:
                image = read_image(row["image"])
            except ValueError as error:
                unreadable.append(f"{row['image']['path'] or f'row {start + i}'} ({error})")
                continue
            pixels.append(vary(image))
            labels.append(row["label"])
        if pixels:
            yield np.concatenate(pixels), labels


def _settings(images: DatasetDict, tokenizer, processor: CLIPImageProcessorPil, augment: str) -> dict:
    """What decides the codes."""
    pictures = hashlib.sha256()
    for rows in images.values():
        paths = pyarrow.compute.struct_field(rows.data.column("image"), "path").to_pylist()
        pictures.update(json.dumps([paths, rows["label"][:]]).encode())
    return {
        "image_size": tokenizer.image_size,
        "grid_size": tokenizer.grid_size,
        "codebook_size": tokenizer.codebook_size,
        "augment": augment,
        "resample": processor.resample,
        "classes": images["train"].features["label"].names,
        "pictures": pictures.hexdigest(),
        "codebook": codebook_hash(tokenizer),
        "encoder": encoder_hash(tokenizer),
        "sizes": hashlib.sha256(json.dumps([_sizes(rows) for rows in images.values()]).encode()).hexdigest(),
    }


def _sizes(rows: Dataset) -> list[int | None]:
    """Bytes of each picture, which tell one that was changed in its place; `None`: there is no such file."""
    image = rows.data.column("image")
    paths, inside = (pyarrow.compute.struct_field(image, name) for name in ("path", "bytes"))
    pairs = zip(paths.to_pylist(), pyarrow.compute.binary_length(inside).to_pylist(), strict=True)
    return [(os.path.getsize(path) if os.path.isfile(path) else None) if n is None else n for path, n in pairs]


def _check_same(folder: Path, settings: dict) -> None:
    """Raise a `ValueError` if `folder` holds codes of other settings; note these in a new one."""
    path = folder / PREPARATION
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        _write_json(path, settings)
        return
    other = read_json(path)
    other = other if isinstance(other, dict) else {}
    known = dict.fromkeys(settings) | {name: settings[name] for name in NOTED_LATER} | other
    different = [name for name in settings if settings[name] != known[name]]
    if different:
        made, asked = (", ".join(f"{name}={of[name]!r}"[:300] for name in different) for of in (known, settings))
        raise ValueError(
            f"`folder`={str(folder)!r} holds codes made with {made}, and {asked} is asked for: remove it, give "
            "another one, or ask for what it was made with."
        )


def _write_json(path: Path, values: dict) -> None:
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    unfinished.rename(path)
