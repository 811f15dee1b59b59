# SPDX-License-Identifier: Apache-2.0
"""Images without a download: train a small FP-MaskGIT on scikit-learn's 8 × 8 digits, whose 17 grey levels are its
codes, draw digits of each class under budgets, and let a classifier that saw real ones judge them.

    python recipes/digits.py --output_dir outputs/digits

Writes `table.md`, `results.json`, `digits.png` and the model to `output_dir`.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

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
from fpmgm.evaluation import provenance
from fpmgm.evaluation.report import table, write_report
from fpmgm.pictures import to_pil
from fpmgm.trainers import MGMTrainer, MGMTrainingConfig


GREY_LEVELS, CLASSES, SIDE = 17, 10, 8
ENLARGED = 8  # times, in the picture


@dataclass
class DigitsArguments:
    """Sizes that fit ten minutes on two slow cores."""

    output_dir: str = field(default="outputs/digits", metadata={"help": "Where everything is written."})
    hidden_size: int = field(default=64, metadata={"help": "Width of the model."})
    max_steps: int = field(default=2000, metadata={"help": "Optimizer steps."})
    batch_size: int = field(default=64, metadata={"help": "Images per step."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate."})
    budgets: list[int] = field(default_factory=lambda: [12, 24, 48, 96], metadata={"help": "Block evaluations."})
    guidance_scales: list[float] = field(default_factory=lambda: [1.0, 2.0, 4.0], metadata={"help": "1: no guidance."})
    num_samples: int = field(default=500, metadata={"help": "Images per row of the table, a tenth of each class."})
    seed: int = field(default=0, metadata={"help": "Seed of everything."})


def main(argv: list[str] | None = None) -> dict:
    """Run everything; returns what `results.json` holds."""
    (args,) = parse_arguments((DigitsArguments,), __doc__, argv)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    transformers.logging.set_verbosity_error()

    digits = load_digits()
    codes, labels = digits.data.astype(np.int64), digits.target  # (N, 64) row by row
    train_codes, test_codes, train_labels, test_labels = train_test_split(
        codes, labels, test_size=0.2, stratify=labels, random_state=args.seed
    )
    judge = SVC(gamma=1e-3).fit(train_codes, train_labels)
    model, results = train(args, as_dataset(train_codes, train_labels), as_dataset(test_codes, test_labels))
    results |= {"arguments": vars(args), "provenance": provenance(model.device)}
    results["held_out"] = measure(judge, test_codes, test_labels, test_codes, test_labels)
    results["samples"] = sample(args, model, judge, test_codes, test_labels)
    draw_picture(args, model, folder / "digits.png")

    write_report(folder / "results.json", results)
    (folder / "table.md").write_text(markdown(results), encoding="utf-8")
    print(f"\n{markdown(results)}\nOne row for each guidance scale: {folder / 'digits.png'}")
    return results


def as_dataset(codes: np.ndarray, labels: np.ndarray) -> Dataset:
    """Rows as the trainer wants them."""
    return Dataset.from_dict({"input_ids": codes, "class_labels": labels})


def train(args: DigitsArguments, train_rows: Dataset, eval_rows: Dataset) -> tuple[FPMaskGITModel, dict]:
    """Train the model and export it; returns the exported model and what was measured."""
    config = FPMaskGITConfig(
        codebook_size=GREY_LEVELS,
        id2label={i: str(i) for i in range(CLASSES)},
        grid_size=SIDE,
        hidden_size=args.hidden_size,
        num_attention_heads=4,
        intermediate_size=3 * args.hidden_size,
        num_pre_layers=1,
        num_post_layers=1,
        input_injection="diagonal",
    )
    torch.manual_seed(args.seed)
    model = FPMaskGITModel(config)
    print(f"FP-MaskGIT 1/1/1: {model.num_parameters():,} parameters, {args.max_steps} steps")
    training = MGMTrainingConfig(
        output_dir=args.output_dir,
        max_steps=args.max_steps,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=50,
        weight_decay=0.03,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=180,
        ema_decay=0.99,
        logging_steps=max(1, args.max_steps // 10),
        save_strategy="no",
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=args.seed,
        data_description="scikit-learn's 8 × 8 digits",
    )
    trainer = MGMTrainer(model=model, args=training, train_dataset=train_rows, eval_dataset=eval_rows)
    trained, metrics = trainer.train().metrics, trainer.evaluate()
    trainer.save_metrics("eval", metrics)
    trainer.save_model()
    measured = {
        "parameters": model.num_parameters(),
        "steps": args.max_steps,
        "seconds_per_step": trained["train_runtime"] / args.max_steps,
        "validation_loss": metrics["eval_loss"],
    }
    return FPMaskGITModel.from_pretrained(args.output_dir), measured


def sample(args: DigitsArguments, model: FPMaskGITModel, judge: SVC, real: np.ndarray, labels: np.ndarray) -> list:
    """A row for each budget and guidance scale."""
    rows, classes = [], np.arange(args.num_samples) % CLASSES
    for budget, scale in tqdm([(b, s) for b in args.budgets for s in args.guidance_scales], desc="sampling"):
        start = time.perf_counter()
        out = model.generate(
            class_labels=torch.as_tensor(classes),
            budget=budget,
            guidance_scale=scale,
            seed=args.seed,
            return_dict_in_generate=True,
        )
        seconds = time.perf_counter() - start
        rows.append(
            {
                "budget": budget,
                "guidance_scale": scale,
                "num_steps": out.num_steps,
                "block_evaluations": out.block_evaluations,
                "guidance_evaluations": out.guidance_evaluations,
                "milliseconds_per_image": 1000 * seconds / args.num_samples,
                **measure(judge, out.sequences.numpy(), classes, real, labels),
            }
        )
    return rows


def measure(judge: SVC, codes: np.ndarray, classes: np.ndarray, real: np.ndarray, labels: np.ndarray) -> dict:
    """Share of the images that `judge` takes for their class, and their variety: the mean distance from the mean image
    of their class, relative to that of `real` ones (1: as varied as these)."""
    recognised = float((judge.predict(codes) == classes).mean())
    return {"recognised": recognised, "variety": spread(codes, classes) / spread(real, labels)}


def spread(codes: np.ndarray, classes: np.ndarray) -> float:
    """Root of the mean squared distance from the mean image of each class."""
    return float(np.mean([codes[classes == i].var(axis=0).sum() for i in range(CLASSES)]) ** 0.5)


def draw_picture(args: DigitsArguments, model: FPMaskGITModel, path: Path) -> None:
    """The ten digits in a row for each guidance scale, at the largest budget."""
    codes = [
        model.generate(
            class_labels=list(range(CLASSES)), budget=max(args.budgets), guidance_scale=scale, seed=args.seed
        )
        for scale in args.guidance_scales
    ]
    sheet(torch.cat(codes).view(-1, SIDE, SIDE), args.guidance_scales).save(path)


def sheet(codes: torch.LongTensor, guidance_scales: list[float]) -> Image.Image:
    """(N, 8, 8) grey levels as pictures, a row of all digits for each guidance scale."""
    pixels = (codes * 255 / (GREY_LEVELS - 1)).round().to(torch.uint8)[:, None].expand(-1, 3, -1, -1)
    rows = [f"guidance {scale:g}" if scale != 1 else "no guidance" for scale in guidance_scales]
    return make_grid(to_pil(pixels), CLASSES, ENLARGED, rows, [str(i) for i in range(CLASSES)])


def markdown(results: dict) -> str:
    """The results in Markdown."""
    columns = ["budget", "steps", "guidance", "block evaluations", "more for guidance", "ms per image"]
    rows = [
        [
            row["budget"],
            row["num_steps"],
            f"{row['guidance_scale']:g}",
            row["block_evaluations"],
            row["guidance_evaluations"],
            f"{row['milliseconds_per_image']:.1f}",
            f"{row['recognised']:.3f}",
            f"{row['variety']:.2f}",
        ]
        for row in results["samples"]
    ]
    real = results["held_out"]
    rows.append([*[None] * 5, "held-out digits", f"{real['recognised']:.3f}", f"{real['variety']:.2f}"])
    return (
        f"FP-MaskGIT 1/1/1, {results['parameters']:,} parameters, {results['steps']} steps of "
        f"{results['seconds_per_step']:.3f} s; validation cross-entropy {results['validation_loss']:.3f}.\n\n"
        f"{table([*columns, 'recognised', 'variety'], rows)}\n"
    )


if __name__ == "__main__":
    main()
