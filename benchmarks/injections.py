# SPDX-License-Identifier: Apache-2.0
"""How the shared stack should see its input: the injections side by side, over learning rates, on real text.

    python benchmarks/injections.py --text_files my_text.txt

Each injection trains a small FP-MDLM 1/1/1 of one width at each learning rate from each seed. Reported are validation
perplexity at equal steps, and at equal time by the median seconds of a training step, for which the injections take
turns before the runs; the residual of the last iteration; and which runs ended before their time because a loss or
gradient was not finite. Runs that `--output` holds already are not made again.
"""

import contextlib
import itertools
import json
import random
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import transformers
from datasets import Dataset

from fpmgm import FPMDLMConfig, FPMDLMForMaskedDiffusion
from fpmgm.analysis.axes import new_figure, save
from fpmgm.command_line import LocalPath, parse_arguments
from fpmgm.data import load_text, pack, train_tokenizer
from fpmgm.evaluation import provenance
from fpmgm.evaluation.provenance import commit
from fpmgm.evaluation.report import table, write_report
from fpmgm.trainers import MGMTrainer, MGMTrainingConfig


INJECTIONS = ("mlp", "linear", "diagonal")
COLORS = {"mlp": "#2b4570", "linear": "#8d99ae", "diagonal": "#c8553d"}


