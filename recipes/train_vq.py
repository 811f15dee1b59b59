# SPDX-License-Identifier: Apache-2.0
"""Train a small image tokenizer on pictures of your own: 32 pixels become 8 × 8 codes in minutes on a CPU.

    python recipes/train_vq.py --image_dir cifar10 --eval_split test --output_dir outputs/vq
    python recipes/train_vq.py --config recipes/configs/vq_small.yaml --image_dir my_pictures --image_size 64

Writes the tokenizer with its image processor and `reconstructions.png`: pictures above, what 64 codes keep of them
below. The same command goes on from the last checkpoint in `output_dir`.
"""

import shlex
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import JanusVQVAEConfig, set_seed

from fpmgm.command_line import parse_arguments
from fpmgm.data import make_image_processor
from fpmgm.data.image_codes import centre_crop, read_image
from fpmgm.evaluation import to_uint8
from fpmgm.models.modeling_vqgan import VQGANModel
from fpmgm.trainers import ImageTokenizerConfig, ImageTokenizerTrainer
from fpmgm.trainers.lock import hold_folder
from fpmgm.trainers.run_record import Origin, digest_of_bytes
from image_data import PictureArguments, read_pictures
from narration import say
from train_and_export import run_checkpoint


SHOWN = 16  # pictures in the reconstructions
MOST_NAMED = 10  # pictures that cannot be read


@dataclass
class VQArguments:
    """How pictures are shown, and the shape of the tokenizer."""

    eval_images: int = field(default=500, metadata={"help": "Most pictures to validate on."})
    flip: bool = field(default=True, metadata={"help": "Mirror half of the pictures."})
    image_size: int = field(default=32, metadata={"help": "Pixels along one side."})
    codebook_size: int = field(default=512, metadata={"help": "Codes."})
    codebook_dim: int = field(default=8, metadata={"help": "Size of a code's vector."})
    base_channels: int = field(default=32, metadata={"help": "Channels at full resolution, a multiple of 32."})
    channel_multiplier: list[int] = field(
        default_factory=lambda: [1, 1, 2], metadata={"help": "Of the channels; each but the last halves the size."}
    )
    num_res_blocks: int = field(default=1, metadata={"help": "Residual blocks of a level."})
    latent_channels: int = field(default=64, metadata={"help": "Channels before the codebook."})


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, evaluate, export; returns the metrics."""
    types = (PictureArguments, VQArguments, ImageTokenizerConfig)
    pictures, args, training = parse_arguments(types, __doc__, argv)
    if pictures.eval_split is None:
        raise ValueError("`eval_split`=None leaves no pictures to validate on: name a folder or split.")
    with hold_folder(training.output_dir, take=training.should_save):
        return train(pictures, args, training)


def train(pictures: PictureArguments, args: VQArguments, training: ImageTokenizerConfig) -> dict[str, float]:
    """[`main`], in a folder that is this run's alone."""
    checkpoint, training.mirror = run_checkpoint(training), args.flip
    images = read_pictures(pictures)
    processor = make_image_processor(args.image_size)
    rows = images["validation"].shuffle(seed=training.seed)
    rows = rows.select(range(min(args.eval_images, len(rows))))
    eval_pixels, train_pixels = Pixels(rows, processor), Pixels(images["train"], processor)

    set_seed(training.seed)  # before the weights are drawn
    model = VQGANModel(
        JanusVQVAEConfig(
            num_embeddings=args.codebook_size,
            embed_dim=args.codebook_dim,
            base_channels=args.base_channels,
            channel_multiplier=args.channel_multiplier,
            num_res_blocks=args.num_res_blocks,
            latent_channels=args.latent_channels,
            num_patches=args.image_size // 2 ** (len(args.channel_multiplier) - 1),
        )
    )
    print(
        f"{model.num_parameters():,} parameters, {model.grid_size} × {model.grid_size} of {model.codebook_size} codes"
    )
    trainer = ImageTokenizerTrainer(
        model=model,
        args=training,
        train_dataset=train_pixels,
        eval_dataset=eval_pixels,
        processing_class=processor,
        origin=Origin({"pictures": [digest_of_bytes(part.pixels) for part in (train_pixels, eval_pixels)]}),
    )
    trainer.save_metrics("train", trainer.train(resume_from_checkpoint=checkpoint).metrics)
    metrics = trainer.evaluate()
    trainer.save_metrics("eval", metrics)
    trainer.save_model()
    draw_reconstructions(model, eval_pixels, Path(training.output_dir) / "reconstructions.png")
    used, perplexity = metrics["eval_codebook_usage"], metrics["eval_codebook_perplexity"]
    print(
        f"PSNR {metrics['eval_psnr']:.2f} dB on {len(eval_pixels)} held-out pictures; {used:.1%} of the codes in use, "
        f"perplexity {perplexity:.0f} of {model.codebook_size}"
    )
    source = ["--image_dir", pictures.image_dir] if pictures.image_dir else ["--dataset_name", pictures.dataset_name]
    words = ["python", "recipes/prepare_images.py", *source, "--tokenizer", training.output_dir]
    say(f"exported to {training.output_dir}\nnext:\n    {shlex.join([*words, '--output_dir', 'codes/mine'])}")
    return metrics


class Pixels(torch.utils.data.Dataset):
    """Pixels of pictures that can be read, decoded once and kept as bytes."""

    def __init__(self, rows: Dataset, processor):
        pixels, left_out = [], []
        for row in tqdm(rows, desc="reading pictures"):
            try:
                pixels.append(to_uint8(torch.from_numpy(centre_crop(read_image(row["image"]), processor))))
            except ValueError as error:
                left_out.append(f"{row['image']['path']} ({error})")
        if left_out:
            print(f"left out {len(left_out)} pictures that cannot be read, such as {'; '.join(left_out[:MOST_NAMED])}")
        if not pixels:
            raise ValueError(f"none of the {len(rows)} pictures can be read, such as {left_out[0]}.")
        self.pixels = torch.cat(pixels)  # (N, 3, S, S)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.pixels[index].float() / 127.5 - 1}


@torch.no_grad()
def draw_reconstructions(model: VQGANModel, dataset: Pixels, path: Path) -> None:
    """Pictures in rows of eight, each above its reconstruction, three times as large."""
    from PIL import Image

    pixels = torch.stack([dataset[i]["pixel_values"] for i in range(min(SHOWN, len(dataset)))]).to(model.device)
    model.eval()
    rebuilt = model.decode(model.encode(pixels))
    pairs = zip(pixels.split(8), rebuilt.split(8), strict=True)
    rows = [torch.cat(list(half), dim=-1) for pair in pairs for half in pair]  # (3, S, 8·S) each
    width = max(row.shape[-1] for row in rows)
    sheet = torch.cat([torch.nn.functional.pad(row, (0, width - row.shape[-1]), value=1) for row in rows], dim=-2)
    picture = Image.fromarray(np.ascontiguousarray(to_uint8(sheet).permute(1, 2, 0).cpu().numpy()))
    picture.resize((3 * picture.width, 3 * picture.height), Image.Resampling.NEAREST).save(path)


if __name__ == "__main__":
    main()
