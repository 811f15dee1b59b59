# SPDX-License-Identifier: Apache-2.0
"""Draw pictures with a pipeline, from nothing or into the masked part of a picture.

    python recipes/sample_images.py --model org/fp-maskgit --class_labels tench church --num_images_per_class 4
    python recipes/sample_images.py --model outputs/fp_maskgit --tokenizer XQGAN-4096.pt --class_labels tench
    python recipes/sample_images.py --model outputs/pipeline --class_labels 3 --image photo.png --mask mask.png

A model as train_imagenette.py exports it needs its image tokenizer, which is that of the codes it was trained on; left
out, it is looked for where it was when these were made. Writes each picture, `grid.png` with all of them and
`reveal.gif`, how their codes were revealed, to `output_dir`.
"""

import re
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModel

from fpmgm import FPMaskGITPipeline, FPMaskGITPipelineOutput, make_grid, reveal_frames, save_animation
from fpmgm.command_line import LocalPath, ModelName, parse_arguments
from fpmgm.conversion import load_image_tokenizer
from fpmgm.conversion.checkpoint import read_json
from fpmgm.data import make_image_processor
from fpmgm.data.codes import PREPARATION, codebook_hash
from fpmgm.data.image_codes import read_image
from fpmgm.models.image_processing import RESAMPLES


GENERATION = ("budget", "num_steps", "allocation", "reuse", "order", "temperature", "top_k", "top_p")
GENERATION += ("guidance_scale", "guidance_schedule")


@dataclass
class SampleImagesArguments:
    """What to draw; an option left out takes the model's own default (model/generation_config.json)."""

    model: ModelName = field(metadata={"help": "Folder or hub name of a pipeline, or of a model with `tokenizer`."})
    tokenizer: ModelName | None = field(
        default=None, metadata={"help": "Of a model: folder or hub name of its image tokenizer, or a file of one."}
    )
    tokenizer_subfolder: str = field(default="", metadata={"help": "Where in that folder, such as vq."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the hub."})
    class_labels: list[str] | None = field(default=None, metadata={"help": "Names or ids; null: no class."})
    num_images_per_class: int = field(default=1, metadata={"help": "Pictures of each class."})
    image: LocalPath | None = field(default=None, metadata={"help": "A picture to keep a part of."})
    mask: LocalPath | None = field(default=None, metadata={"help": "Of its size, white where it is drawn anew."})
    budget: int | None = field(default=None, metadata={"help": "Block evaluations per picture."})
    num_steps: int | None = field(default=None, metadata={"help": "Denoising steps; null: from the budget."})
    allocation: str | None = field(default=None, metadata={"help": "fixed, decreasing, increasing, cosine, ..."})
    reuse: str | None = field(default=None, metadata={"help": "none, full or 3sr."})
    order: str | None = field(default=None, metadata={"help": "halton, random or confidence."})
    temperature: float | None = field(default=None, metadata={"help": "0: most likely codes."})
    top_k: int | None = field(default=None, metadata={"help": "Draw among the k most likely codes."})
    top_p: float | None = field(default=None, metadata={"help": "Draw among codes that hold this probability."})
    guidance_scale: float | None = field(default=None, metadata={"help": "1: no guidance."})
    guidance_schedule: str | None = field(default=None, metadata={"help": "constant or linear."})
    seed: int = field(default=0, metadata={"help": "Picture k uses the stream (seed, k)."})
    decode_batch_size: int = field(default=16, metadata={"help": "Pictures decoded at a time."})
    columns: int | None = field(default=None, metadata={"help": "Pictures in a row of the grid; null: a square."})
    scale: int | None = field(
        default=None, metadata={"help": "Enlargement in grid and animation; null: small pictures become visible."}
    )
    output_dir: str = field(default="outputs/images", metadata={"help": "Where everything is written."})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "Where to run."})


