# SPDX-License-Identifier: Apache-2.0
"""Encode pictures once: a folder of class folders or a hub dataset becomes a folder of codes to train on.

    python recipes/prepare_images.py --image_dir imagenette2 --tokenizer XQGAN-4096.pt --output_dir codes/imagenette
    python recipes/prepare_images.py --dataset_name frgfm/imagenette --dataset_config full_size \
        --eval_split validation --tokenizer vq_ds16_c2i.pt --output_dir codes/imagenette

The same command goes on after an interruption.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import DatasetDict

from fpmgm.conversion import load_image_tokenizer
from fpmgm.data import load_images, make_image_processor, prepare_codes
from fpmgm.trainers.arguments import parse_arguments


@dataclass
class PrepareArguments:
    """Where the pictures come from and how they become codes."""

    tokenizer: str = field(metadata={"help": "Folder or hub name of a tokenizer, or a file of LlamaGen or XQGAN."})
    output_dir: str = field(metadata={"help": "Where the codes are written."})
    tokenizer_subfolder: str = field(default="", metadata={"help": "Where in that folder, such as vq."})
    image_dir: str | None = field(default=None, metadata={"help": "Folder of splits of class folders."})
    dataset_name: str | None = field(default=None, metadata={"help": "Hub dataset, instead of a folder."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the hub dataset."})
    train_split: str = field(default="train", metadata={"help": "Folder or split to train on."})
    eval_split: str | None = field(default="val", metadata={"help": "Folder or split to validate on; null: none."})
    image_column: str = field(default="image", metadata={"help": "Column of the hub dataset's pictures."})
    label_column: str = field(default="label", metadata={"help": "Column of the hub dataset's class labels."})
    resample: str = field(default="bilinear", metadata={"help": "nearest, lanczos, bilinear or bicubic."})
    augment: str = field(default="none", metadata={"help": "Rows for a training picture: none, flip or ten_crop."})
    batch_size: int = field(default=32, metadata={"help": "Pictures encoded at once."})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "Where to run."})


def main(argv: list[str] | None = None) -> DatasetDict:
    """Encode and report."""
    (args,) = parse_arguments((PrepareArguments,), __doc__, argv)
    tokenizer = load_image_tokenizer(args.tokenizer, args.tokenizer_subfolder).to(args.device)
    images = load_images(
        args.image_dir,
        args.dataset_name,
        args.dataset_config,
        args.train_split,
        args.eval_split,
        args.image_column,
        args.label_column,
    )
    processor = make_image_processor(tokenizer.image_size, args.resample)
    codes = prepare_codes(images, tokenizer, processor, args.output_dir, args.augment, args.batch_size)
    report = json.loads((Path(args.output_dir) / "preparation.json").read_text())
    for split, rows in codes.items():
        left_out = len(report["unreadable"][split])
        print(f"{split}: {len(images[split]):,} pictures, {left_out} unreadable, {len(rows):,} rows of codes")
    return codes


if __name__ == "__main__":
    main()
