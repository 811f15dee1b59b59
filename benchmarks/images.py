# SPDX-License-Identifier: Apache-2.0
"""The way of pictures on a small scale: tokenizer, codes, MaskGIT and FP-MaskGIT, consistency, samples under budgets.

    python benchmarks/images.py --image_dir cifar10 --eval_split test --weights efficientnet-lite0-57934424.pth

Every model is made by a recipe with its small YAML and the overrides below. Samples are judged by a *proxy* Fréchet
distance (EfficientNet-Lite0, no FID) to held-out pictures; as many other held-out pictures and their reconstructions
are the floors. Times are those of a CPU's thread at work, so that other processes hardly change them. What is done
already in `--work_dir` is not done again. Writes JSON with provenance, a table and a picture.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from datasets import Dataset
from transformers import AutoModel

from fpmgm.conversion import load_image_tokenizer
from fpmgm.data import load_codes, load_images, make_image_processor
from fpmgm.data.images import centre_crop, read_image
from fpmgm.evaluation import (
    EfficientNetLiteExtractor,
    evaluate_images,
    extract_features,
    image_statistics,
    provenance,
    to_uint8,
)
from fpmgm.evaluation.provenance import commit
from fpmgm.models.noise import arccos_ratio, mask_tokens, mask_uniforms, sequential_times
from fpmgm.pictures import make_grid, to_pil
from fpmgm.trainers import MGMTrainer, MGMTrainingConfig


sys.path.append(str(Path(__file__).resolve().parents[1] / "recipes"))

import posttrain_consistency
import prepare_images
import train_imagenette
import train_vq
from training_cost import ITERATIONS, QUIET, step


CONFIGS = Path(__file__).resolve().parents[1] / "recipes/configs"
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
RUNS = {  # name: recipe, YAML, model to go on from, overrides, reuses to sample with
    "MaskGIT 8": (train_imagenette, "maskgit_small", None, f"{BASE} --num_pre_layers 8", ["none"]),
    "FP-MaskGIT 1/1/1": (train_imagenette, "fp_maskgit_small", None, BASE, ["none", "3sr"]),
    "FP-MaskGIT, as long": (train_imagenette, None, "FP-MaskGIT 1/1/1", ADAPT, ["none", "3sr"]),
    "FP-MaskGIT + consistency": (
        posttrain_consistency, "consistency_small", "FP-MaskGIT 1/1/1",
        f"{ADAPT} --consistency_warmup_steps 50 --eval_steps 50", ["none", "3sr"],
    ),
}  # fmt: skip
BLOCKS_PER_STEP = 8  # of every model: 8 layers, or 1/1/1 with 6 iterations on average
BATCH = 50  # pictures at once
SHOWN = 20  # pictures in a row of the sheet


def folder_of(name: str, args: argparse.Namespace) -> Path:
    """Where a run's model is."""
    return Path(args.work_dir) / name.lower().replace(", ", "_").replace(" + ", "_").replace(" ", "_").replace(
        "/", "-"
    )


# --- training ------------------------------------------------------------------------------------------------------


def make_codes(args: argparse.Namespace) -> dict:
    """Train the tokenizer and encode the pictures; what was measured of it."""
    folder, codes = folder_of("vq", args), folder_of("codes", args)
    source = ["--image_dir", args.image_dir, "--eval_split", args.eval_split]
    done = folder / "run.json"
    if not done.is_file():
        argv = ["--config", str(CONFIGS / "vq_small.yaml"), *source, "--max_steps", str(args.vq_steps)]
        argv += ["--save_steps", "250", "--save_total_limit", "1", "--report_to", "none", "--disable_tqdm", "True"]
        metrics = train_vq.main([*argv, "--output_dir", str(folder)])
        kept = ("eval_psnr", "eval_codebook_usage", "eval_codebook_perplexity")
        run = {"command": command(train_vq, argv, args), "commit": commit(), **{name: metrics[name] for name in kept}}
        done.write_text(json.dumps(run), encoding="utf-8")
    options = ["--tokenizer", str(folder), "--augment", "flip", "--output_dir", str(codes), "--device", "cpu"]
    prepare_images.main([*source, *options])
    return json.loads(done.read_text(encoding="utf-8"))


