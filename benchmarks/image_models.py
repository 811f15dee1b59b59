# SPDX-License-Identifier: Apache-2.0
"""The way of pictures on a small scale: tokenizer, codes, MaskGIT and FP-MaskGIT, consistency, samples under budgets.

    python benchmarks/image_models.py --image_dir cifar10 --eval_split test --weights efficientnet-lite0-57934424.pth

Every model is made by a recipe with its small YAML and the overrides below. Samples are judged by a *proxy* Fréchet
distance (EfficientNet-Lite0, no FID) to held-out pictures; as many other held-out pictures and their reconstructions
are the floors. Times are those of a CPU's thread at work, so that other processes hardly change them. What is done
already in `--work_dir` is not done again. Writes JSON with provenance, a table and a picture.
"""

import json
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModel
from transformers.utils import logging

from fpmgm.command_line import LocalPath, parse_arguments
from fpmgm.conversion import load_image_tokenizer
from fpmgm.data import load_codes, load_images, make_image_processor
from fpmgm.data.image_codes import centre_crop, read_image
from fpmgm.evaluation import (
    EfficientNetLiteExtractor,
    evaluate_images,
    extract_features,
    image_statistics,
    provenance,
    to_uint8,
)
from fpmgm.evaluation.report import table, write_report
from fpmgm.models.noise import arccos_ratio, mask_tokens, mask_uniforms, sequential_times
from fpmgm.pictures import make_grid, to_pil
from fpmgm.trainers import MGMTrainer, MGMTrainingConfig
from fpmgm.trainers.run_record import describe_files
from made_models import ROOT, Run, arguments_of, folder_of, make, parameters_of, run_recipe
from training_cost import ITERATIONS, QUIET, step, timed_steps


SHARED = (
    "--per_device_train_batch_size 32 --ema_decay 0.99 --adam_beta2 0.95 --eval_images 500 --logging_steps 50 "
    "--save_total_limit 1 --disable_tqdm True --report_to none --dataloader_pin_memory False --weight_decay 0.03 "
    "--warmup_steps 50"
)
BASE = (
    "--hidden_size 64 --intermediate_size 192 --learning_rate 2e-3 --max_steps {base} --eval_strategy no "
    "--save_steps 200"
)
ADAPT = "--learning_rate 5e-4 --lr_scheduler_type constant_with_warmup --max_steps {adapt} --save_steps 50"
RUNS = {
    "MaskGIT 8": Run("train_imagenette", "maskgit_small", None, f"{BASE} --num_pre_layers 8", ["none"]),
    "FP-MaskGIT 1/1/1": Run("train_imagenette", "fp_maskgit_small", None, BASE, ["none", "3sr"]),
    "FP-MaskGIT, as long": Run("train_imagenette", None, "FP-MaskGIT 1/1/1", ADAPT, ["none", "3sr"]),
    "FP-MaskGIT + consistency": Run("posttrain_consistency", "consistency_small", "FP-MaskGIT 1/1/1",
        f"{ADAPT} --consistency_warmup_steps 50 --eval_steps 50", ["none", "3sr"],
    ),
}  # fmt: skip
BLOCKS_PER_STEP = 8  # of every model: 8 layers, or 1/1/1 with 6 iterations on average
BATCH = 50  # pictures at once
SHOWN = 10  # pictures in a row of the sheet


@dataclass
class Arguments:
    """Which pictures, how long, how they are judged."""

    image_dir: LocalPath = field(metadata={"help": "Folder of splits of class folders."})
    eval_split: str = field(default="test", metadata={"help": "Its folder of pictures to hold out."})
    weights: LocalPath | None = field(
        default=None, metadata={"help": "Of EfficientNet-Lite0; null: those of its package."}
    )
    extractor_size: int = field(default=96, metadata={"help": "Pixels to which it sees pictures resized."})
    vq_steps: int = field(default=1000, metadata={"help": "Optimizer steps of the tokenizer."})
    base_steps: int = field(default=700, metadata={"help": "Of the base models."})
    adapt_steps: int = field(default=150, metadata={"help": "Of consistency, and of as much training without."})
    budgets: list[int] = field(default_factory=lambda: [48, 96, 192, 384], metadata={"help": "Block evaluations."})
    guidance_scale: float = field(default=2.0, metadata={"help": "1: no guidance."})
    num_samples: int = field(default=200, metadata={"help": "Pictures a row, a multiple of the classes."})
    repetitions: int = field(default=9, metadata={"help": "Of the timed training steps."})
    seed: int = field(default=0, metadata={"help": "Of the samples."})
    work_dir: str = field(default="outputs/images", metadata={"help": "Keeps what is done."})
    output: str = field(default="benchmarks/results/images_cpu.json", metadata={"help": "JSON to write."})


