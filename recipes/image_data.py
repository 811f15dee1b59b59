# SPDX-License-Identifier: Apache-2.0
"""The pictures of a recipe: where they come from, how they become codes, and the codes it trains on."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import DatasetDict
from transformers import PreTrainedConfig, TrainingArguments
from transformers.utils import cached_file

from fpmgm.command_line import DatasetName, LocalPath, ModelName
from fpmgm.conversion import load_image_tokenizer
from fpmgm.conversion.checkpoint import read_json
from fpmgm.data import load_codes, load_images, make_image_processor, prepare_codes
from fpmgm.data.codes import PREPARATION
from fpmgm.trainers.run_record import describe_files, digest


@dataclass
class PictureArguments:
    """Where the pictures come from."""

    image_dir: LocalPath | None = field(default=None, metadata={"help": "Folder of splits of class folders."})
    dataset_name: DatasetName | None = field(default=None, metadata={"help": "Hub dataset, instead of a folder."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the hub dataset."})
    train_split: str = field(default="train", metadata={"help": "Folder or split to train on."})
    eval_split: str | None = field(default="val", metadata={"help": "Folder or split to validate on; null: none."})
    image_column: str = field(default="image", metadata={"help": "Column of the hub dataset's pictures."})
    label_column: str = field(default="label", metadata={"help": "Column of the hub dataset's class labels."})


@dataclass
class EncodingArguments:
    """How pictures become codes."""

    tokenizer: ModelName | None = field(
        default=None, metadata={"help": "Folder or hub name of an image tokenizer, or a file of LlamaGen or XQGAN."}
    )
    tokenizer_subfolder: str = field(default="", metadata={"help": "Where in that folder, such as vq."})
    resample: str = field(default="bilinear", metadata={"help": "nearest, lanczos, bilinear or bicubic."})
    augment: str = field(default="none", metadata={"help": "Rows for a training picture: none, flip or ten_crop."})
    encoding_batch_size: int = field(default=32, metadata={"help": "Pictures encoded at once."})


@dataclass
class CodesArguments:
    """The codes to train on."""

    codes_dir: LocalPath | None = field(default=None, metadata={"help": "Folder that prepare_images.py wrote."})
    eval_images: int | None = field(default=None, metadata={"help": "Most pictures to validate on; null: all."})

    @property
    def words(self) -> list[str]:
        """The options by which another recipe reads the same codes; none without codes."""
        return [] if self.codes_dir is None else ["--codes_dir", self.codes_dir]


def read_pictures(pictures: PictureArguments) -> DatasetDict:
    """Pictures with their classes, not yet decoded."""
    source = pictures.image_dir, pictures.dataset_name, pictures.dataset_config
    splits = pictures.train_split, pictures.eval_split
    return load_images(*source, *splits, pictures.image_column, pictures.label_column)


def encode_pictures(
    pictures: PictureArguments, encoding: EncodingArguments, folder: str, device: str | torch.device
) -> DatasetDict:
    """Codes of all pictures in `folder`; what is done there already is not done again."""
    if encoding.tokenizer is None:
        raise ValueError("`tokenizer` is needed to encode pictures: give a folder, a hub name or a file of one.")
    tokenizer = load_image_tokenizer(encoding.tokenizer, encoding.tokenizer_subfolder).to(device)
    processor = make_image_processor(tokenizer.image_size, encoding.resample)
    batch_size = encoding.encoding_batch_size
    notes = {"tokenizer": encoding.tokenizer, "tokenizer_subfolder": encoding.tokenizer_subfolder}
    pictures = read_pictures(pictures)
    return prepare_codes(pictures, tokenizer, processor, folder, encoding.augment, batch_size, notes)


def load_code_rows(codes: CodesArguments) -> tuple:
    """Codes to train and to validate on, and what is known of them."""
    rows, preparation = load_codes(codes.codes_dir)
    if "validation" not in rows:
        raise ValueError(f"`codes_dir`={codes.codes_dir!r} has no pictures to validate on: prepare an `eval_split`.")
    eval_rows = rows["validation"].shuffle(seed=0)  # not the first class alone
    if codes.eval_images is not None:
        eval_rows = eval_rows.select(range(min(codes.eval_images, len(eval_rows))))
    return rows["train"], eval_rows, preparation


def check_model_reads(
    config: PreTrainedConfig, model_name: str, preparation: dict, revision: str | None = None
) -> None:
    """Raise a `ValueError` unless a trained model reads the codes and classes that `preparation` describes."""
    classes, names = preparation["classes"], list(config.id2label.values())
    found = {"codebook_size": config.codebook_size, "grid_size": config.grid_size, "num_classes": config.num_classes}
    needed = {**{name: preparation[name] for name in ("codebook_size", "grid_size")}, "num_classes": len(classes)}
    if found != needed:
        raise ValueError(f"`model_name_or_path`={model_name!r} has {found}, but `codes_dir` has {needed}.")
    if names != classes and names != [f"LABEL_{i}" for i in range(len(names))]:
        raise ValueError(f"`model_name_or_path`={model_name!r} knows the classes {names}, but `codes_dir` {classes}.")
    path = None
    if not Path(model_name).is_file():
        path = cached_file(model_name, PREPARATION, revision=revision, _raise_exceptions_for_missing_entries=False)
    if path is not None and read_json(Path(path)).get("codebook") != preparation.get("codebook"):
        raise ValueError(
            f"`model_name_or_path`={model_name!r} was trained on codes of another tokenizer than `codes_dir`: prepare "
            "the pictures with the one whose codes it reads."
        )


def describe_codes(preparation: dict) -> str:
    """For the model's card."""
    pictures, classes = preparation["counts"]["train"]["pictures"], preparation["classes"]
    return f"codes of {pictures:,} pictures of {len(classes)} classes"


def describe_rows(codes: CodesArguments, preparation: dict) -> dict:
    """What a checkpoint records of the codes: their files' contents, and how they were made."""
    files = describe_files([codes.codes_dir], "*.arrow")
    return {"codes": files, "preparation": digest(preparation), "eval_images": codes.eval_images}


def keep_preparation(codes: CodesArguments, args: TrainingArguments) -> None:
    """Put what is known of the codes beside the model that is trained on them."""
    if codes.codes_dir is not None and args.should_save:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(codes.codes_dir) / PREPARATION, args.output_dir)