def train(name: str, args: argparse.Namespace) -> dict:
    """Run the recipe; what it measured, with its command."""
    recipe, config, start, overrides, _ = RUNS[name]
    folder = folder_of(name, args)
    argv = ["--config", str(CONFIGS / f"{config}.yaml")] if config else []
    argv += ["--model_name_or_path", str(folder_of(start, args))] if start else []
    argv += [*SHARED.split(), *overrides.format(base=args.base_steps, adapt=args.adapt_steps).split()]
    argv += ["--codes_dir", str(folder_of("codes", args)), "--output_dir", str(folder)]
    done = folder / "run.json"
    if not done.is_file():
        metrics = recipe.main(argv)
        state = json.loads(
            (sorted(folder.glob("checkpoint-*"))[-1] / "trainer_state.json").read_text(encoding="utf-8")
        )
        model = AutoModel.from_pretrained(folder)
        run = {
            "command": command(recipe, argv, args),
            "commit": commit(),
            "steps": state["global_step"],
            "cross_entropy_before": metrics.get("before_loss"),
            "cross_entropy": metrics["eval_loss"],
            "masked_accuracy": masked_accuracy(model, load_codes(folder_of("codes", args))[0]["validation"]),
            "parameters": model.num_parameters(),
        }
        done.write_text(json.dumps(run), encoding="utf-8")
    return json.loads(done.read_text(encoding="utf-8"))


def command(recipe, argv: list[str], args: argparse.Namespace) -> str:
    """A recipe's command line without the folders of this machine."""
    line = " ".join(["python", f"recipes/{recipe.__name__}.py", *argv]).replace(f"{CONFIGS.parents[1]}/", "")
    return line.replace(args.work_dir, "WORK").replace(args.image_dir, "PICTURES")


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


def step_costs(names: list[str], args: argparse.Namespace) -> dict[str, dict]:
    """Median CPU seconds of training steps that take turns, and what one keeps for its backward pass."""
    setting = argparse.Namespace(batch_size=32, device="cpu", dtype="float32")
    row = Dataset.from_dict({"input_ids": [[0]], "class_labels": [0]})
    trainers = {}
    for name in names:
        model = AutoModel.from_pretrained(folder_of(name, args)).train()
        trainers[name] = MGMTrainer(model, MGMTrainingConfig(**QUIET, use_cpu=True), train_dataset=row)
    times = {name: {n: [] for n in ITERATIONS} for name in names}
    kept = {
        name: statistics.mean(kept_for_backward(t, setting, n) for n in ITERATIONS) for name, t in trainers.items()
    }
    for repetition in range(args.repetitions):
        for name, trainer in trainers.items():
            for iterations in ITERATIONS:
                start = time.process_time()
                step(trainer, setting, repetition, iterations)
                times[name][iterations].append(time.process_time() - start)
    return {
        name: {
            "cpu_seconds_per_step": statistics.mean(statistics.median(values) for values in times[name].values()),
            "fastest": statistics.mean(min(values) for values in times[name].values()),
            "slowest": statistics.mean(max(values) for values in times[name].values()),
            "mib_kept_for_backward": kept[name] / 2**20,
        }
        for name in names
    }


def kept_for_backward(trainer: MGMTrainer, setting: argparse.Namespace, iterations: tuple[int, int]) -> int:
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


