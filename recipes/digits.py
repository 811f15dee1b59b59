# SPDX-License-Identifier: Apache-2.0
"""Images without a download: train small models on scikit-learn's 8 × 8 digits, whose 17 grey levels are their codes,
draw digits of each class under budgets, and let a classifier that saw real ones judge them.

    python recipes/digits.py --output_dir outputs/digits
    python recipes/digits.py --models fp-maskgit maskgit-12 --seeds 0 1 2 --consistency_steps 300 --reuse none full 3sr

Writes `results.json`, `results.md`, `digits.png` and a folder for each model to `output_dir`. The same command goes on
with the models that are missing.
"""

import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from datasets import Dataset
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC
from tqdm.auto import tqdm

from fpmgm import FPMaskGITConfig, FPMaskGITModel, make_grid
from fpmgm.command_line import parse_arguments
from fpmgm.evaluation import energy_distance, grid, over_seeds, provenance
from fpmgm.evaluation.report import table, write_report
from fpmgm.pictures import to_pil
from fpmgm.trainers import ConsistencyConfig, ConsistencyTrainer, MGMTrainer, MGMTrainingConfig


GREY_LEVELS, CLASSES, SIDE = 17, 10, 8
ENLARGED = 8  # times, in the picture
MODELS = {"fp-maskgit": (1, 1, 1), "maskgit-12": (12, 0, 0), "maskgit-24": (24, 0, 0)}  # pre, fixed-point, post blocks
MEASURES = ("recognised", "variety", "energy_distance", "cpu_milliseconds_per_image")
FURTHER = {"further": (MGMTrainer, MGMTrainingConfig), "consistency": (ConsistencyTrainer, ConsistencyConfig)}