def main(argv: list[str] | None = None) -> FPMaskGITPipelineOutput:
    """Draw, write and report."""
    (args,) = parse_arguments((SampleImagesArguments,), __doc__, argv)
    folder, steps = Path(args.output_dir), []
    pipeline = load_pipeline(args).to(args.device)
    names = pipeline.model.config.id2label
    start = time.perf_counter()
    out = pipeline(
        None if args.class_labels is None else [name_or_id(label, names) for label in args.class_labels],
        args.num_images_per_class,
        image=read_picture("image", args.image),
        mask=read_picture("mask", args.mask),
        seed=args.seed,
        decode_batch_size=args.decode_batch_size,
        callback=steps.append,
        progress_bar=True,
        **{name: getattr(args, name) for name in GENERATION if getattr(args, name) is not None},
    )
    seconds = time.perf_counter() - start

    folder.mkdir(parents=True, exist_ok=True)
    classes = [None] * len(out.images) if out.class_labels is None else out.class_labels.tolist()
    for i, (picture, label) in enumerate(zip(out.images, classes, strict=True)):
        picture.save(folder / f"{i:04d}{file_name(names.get(label, ''))}.png")
    make_grid(out.images, args.columns, args.scale).save(folder / "grid.png")
    frames = reveal_frames(steps, pipeline.tokenizer, args.columns, args.scale, args.decode_batch_size)
    save_animation(frames, folder / "reveal.gif")
    print(
        f"{len(out.images)} picture(s) in {folder}: {out.num_steps} steps, {out.block_evaluations} block evaluations "
        f"each, {out.guidance_evaluations} more for guidance; {seconds:.1f} s in all on {args.device}"
    )
    return out


def load_pipeline(args: SampleImagesArguments) -> FPMaskGITPipeline:
    """A pipeline, or one made of a trained model and the image tokenizer whose codes it reads."""
    if args.tokenizer is None and args.tokenizer_subfolder:
        raise ValueError(f"`tokenizer_subfolder`={args.tokenizer_subfolder!r} is of `tokenizer`: give that too.")
    trained = Path(args.model) / PREPARATION
    if args.tokenizer is None and not trained.is_file():
        return FPMaskGITPipeline.from_pretrained(args.model, revision=args.revision)
    told = read_json(trained) if trained.is_file() else {}
    name = args.tokenizer or told.get("tokenizer")
    subfolder = args.tokenizer_subfolder if args.tokenizer else told.get("tokenizer_subfolder", "")
    if name is None:
        raise ValueError(f"`tokenizer` is needed: `model`={args.model!r} is no pipeline. Give that of its codes.")
    model = AutoModel.from_pretrained(args.model, revision=args.revision or "main")
    tokenizer = load_image_tokenizer(name, subfolder)
    if told.get("codebook", codebook_hash(tokenizer)) != codebook_hash(tokenizer):
        raise ValueError(
            f"`model`={args.model!r} was trained on codes of another image tokenizer than `tokenizer`={name!r}: give "
            "the one that its pictures were encoded with."
        )
    resamples = {number: resample for resample, number in RESAMPLES.items()}
    resample = resamples.get(told.get("resample"), "bilinear")
    return FPMaskGITPipeline(model, tokenizer, make_image_processor(tokenizer.image_size, resample))


def read_picture(option: str, path: str | None) -> Image.Image | None:
    """The picture of a file."""
    try:
        return None if path is None else read_image({"path": path, "bytes": None})
    except ValueError as error:
        raise ValueError(f"`{option}`={path!r} cannot be read: {error}.") from error


def name_or_id(label: str, names: dict[int, str]) -> str | int:
    """A class as typed: a number that is no class's name is an id."""
    return int(label) if label.isdecimal() and label not in names.values() else label


def file_name(label: str) -> str:
    """The first of a class's names, in letters that every disk takes, after a hyphen."""
    return "-" + re.sub(r"\W+", "_", label.split(",")[0]) if label else ""


if __name__ == "__main__":
    main()