# --- training ------------------------------------------------------------------------------------------------------


def make_codes(args: Arguments) -> dict:
    """Train the tokenizer and encode the pictures; what was measured of it."""
    folder = folder_of("vq", args.work_dir)
    source = ["--image_dir", args.image_dir, "--eval_split", args.eval_split]
    argv = ["--config", f"{ROOT}/recipes/configs/vq_small.yaml", *source, "--max_steps", str(args.vq_steps)]
    argv += ["--save_steps", "250", "--save_total_limit", "1", "--report_to", "none", "--disable_tqdm", "True"]
    made = make("train_vq", [*argv, "--output_dir", str(folder)], [], folder, hidden(args))
    options = ["--tokenizer", str(folder), "--augment", "flip", "--device", "cpu"]
    run_recipe("prepare_images", [*source, *options, "--output_dir", str(folder_of("codes", args.work_dir))])
    kept = ("command", "commit", "eval_psnr", "eval_codebook_usage", "eval_codebook_perplexity")
    return {name: made[name] for name in kept}


def train(name: str, args: Arguments) -> dict:
    """Run the recipe; what it measured, with its command."""
    folder, codes, run = folder_of(name, args.work_dir), folder_of("codes", args.work_dir), RUNS[name]
    steps = {"base": args.base_steps, "adapt": args.adapt_steps}
    argv = [*arguments_of(run, name, args.work_dir, SHARED, steps), "--codes_dir", str(codes)]
    made = make(run.recipe, argv, [], folder, hidden(args))
    return {
        **{key: made[key] for key in ("command", "commit", "steps")},
        "cross_entropy_before": made.get("before_loss"),
        "cross_entropy": made["eval_loss"],
        "masked_accuracy": masked_accuracy(AutoModel.from_pretrained(folder), load_codes(codes)[0]["validation"]),
        "parameters": parameters_of(folder),
    }


def hidden(args: Arguments) -> dict[str, str]:
    """Folders of this machine, and their names in commands."""
    return {args.work_dir: "WORK", args.image_dir: "PICTURES"}


@torch.no_grad()
def masked_accuracy(model, rows: Dataset) -> float:
    """Share of the masked codes of `rows` that the model guesses, at ratios as in training."""
    hits = total = 0.0
    rows = rows.with_format("torch")
    t = sequential_times(0.5, torch.arange(len(rows)), arccos_ratio)
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        ids = batch["input_ids"].long()
        uniforms = mask_uniforms(ids.shape[1], *(("accuracy", start + row) for row in range(len(ids))))
        masked = uniforms < t[start : start + BATCH, None]
        noisy, labels = mask_tokens(ids, masked, model.config.mask_token_id)
        output = model.eval()(noisy, class_labels=batch["class_labels"], labels=labels)
        hits, total = hits + output.masked_accuracy.item() * masked.sum().item(), total + masked.sum().item()
    return hits / total


def step_costs(names: list[str], args: Arguments) -> dict[str, dict]:
    """Median CPU seconds of training steps that take turns, and what one keeps for its backward pass."""
    setting = SimpleNamespace(batch_size=32, device="cpu", dtype="float32", repetitions=args.repetitions)
    row = Dataset.from_dict({"input_ids": [[0]], "class_labels": [0]})
    trainers = {}
    for name in names:
        model = AutoModel.from_pretrained(folder_of(name, args.work_dir)).train()
        trainers[name] = MGMTrainer(model, MGMTrainingConfig(**QUIET, use_cpu=True), train_dataset=row)
    kept = {
        name: statistics.mean(kept_for_backward(t, setting, n) for n in ITERATIONS) for name, t in trainers.items()
    }
    return {
        name: {"cpu_seconds_per_step": times.pop("seconds"), **times, "mib_kept_for_backward": kept[name] / 2**20}
        for name, times in timed_steps(trainers, setting, time.process_time).items()
    }