def held_out(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 pictures to compare with, and `num_samples` others, as many of each class."""
    rows = load_images(args.image_dir, train_split=args.eval_split, eval_split=None)["train"]
    processor = make_image_processor(load_image_tokenizer(folder_of("vq", args)).image_size)
    pixels = np.concatenate([centre_crop(read_image(row["image"]), processor) for row in rows])
    pictures, labels = to_uint8(torch.from_numpy(pixels)), np.array(rows["label"])
    classes = labels.max() + 1
    share = args.num_samples // classes
    order = np.random.default_rng(args.seed).permutation(len(labels))
    of_class = [order[labels[order] == label] for label in range(classes)]
    others = np.stack([chosen[:share] for chosen in of_class], axis=1).flatten()  # class by class in turn
    reference = np.concatenate([chosen[share:] for chosen in of_class])
    return pictures[reference], pictures[others]


def sample(name: str, reuse: str, budget: int, args: argparse.Namespace) -> tuple[torch.Tensor, dict]:
    """(N, L) codes, the classes in turn, and what they cost."""
    protocol = {key: getattr(args, key) for key in ("num_samples", "guidance_scale", "seed")}
    path = Path(args.work_dir) / "samples" / f"{folder_of(name, args).name}_{reuse}_{budget}.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if found.get("protocol") != protocol:
        found = {"protocol": protocol, **generate(name, reuse, budget, args)}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found), encoding="utf-8")
    return torch.tensor(found["codes"]), found["row"]


def generate(name: str, reuse: str, budget: int, args: argparse.Namespace) -> dict:
    """Codes of `num_samples` pictures, and what they cost."""
    model = AutoModel.from_pretrained(folder_of(name, args)).eval()
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


def evaluate(args: argparse.Namespace) -> tuple[dict, dict]:
    """Distances of the floors and of all samples; and the first pictures of each, for the sheet."""
    vq = load_image_tokenizer(folder_of("vq", args))
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
        for reuse in run[-1]:
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
    lines = ["| model | parameters | steps | cross-entropy | masked accuracy | CPU s a step | MiB kept for backward |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name, run in result["runs"].items():
        cost = result["step_costs"].get(name)
        cells = f"{cost['cpu_seconds_per_step']:.2f} | {cost['mib_kept_for_backward']:.0f}" if cost else "|"
        lines.append(
            f"| {name} | {run['parameters']:,} | {run['steps']} | {run['cross_entropy']:.3f} "
            f"| {run['masked_accuracy']:.3f} | {cells} |"
        )
    budgets = result["arguments"]["budgets"]
    lines += ["", "| proxy Fréchet distance | reuse | " + " | ".join(map(str, budgets)) + " |"]
    lines.append("|---" * (2 + len(budgets)) + "|")
    settings = dict.fromkeys((row["model"], row["reuse"]) for row in result["samples"])
    for model, reuse in settings:
        found = [row for row in result["samples"] if (row["model"], row["reuse"]) == (model, reuse)]
        lines.append(
            f"| {model} | {reuse} | " + " | ".join(f"{r['proxy_frechet_distance']:.1f}" for r in found) + " |"
        )
    for name, distance in result["floors"].items():
        lines.append(f"| {name} | | " + " | ".join([f"{distance:.1f}"] * len(budgets)) + " |")
    protocol = result["protocol"]
    lines.append(
        f"\n{protocol['extractor']}, {protocol['resize']}; {protocol['num_images']} pictures a row against "
        f"{protocol['reference']}; guidance scale {result['arguments']['guidance_scale']:g}. No FID."
    )
    return "\n".join(lines)


def draw(sets: dict, classes: list[str], budgets: list[int], path: Path) -> None:
    """A row for the real pictures, their reconstructions, and each model at the least and the largest budget."""
    keys = [*list(sets)[:2]]
    keys += [(name, run[-1][-1], budget) for name, run in RUNS.items() for budget in (budgets[0], budgets[-1])]
    shown = min(SHOWN, *(len(sets[key]) for key in keys))
    rows = [key if isinstance(key, str) else f"{key[0]}, reuse {key[1]}, budget {key[2]}" for key in keys]
    columns = [classes[i % len(classes)] for i in range(shown)]
    pictures = [picture for key in keys for picture in to_pil(sets[key][:shown])]
    make_grid(pictures, shown, row_labels=rows, column_labels=columns).save(path)


def main() -> None:
    """Train, sample, judge; write JSON, table and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image_dir", required=True, help="Folder of splits of class folders.")
    parser.add_argument("--eval_split", default="test")
    parser.add_argument("--weights", help="Of EfficientNet-Lite0; left out: those of its package.")
    parser.add_argument("--extractor_size", type=int, default=96, help="Pixels to which it sees pictures resized.")
    parser.add_argument("--vq_steps", type=int, default=1000)
    parser.add_argument("--base_steps", type=int, default=700)
    parser.add_argument("--adapt_steps", type=int, default=150)
    parser.add_argument("--budgets", type=int, nargs="+", default=[48, 96, 192, 384])
    parser.add_argument("--guidance_scale", type=float, default=2.0)
    parser.add_argument("--num_samples", type=int, default=200, help="Pictures a row, a multiple of the classes.")
    parser.add_argument("--repetitions", type=int, default=9, help="Of the timed training steps.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work_dir", default="outputs/images")
    parser.add_argument("--output", default="benchmarks/results/images_cpu.json")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    names = {"image_dir": "PICTURES", "work_dir": "WORK", "output": Path(args.output).name}
    names["weights"] = args.weights and Path(args.weights).name
    result = {"provenance": provenance(), "arguments": {**vars(args), **names}, "tokenizer": make_codes(args)}
    result["runs"] = {name: train(name, args) for name in RUNS}
    result["step_costs"] = step_costs(list(RUNS)[:2], args)
    found, sets = evaluate(args)
    result |= found
    path = Path(args.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(result) + "\n", encoding="utf-8")
    draw(sets, load_codes(folder_of("codes", args))[1]["classes"], args.budgets, path.with_suffix(".png"))
    print(markdown(result))


if __name__ == "__main__":
    main()