@dataclass
class DigitsArguments:
    """Sizes that fit ten minutes on two slow cores."""

    output_dir: str = field(default="outputs/digits", metadata={"help": "Where everything is written."})
    models: list[str] = field(default_factory=lambda: ["fp-maskgit"], metadata={"help": f"Of {list(MODELS)}."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "One run of each model for each."})
    hidden_size: int = field(default=64, metadata={"help": "Width of the models."})
    max_steps: int = field(default=2000, metadata={"help": "Optimizer steps."})
    consistency_steps: int = field(
        default=0, metadata={"help": "Steps to go on from each model, with the consistency loss and without; 0: none."}
    )
    consistency_weight: float = field(default=0.1, metadata={"help": "λ, in units of the states' own size."})
    batch_size: int = field(default=64, metadata={"help": "Images per step."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate; a quarter where runs go on."})
    budgets: list[int] = field(default_factory=lambda: [12, 24, 48, 96], metadata={"help": "Block evaluations."})
    reuse: list[str] = field(default_factory=lambda: ["3sr"], metadata={"help": "Of fixed-point models."})
    guidance_scales: list[float] = field(default_factory=lambda: [1.0, 2.0, 4.0], metadata={"help": "1: no guidance."})
    num_samples: int = field(default=500, metadata={"help": "Images of each setting, a tenth of each class."})

    def __post_init__(self):
        unknown = sorted(set(self.models) - set(MODELS))
        if unknown:
            raise ValueError(f"`models`: {unknown} are none of {list(MODELS)}.")
        for name in ("models", "seeds"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"`{name}`={getattr(self, name)} has one twice: name each once.")
        if self.num_samples < 2 * CLASSES:
            raise ValueError(f"`num_samples`={self.num_samples} must be {2 * CLASSES} at least, two of each class.")


class Digits(NamedTuple):
    """What models train on, held-out digits, and a classifier that saw the former."""

    train: Dataset
    held_out: Dataset
    codes: np.ndarray  # (N, 64), held out
    labels: np.ndarray  # (N,)
    judge: SVC


def main(argv: list[str] | None = None) -> dict:
    """Run what is missing; returns what `results.json` holds."""
    (args,) = parse_arguments((DigitsArguments,), __doc__, argv)
    for model in args.models:
        check_settings(args, model)
    folder, digits = Path(args.output_dir), open_digits()
    transformers.logging.set_verbosity_error()
    runs = []
    for model, seed in itertools.product(args.models, args.seeds):
        runs.append(run(args, digits, folder / f"{model}_seed{seed}", model, seed))
        for kind in FURTHER if args.consistency_steps else ():
            runs.append(run(args, digits, folder / f"{model}_{kind}_seed{seed}", model, seed, kind))
    first = [folder / each["folder"] for each in runs if each["seed"] == args.seeds[0]]
    draw_picture(args, first, folder / "digits.png")
    results = {
        "arguments": vars(args),
        "held_out": measure(digits, digits.codes, digits.labels),
        "runs": runs,
        "provenance": provenance("cpu"),
    }
    write_report(folder / "results.json", results, markdown(results))
    print(f"\n{markdown(results)}\nPicture: {folder / 'digits.png'}")
    return results


def open_digits() -> Digits:
    """A fifth of the digits is held out, the same for all seeds."""
    digits = load_digits()
    codes, labels = digits.data.astype(np.int64), digits.target  # (N, 64) row by row
    seen, held_out, seen_labels, labels = train_test_split(
        codes, labels, test_size=0.2, stratify=labels, random_state=0
    )
    judge = SVC(gamma=1e-3).fit(seen, seen_labels)
    rows = [
        Dataset.from_dict({"input_ids": codes, "class_labels": of_class})
        for codes, of_class in ((seen, seen_labels), (held_out, labels))
    ]
    return Digits(*rows, held_out, labels, judge)


def run(
    args: DigitsArguments, digits: Digits, folder: Path, model: str, seed: int, further: str | None = None
) -> dict:
    """Train and judge one model, `further` on from its own seed's; returns what `run.json` in its folder holds."""
    path = folder / "run.json"
    options = {name: value for name, value in vars(args).items() if name not in ("output_dir", "models", "seeds")}
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        changed = {name: value for name, value in found["options"].items() if value != options[name]}
        if changed:
            raise ValueError(f"{folder} was made with {changed}: give the same, or another `output_dir`.")
        return found
    torch.manual_seed(seed)
    start = (
        new_model(args, model)
        if further is None
        else FPMaskGITModel.from_pretrained(args.output_dir + f"/{model}_seed{seed}")
    )
    print(f"{folder.name}: {start.num_parameters():,} parameters")
    found = {"folder": folder.name, "model": model, "further": further, "seed": seed, "options": options}
    found |= train(args, digits, start, folder, seed, further)
    found["samples"] = sample(args, digits, FPMaskGITModel.from_pretrained(folder), seed)
    write_report(path, found)
    return found


def new_model(args: DigitsArguments, name: str) -> FPMaskGITModel:
    """Fresh weights."""
    pre, fixed_point, post = MODELS[name]
    config = FPMaskGITConfig(
        codebook_size=GREY_LEVELS,
        id2label={i: str(i) for i in range(CLASSES)},
        grid_size=SIDE,
        hidden_size=args.hidden_size,
        num_attention_heads=4,
        intermediate_size=3 * args.hidden_size,
        num_pre_layers=pre,
        num_fixed_point_layers=fixed_point,
        num_post_layers=post,
        input_injection="diagonal",
    )
    return FPMaskGITModel(config)


def train(
    args: DigitsArguments, digits: Digits, model: FPMaskGITModel, folder: Path, seed: int, further: str | None
) -> dict:
    """Train a model and export it into `folder`; returns what was measured."""
    trainer_class, config_class = FURTHER[further or "further"]
    steps, share = (args.max_steps, 1) if further is None else (args.consistency_steps, 0.25)
    options = {
        "consistency_reduction": "relative",
        "consistency_weight": args.consistency_weight,
        "consistency_positions": "both",
    }
    training = config_class(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=share * args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=50,
        weight_decay=0.03,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=180,
        ema_decay=0.99,
        logging_steps=max(1, steps // 10),
        save_strategy="no",
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=seed,
        data_description="scikit-learn's 8 × 8 digits",
        **(options if further == "consistency" else {}),
    )
    trainer = trainer_class(model=model, args=training, train_dataset=digits.train, eval_dataset=digits.held_out)
    start = time.process_time()
    trainer.train()
    seconds, metrics = time.process_time() - start, trainer.evaluate()
    trainer.save_metrics("eval", metrics)
    trainer.save_model()
    return {
        "parameters": model.num_parameters(),
        "steps": steps,
        "cpu_seconds_per_step": seconds / steps,
        "validation_loss": metrics["eval_loss"],
    }


def settings_of(args: DigitsArguments, config: FPMaskGITConfig) -> list[dict]:
    """Each reuse, guidance scale and budget that a model can keep."""
    reuses = args.reuse if config.num_fixed_point_layers else ["none"]
    budgets = [budget for budget in args.budgets if budget >= config.num_hidden_layers]
    return grid(reuse=reuses, guidance_scale=args.guidance_scales, budget=budgets)


def check_settings(args: DigitsArguments, name: str) -> None:
    """Raise before anything is trained what `generate` would raise of a setting of this model."""
    model = new_model(args, name)
    settings = settings_of(args, model.config)
    if not settings:
        raise ValueError(
            f"`budgets`={args.budgets} pay no step of {name!r}, which has {model.config.num_hidden_layers} blocks: "
            "give larger ones."
        )
    for setting in settings:
        model.generate(class_labels=0, seed=0, **setting)


def sample(args: DigitsArguments, digits: Digits, model: FPMaskGITModel, seed: int) -> list[dict]:
    """A row for each setting."""
    rows, classes = [], np.arange(args.num_samples) % CLASSES
    for setting in tqdm(settings_of(args, model.config), desc="sampling"):
        start = time.process_time()
        out = model.generate(class_labels=torch.as_tensor(classes), seed=seed, return_dict_in_generate=True, **setting)
        seconds = time.process_time() - start
        rows.append(
            {
                **setting,
                "num_steps": out.num_steps,
                "block_evaluations": out.block_evaluations,
                "guidance_evaluations": out.guidance_evaluations,
                "cpu_milliseconds_per_image": 1000 * seconds / args.num_samples,
                **measure(digits, out.sequences.numpy(), classes),
            }
        )
    return rows


def measure(digits: Digits, codes: np.ndarray, classes: np.ndarray) -> dict:
    """Share of the images that the classifier takes for their class; their variety, the mean distance from the mean
    image of their class relative to that of held-out digits (1: as varied as these); and how far they are from these
    as a set (the energy distance of their grey levels, with that of two sets of one kind)."""
    recognised = float((digits.judge.predict(codes) == classes).mean())
    variety = spread(codes, classes) / spread(digits.codes, digits.labels)
    return {"recognised": recognised, "variety": variety, **energy_distance(codes, digits.codes)}


def spread(codes: np.ndarray, classes: np.ndarray) -> float:
    """Root of the mean squared distance from the mean image of each class."""
    return float(np.mean([codes[classes == i].var(axis=0).sum() for i in range(CLASSES)]) ** 0.5)


def draw_picture(args: DigitsArguments, folders: Sequence[Path], path: Path) -> None:
    """The ten digits in a row for each model and guidance scale, at the largest budget."""
    codes, names = [], []
    for folder, scale in itertools.product(folders, args.guidance_scales):
        options = {"budget": max(args.budgets), "guidance_scale": scale, "seed": args.seeds[0]}
        codes.append(FPMaskGITModel.from_pretrained(folder).generate(class_labels=list(range(CLASSES)), **options))
        guided = f"guidance {scale:g}" if scale != 1 else "no guidance"
        names.append(guided if len(folders) == 1 else f"{folder.name.rpartition('_')[0]}, {guided}")
    sheet(torch.cat(codes).view(-1, SIDE, SIDE), names).save(path)


def sheet(codes: torch.LongTensor, rows: list[str]) -> Image.Image:
    """(N, 8, 8) grey levels as pictures, a row of all digits for each name."""
    pixels = (codes * 255 / (GREY_LEVELS - 1)).round().to(torch.uint8)[:, None].expand(-1, 3, -1, -1)
    return make_grid(to_pil(pixels), CLASSES, ENLARGED, rows, [str(i) for i in range(CLASSES)])


def markdown(results: dict) -> str:
    """The results in Markdown: means over seeds, ± one standard error where there are several."""
    by_model: dict[tuple, list[dict]] = {}
    for each in results["runs"]:
        by_model.setdefault((each["model"], each["further"]), []).append(each)
    trained, drawn = [], []
    for (model, further), runs in by_model.items():
        title = model if further is None else f"{model}, {further}"
        figures = [over_seeds([each[name] for each in runs]) for name in ("cpu_seconds_per_step", "validation_loss")]
        trained.append([title, f"{runs[0]['parameters']:,}", runs[0]["steps"], len(runs), *figures])
        for samples in zip(*(each["samples"] for each in runs), strict=True):
            setting = [samples[0][name] for name in ("reuse", "guidance_scale", "budget", "num_steps")]
            figures = [over_seeds([sample[name] for sample in samples]) for name in MEASURES]
            drawn.append([title, *setting, samples[0]["guidance_evaluations"], *figures])
    real, (low, high) = results["held_out"], results["runs"][0]["samples"][0]["energy_distance_same"]
    drawn.append(["held-out digits", *[None] * 5, f"{real['recognised']:.3f}", "1", f"{low:.2f} to {high:.2f}", None])
    models = ["model", "parameters", "steps", "seeds", "core seconds per step", "validation cross-entropy"]
    settings = ["model", "reuse", "guidance", "budget", "steps", "more for guidance"]
    measures = ["recognised", "variety", "energy distance", "core ms per image"]
    return f"{table(models, trained)}\n\n{table([*settings, *measures], drawn)}\n"


if __name__ == "__main__":
    main()