def kept_for_backward(trainer: MGMTrainer, setting: SimpleNamespace, iterations: tuple[int, int]) -> int:
    """Bytes that a training step keeps for its backward pass, beside the weights."""
    weights = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}
    kept = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        step(trainer, setting, 0, iterations)
    return sum(kept.values())


# --- samples -------------------------------------------------------------------------------------------------------


def held_out(args: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 pictures to compare with, and `num_samples` others, as many of each class."""
    rows = load_images(args.image_dir, train_split=args.eval_split, eval_split=None)["train"]
    processor = make_image_processor(load_image_tokenizer(folder_of("vq", args.work_dir)).image_size)
    pixels = np.concatenate([centre_crop(read_image(row["image"]), processor) for row in rows])
    pictures, labels = to_uint8(torch.from_numpy(pixels)), np.array(rows["label"])
    classes = labels.max() + 1
    share = args.num_samples // classes
    order = np.random.default_rng(args.seed).permutation(len(labels))
    of_class = [order[labels[order] == label] for label in range(classes)]
    others = np.stack([chosen[:share] for chosen in of_class], axis=1).flatten()  # class by class in turn
    reference = np.concatenate([chosen[share:] for chosen in of_class])
    return pictures[reference], pictures[others]


def sample(name: str, reuse: str, budget: int, args: Arguments) -> tuple[torch.Tensor, dict]:
    """(N, L) codes, the classes in turn, and what they cost."""
    protocol = {key: getattr(args, key) for key in ("num_samples", "guidance_scale", "seed")}
    folder = folder_of(name, args.work_dir)
    protocol["weights"] = describe_files([folder / "model.safetensors"])
    path = Path(args.work_dir) / "samples" / f"{folder.name}_{reuse}_{budget}.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if found.get("protocol") != protocol:
        found = {"protocol": protocol, **generate(name, reuse, budget, args)}
        write_report(path, found)
    return torch.tensor(found["codes"]), found["row"]


def generate(name: str, reuse: str, budget: int, args: Arguments) -> dict:
    """Codes of `num_samples` pictures, and what they cost."""
    model = AutoModel.from_pretrained(folder_of(name, args.work_dir)).eval()
    codes, seconds = [], []
    for first in range(0, args.num_samples, BATCH):
        places = torch.arange(first, min(first + BATCH, args.num_samples))
        start = time.process_time()
        out = model.generate(
            class_labels=places % model.config.num_classes, budget=budget, num_steps=budget // BLOCKS_PER_STEP,
            reuse=reuse, guidance_scale=args.guidance_scale, seed=[(args.seed << 32) + int(i) for i in places],
            return_dict_in_generate=True,
        )  # fmt: skip
        seconds.append((time.process_time() - start) / len(places))
        codes += out.sequences.tolist()
    row = {
        "num_steps": out.num_steps,
        "iterations": out.iterations,
        "block_evaluations": out.block_evaluations,
        "guidance_evaluations": out.guidance_evaluations,
        "cpu_milliseconds_per_image": 1000 * statistics.median(seconds),
    }
    return {"row": row, "codes": codes}


def evaluate(args: Arguments) -> tuple[dict, dict]:
    """Distances of the floors and of all samples; and the first pictures of each, for the sheet."""
    vq = load_image_tokenizer(folder_of("vq", args.work_dir))
    extractor = EfficientNetLiteExtractor(args.weights, image_size=args.extractor_size)
    real, others = held_out(args)
    features, _ = extract_features(real.split(BATCH), extractor)
    reference = image_statistics(features, extractor, f"{len(real)} held-out pictures")
    pixels = others.float() / 127.5 - 1
    sets = {
        "held-out pictures": others,
        "their reconstructions": decoded(vq, torch.cat([vq.encode(x).flatten(1) for x in pixels.split(BATCH)])),
    }
    rows = []
    for name, run in RUNS.items():
        for reuse in run.reuses:
            for budget in args.budgets:
                codes, row = sample(name, reuse, budget, args)
                rows.append({"model": name, "reuse": reuse, "budget": budget, **row})
                sets[name, reuse, budget] = decoded(vq, codes)
    distances = {key: evaluate_images(images.split(BATCH), reference, extractor) for key, images in sets.items()}
    for row in rows:
        row["proxy_frechet_distance"] = distances[row["model"], row["reuse"], row["budget"]][extractor.distance_name]
    floors = {name: distances[name][extractor.distance_name] for name in list(sets)[:2]}
    protocol = {
        key: distances["held-out pictures"][key]
        for key in ("extractor", "resize", "reference", "num_reference", "num_images")
    }
    return {"floors": floors, "protocol": protocol, "samples": rows}, sets


def decoded(vq, codes: torch.Tensor) -> torch.Tensor:
    """(N, 3, S, S) uint8 pictures of (N, L) codes."""
    return torch.cat([to_uint8(vq.decode(part)) for part in codes.split(BATCH)])


# --- the report ----------------------------------------------------------------------------------------------------


def markdown(result: dict) -> str:
    """Both tables."""
    runs = []
    for name, run in result["runs"].items():
        cost = result["step_costs"].get(name, {})
        formats = {"cpu_seconds_per_step": ".2f", "mib_kept_for_backward": ".0f"}
        costs = [f"{cost[key]:{style}}" if cost else None for key, style in formats.items()]
        measures = [f"{run[key]:.3f}" for key in ("cross_entropy", "masked_accuracy")]
        runs.append([name, f"{run['parameters']:,}", run["steps"], *measures, *costs])
    columns = ["model", "parameters", "steps", "cross-entropy", "masked accuracy", "CPU s a step"]
    budgets, samples = result["arguments"]["budgets"], []
    for setting in dict.fromkeys((row["model"], row["reuse"]) for row in result["samples"]):
        found = [row for row in result["samples"] if (row["model"], row["reuse"]) == setting]
        samples.append([*setting, *(f"{row['proxy_frechet_distance']:.1f}" for row in found)])
    for name, distance in result["floors"].items():
        samples.append([name, None, *[f"{distance:.1f}"] * len(budgets)])
    protocol = result["protocol"]
    return (
        f"{table([*columns, 'MiB kept for backward'], runs)}\n\n"
        f"{table(['proxy Fréchet distance', 'reuse', *budgets], samples)}\n\n"
        f"{protocol['extractor']}, {protocol['resize']}; {protocol['num_images']} pictures a row against "
        f"{protocol['reference']}; guidance scale {result['arguments']['guidance_scale']:g}. No FID."
    )


def draw(sets: dict, classes: list[str], budgets: list[int], path: Path) -> None:
    """A row for the real pictures, their reconstructions, and each model at the least and the largest budget."""
    keys = [*list(sets)[:2]]
    keys += [(name, run.reuses[-1], budget) for name, run in RUNS.items() for budget in (budgets[0], budgets[-1])]
    shown = min(SHOWN, *(len(sets[key]) for key in keys))
    rows = [key if isinstance(key, str) else f"{key[0]}, reuse {key[1]}, budget {key[2]}" for key in keys]
    columns = [classes[i % len(classes)] for i in range(shown)]
    pictures = [picture for key in keys for picture in to_pil(sets[key][:shown])]
    make_grid(pictures, shown, row_labels=rows, column_labels=columns).save(path)


def main() -> None:
    """Train, sample, judge; write JSON, table and picture."""
    (args,) = parse_arguments((Arguments,), __doc__)
    logging.set_verbosity_error()
    names = {"image_dir": "PICTURES", "work_dir": "WORK", "output": Path(args.output).name}
    names["weights"] = args.weights and Path(args.weights).name
    result = {"provenance": provenance(), "arguments": {**asdict(args), **names}, "tokenizer": make_codes(args)}
    result["runs"] = {name: train(name, args) for name in RUNS}
    result["step_costs"] = step_costs(list(RUNS)[:2], args)
    found, sets = evaluate(args)
    result |= found
    path = Path(args.output)
    write_report(path, result, markdown(result))
    classes = load_codes(folder_of("codes", args.work_dir))[1]["classes"]
    draw(sets, classes, args.budgets, path.with_suffix(".png"))
    print(markdown(result))


if __name__ == "__main__":
    main()
