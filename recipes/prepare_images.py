# SPDX-License-Identifier: Apache-2.0
"""Encode pictures once: a folder of class folders or a hub dataset becomes a folder of codes to train on.

    python recipes/prepare_images.py --image_dir imagenette2 --tokenizer XQGAN-4096.pt --output_dir codes/imagenette
    python recipes/prepare_images.py --dataset_name frgfm/imagenette --dataset_config full_size \
        --eval_split validation --tokenizer vq_ds16_c2i.pt --output_dir codes/imagenette

The same command goes on after an interruption.
"""

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import DatasetDict

from fpmgm.command_line import parse_arguments
from image_data import EncodingArguments, PictureArguments, encode_pictures


@dataclass
class PrepareArguments:
    """Where the codes go."""

    output_dir: str = field(metadata={"help": "Where the codes are written."})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "Where to run."})


def main(argv: list[str] | None = None) -> DatasetDict:
    """Encode and report."""
    pictures, encoding, args = parse_arguments((PictureArguments, EncodingArguments, PrepareArguments), __doc__, argv)
    codes = encode_pictures(pictures, encoding, args.output_dir, args.device)
    report = json.loads((Path(args.output_dir) / "preparation.json").read_text(encoding="utf-8"))
    for split, rows in codes.items():
        found, left_out = report["counts"][split]["pictures"], report["left_out"][split]
        print(f"{split}: {found:,} pictures, {left_out:,} unreadable, {len(rows):,} rows of codes")
    words = ["--config", "recipes/configs/fp_maskgit_small.yaml", "--codes_dir", args.output_dir]
    print(f"next:\n    {shlex.join(['python', 'recipes/train_imagenette.py', *words])}")
    return codes


if __name__ == "__main__":
    main()