@dataclass
class Arguments:
    """Which text, which runs."""

    text_files: list[LocalPath] = field(metadata={"help": "Text to train on and to hold out."})
    learning_rates: list[float] = field(
        default_factory=lambda: [5e-4, 1e-3, 2e-3, 5e-3], metadata={"help": "Of each injection."}
    )
    max_steps: int = field(default=1500, metadata={"help": "Optimizer steps of a run."})
    eval_steps: int = field(default=150, metadata={"help": "Steps between validations."})
    eval_blocks: int = field(default=400, metadata={"help": "Blocks held out."})
    vocab_size: int = field(default=320, metadata={"help": "Tokens of the tokenizer."})
    length: int = field(default=64, metadata={"help": "Tokens of a block."})
    hidden_size: int = field(default=64, metadata={"help": "Width."})
    batch_size: int = field(default=16, metadata={"help": "Blocks per step."})
    repetitions: int = field(default=5, metadata={"help": "Turns of each injection when steps are timed."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Of weights and batches."})
    output: str = field(default="benchmarks/results/injections_cpu.json", metadata={"help": "JSON to write."})


def prepare(args: Arguments):
    """A tokenizer trained on the text, blocks to train on, blocks held out."""
    texts = [piece for text in load_text(args.text_files)["text"] for piece in text.split("\n\n") if piece.strip()]
    random.Random(0).shuffle(texts)
    tokenizer = train_tokenizer(texts[: len(texts) // 2], args.vocab_size)
    blocks = pack(Dataset.from_dict({"text": texts}), tokenizer, args.length)
    split = len(blocks) - args.eval_blocks
    return tokenizer, blocks.select(range(split)), blocks.select(range(split, len(blocks)))


def make_trainer(injection: str, learning_rate: float, seed: int, args: Arguments, data, folder: str) -> MGMTrainer:
    """One run's trainer."""
    tokenizer, train_blocks, eval_blocks = data
    torch.manual_seed(seed)
    config = FPMDLMConfig(
        vocab_size=len(tokenizer), mask_token_id=tokenizer.mask_token_id,
        hidden_size=args.hidden_size, intermediate_size=4 * args.hidden_size, num_attention_heads=4,
        conditioning_size=32, max_position_embeddings=args.length, rope_theta=100.0, dropout=0.0,
        input_injection=injection,
    )  # fmt: skip
    training = MGMTrainingConfig(
        output_dir=folder, max_steps=args.max_steps, learning_rate=learning_rate, lr_scheduler_type="cosine",
        warmup_steps=50, adam_beta2=0.95, loss_weighting="uniform", ema_decay=0.99, seed=seed,
        per_device_train_batch_size=args.batch_size, per_device_eval_batch_size=50,
        eval_strategy="steps", eval_steps=args.eval_steps, logging_steps=args.eval_steps, save_strategy="no",
        report_to="none", disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    model = FPMDLMForMaskedDiffusion(config)
    return MGMTrainer(model=model, args=training, train_dataset=train_blocks, eval_dataset=eval_blocks)


def earlier(path: Path, arguments: dict) -> dict | None:
    """What an earlier run left in `path`; a `ValueError` if it was another one."""
    if not path.is_file():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    if result["arguments"] != arguments:
        raise ValueError(f"`output`={str(path)!r} is of a run with {result['arguments']}: give another file.")
    return result


def step_seconds(args: Arguments, data, folder: str) -> dict[str, float]:
    """Median seconds of a training step of each injection; they take turns."""
    trainers = {name: make_trainer(name, 1e-3, 0, args, data, folder) for name in INJECTIONS}
    times = {name: [] for name in INJECTIONS}
    for trainer in trainers.values():
        trainer.args.eval_strategy, trainer.args.max_steps = "no", 10
    for _ in range(args.repetitions):
        for name, trainer in trainers.items():
            start = time.perf_counter()
            trainer.train()
            times[name].append((time.perf_counter() - start) / 10)
    return {name: statistics.median(values) for name, values in times.items()}


def order(row: dict) -> tuple:
    """By injection, learning rate, seed: no two runs of a result are alike in these."""
    return INJECTIONS.index(row["injection"]), row["learning_rate"], row["seed"]


def run(injection: str, learning_rate: float, seed: int, args: Arguments, data, folder: str) -> dict:
    """Train; the validation perplexities and the last residual."""
    trainer = make_trainer(injection, learning_rate, seed, args, data, folder)
    with contextlib.suppress(FloatingPointError):
        trainer.train()
    history = trainer.state.log_history
    evaluations = [line for line in history if "eval_perplexity" in line]
    logs = [line for line in history if "residual" in line]
    row = {
        "injection": injection,
        "learning_rate": learning_rate,
        "seed": seed,
        "parameters": trainer.model.num_parameters(),
        "steps": [line["step"] for line in evaluations],
        "perplexities": [line["eval_perplexity"] for line in evaluations],
        "residual": logs[-1]["residual"] if logs else float("inf"),
        "finished": trainer.state.global_step == args.max_steps,
        "commit": commit(),
    }
    perplexities = " ".join(f"{perplexity:.1f}" for perplexity in row["perplexities"])
    print(f"{injection} {learning_rate:g}, seed {seed}: {perplexities}; residual {row['residual']}")
    return row


def at_end(row: dict) -> float:
    """A run's perplexity after its last step; infinite for one that had stopped."""
    return row["perplexities"][-1] if row["finished"] else float("inf")


def at_equal_time(row: dict, seconds: dict[str, float], last: int) -> float:
    """A run's perplexity when the fastest injection has taken its last step; infinite for one that had stopped."""
    if not row["finished"]:
        return float("inf")
    times = [step * seconds[row["injection"]] for step in row["steps"]]
    return float(np.interp(last * min(seconds.values()), times, row["perplexities"]))


def spread(values: list[float], digits: str) -> str:
    """Median and range of what the seeds gave."""
    middle, least, most = statistics.median(values), min(values), max(values)
    return f"{middle:{digits}} ({least:{digits}}–{most:{digits}})" if len(values) > 1 else f"{middle:{digits}}"


def markdown(result: dict) -> str:
    """Perplexity at equal steps and at equal time: median and range over the seeds."""
    seconds, last = result["step_seconds"], result["arguments"]["max_steps"]
    seeds = len({row["seed"] for row in result["rows"]})
    columns = ["injection", "learning rate", "perplexity", "at equal time", "residual", "stopped", "seconds per step"]
    lines = [
        [
            injection,
            f"{rate:g}",
            spread([at_end(row) for row in rows], ".1f"),
            spread([at_equal_time(row, seconds, last) for row in rows], ".1f"),
            spread([row["residual"] for row in rows], ".2g"),
            sum(not row["finished"] for row in rows),
            f"{seconds[injection]:.3g}",
        ]
        for (injection, rate), rows in grouped(result).items()
    ]
    return (
        f"Validation perplexity after {last:,} steps: medians of {seeds} seed(s), in brackets their range.\n\n"
        f"{table(columns, lines)}"
    )


def grouped(result: dict) -> dict[tuple[str, float], list[dict]]:
    """The runs that differ by their seed alone, of each injection and learning rate."""
    groups = itertools.groupby(result["rows"], lambda row: (row["injection"], row["learning_rate"]))
    return {key: list(rows) for key, rows in groups}


def draw(result: dict, path: Path) -> None:
    """The last perplexity against the learning rate, and the runs at each injection's best rate against time."""
    from matplotlib.ticker import LogLocator

    figure = new_figure(9, 3.8)
    left, right = figure.subplots(1, 2, sharey=True)
    for injection in INJECTIONS:
        groups = {rate: rows for (name, rate), rows in grouped(result).items() if name == injection}
        ends = {rate: [at_end(row) for row in rows] for rate, rows in groups.items()}
        medians = {rate: statistics.median(values) for rate, values in ends.items()}
        color = COLORS[injection]
        left.plot(medians.keys(), medians.values(), color=color)
        for rate, values in ends.items():
            left.plot([rate] * len(values), values, ".", color=color, alpha=0.6)
        best = min(medians, key=medians.get)
        for row in groups[best]:
            times = [step * result["step_seconds"][injection] for step in row["steps"]]
            label = f"{injection}, {best:g}" if row is groups[best][0] else None
            right.plot(times, row["perplexities"], color=color, alpha=0.8, label=label)
    left.set(xlabel="learning rate", ylabel="validation perplexity", xscale="log", yscale="log")
    rates = sorted({row["learning_rate"] for row in result["rows"]})
    left.set_xticks(rates, [f"{rate:g}" for rate in rates])
    left.minorticks_off()
    left.set_title(f"after {result['arguments']['max_steps']:,} steps: each seed, and their median", fontsize=10)
    right.set_xlabel("seconds of training")
    right.set_title("each seed at the learning rate of the best median", fontsize=10)
    right.legend(loc="upper right", fontsize=8)
    for axes in (left, right):
        axes.yaxis.set_major_locator(LogLocator(subs=range(1, 10)))
        axes.yaxis.set_major_formatter("{x:.0f}")
        axes.grid(alpha=0.3, which="both")
    save(figure, path, dpi=140)


def main() -> None:
    """Run everything; write JSON, table and picture."""
    (args,) = parse_arguments((Arguments,), __doc__)
    transformers.logging.set_verbosity_error()
    data, path = prepare(args), Path(args.output)
    arguments = {**asdict(args), "text_files": [Path(file).name for file in args.text_files]}
    arguments = {name: value for name, value in arguments.items() if name not in ("learning_rates", "seeds", "output")}
    with tempfile.TemporaryDirectory() as folder:
        result = earlier(path, arguments) or {
            "provenance": provenance("cuda" if torch.cuda.is_available() else "cpu"),
            "arguments": arguments,
            "step_seconds": step_seconds(args, data, folder),
            "rows": [],
        }
        done = {order(row) for row in result["rows"]}
        for seed, injection, rate in itertools.product(args.seeds, INJECTIONS, args.learning_rates):
            if (INJECTIONS.index(injection), rate, seed) not in done:
                result["rows"].append(run(injection, rate, seed, args, data, folder))
                result["rows"].sort(key=order)
                write_report(path, result)
    write_report(path, result, markdown(result))
    draw(result, path.with_suffix(".png"))
    print(markdown(result))


if __name__ == "__main__":
    main()
