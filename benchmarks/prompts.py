# SPDX-License-Identifier: Apache-2.0
"""Answers that a rule judges: words written backwards, by an FP-MDLM and an MDLM, in every order and under budgets.

    python benchmarks/prompts.py

Both models are trained by `recipes/train_sft.py` with `recipes/configs/sft_small.yaml` in `--work_dir`, then answer
prompts whose words they have not seen. Writes JSON with provenance and a table.
"""

import json
import random
import string
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

import fpmgm  # noqa: F401  (registers the models)
from fpmgm.command_line import parse_arguments
from fpmgm.evaluation import provenance
from fpmgm.evaluation.report import table, write_report
from fpmgm.trainers import MGMTrainer, MGMTrainingConfig


ROOT = Path(__file__).resolve().parents[1]
MODELS = {  # overrides of the YAML
    "FP-MDLM 1/1/1": "",
    "MDLM 4/0/0": "--num_pre_layers 4 --num_fixed_point_layers 0 --num_post_layers 0",
}
QUIET = "--disable_tqdm True --report_to none --dataloader_pin_memory False --save_total_limit 1 --logging_steps 100"
ANSWER = 12  # tokens of an answer with its end, the YAML's `completion_multiple`
STEP = 4  # block evaluations of a step, as long as there are no more steps than tokens to write
ORDERS = ("ancestral", "halton", "confidence", "entropy", "threshold", "margin")


@dataclass
class Arguments:
    """How much."""

    num_words: int = field(default=20_000, metadata={"help": "Words to train on."})
    num_prompts: int = field(default=200, metadata={"help": "Prompts to answer, of other words."})
    max_steps: int = field(default=1500, metadata={"help": "Optimizer steps of each model."})
    budgets: list[int] = field(default_factory=lambda: [4, 12, 24, 48], metadata={"help": "Block evaluations."})
    seed: int = field(default=0, metadata={"help": "Of the words, the training and the answers."})
    work_dir: str = field(default="outputs/prompts", metadata={"help": "Keeps the words and the models."})
    output: str = field(default="benchmarks/results/prompts_cpu.json", metadata={"help": "JSON to write."})


def reverse_words(count: int, others: int, seed: int) -> tuple[list[dict], list[dict]]:
    """`count` rows to train on, of random words of 3 to 8 letters, and as many as `others` of words not among them."""
    draw, words = random.Random(seed), {}
    while len(words) < count + others:
        words["".join(draw.choices(string.ascii_lowercase, k=draw.randint(3, 8)))] = None
    rows = [{"prompt": f"{word}>", "completion": word[::-1]} for word in words]
    return rows[:count], rows[count:]


def train(name: str, args: Arguments, file: Path) -> tuple[Path, dict]:
    """The folder of a model, and what its recipe measured; a run that is there goes on, or is through already."""
    folder = Path(args.work_dir) / name.split()[0].lower().replace("-", "_")
    argv = ["--config", f"{ROOT}/recipes/configs/sft_small.yaml", *MODELS[name].split(), *QUIET.split()]
    argv += ["--max_steps", str(args.max_steps), "--seed", str(args.seed), "--output_dir", str(folder)]
    subprocess.run([sys.executable, f"{ROOT}/recipes/train_sft.py", *argv, "--text_files", str(file)], check=True)
    measured = json.loads((folder / "all_results.json").read_text(encoding="utf-8"))
    command = (
        " ".join(["python", "recipes/train_sft.py", *argv]).replace(f"{ROOT}/", "").replace(args.work_dir, "WORK")
    )
    return folder, {"command": command, "steps": args.max_steps, "eval_loss": measured["eval_loss"]}


def training_seconds(folder: Path, rows: list[dict], steps: int = 10) -> float:
    """CPU time of an optimizer step, whatever else the machine does."""
    options = {"completion_multiple": ANSWER, "per_device_train_batch_size": 64, "save_strategy": "no"}
    args = MGMTrainingConfig(str(folder / "timing"), max_steps=steps, report_to="none", disable_tqdm=True, **options)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trainer = MGMTrainer(folder, args, rows[: 64 * steps], processing_class=tokenizer)
    start = time.process_time()
    trainer.train()
    return (time.process_time() - start) / steps


def answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], **options) -> tuple:
    """The texts behind `prompts`, to their first EOS, and what `generate` says of its work."""
    given = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    out = model.generate(
        **given, max_new_tokens=ANSWER, stop_at_eos=True, temperature=0.0, return_dict_in_generate=True, **options
    )
    written = out.sequences[:, given["input_ids"].shape[1] :]
    return tokenizer.batch_decode(written, skip_special_tokens=True), out


def judge(model: PreTrainedModel, tokenizer, rows: list[dict], args: Arguments) -> list[dict]:
    """A row of the table for each order and budget."""
    found, prompts = [], [row["prompt"] for row in rows]
    for order in ORDERS:
        for budget in args.budgets:
            options = {"order": order, "budget": budget, "num_steps": min(ANSWER, budget // STEP)}
            start = time.process_time()
            texts, out = answers(model, tokenizer, prompts, seed=args.seed, **options)
            seconds = time.process_time() - start
            right = sum(text == row["completion"] for text, row in zip(texts, rows, strict=True))
            found.append(
                {
                    **options,
                    "exact_match": right / len(rows),
                    "tokens_per_step": out.tokens_per_step,
                    "num_steps": options["num_steps"],
                    "steps_taken": out.num_steps,
                    "block_evaluations": out.block_evaluations,
                    "cpu_milliseconds_per_answer": 1000 * seconds / len(rows),
                }
            )
    return found


def markdown(result: dict) -> str:
    """A table of the models, and one of the answers."""
    trained = [
        [
            name,
            f"{run['parameters']:,}",
            run["steps"],
            f"{run['steps'] * run['cpu_seconds_per_training_step'] / 60:.1f}",
            f"{run['eval_loss']:.4f}",
        ]
        for name, run in result["models"].items()
    ]
    rows = [
        [
            name,
            row["order"],
            row["budget"],
            row["num_steps"],
            row["steps_taken"],
            row["block_evaluations"],
            f"{row['tokens_per_step']:.2f}",
            f"{row['cpu_milliseconds_per_answer']:.1f}",
            f"{row['exact_match']:.3f}",
        ]
        for name, run in result["models"].items()
        for row in run["answers"]
    ]
    columns = [
        "model",
        "order",
        "budget",
        "steps",
        "taken",
        "block evaluations",
        "tokens per step",
        "CPU ms per answer",
    ]
    return (
        table(["model", "parameters", "training steps", "CPU minutes", "validation loss"], trained)
        + "\n\n"
        + table([*columns, "exact match"], rows)
    )


def main() -> None:
    """Train both models, let them answer, judge; write JSON and table."""
    (args,) = parse_arguments((Arguments,), __doc__)
    logging.set_verbosity_error()
    rows, others = reverse_words(args.num_words, args.num_prompts, args.seed)
    file = Path(args.work_dir) / "words.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    result = {
        "provenance": provenance("cuda" if torch.cuda.is_available() else "cpu"),
        "arguments": {**asdict(args), "work_dir": "WORK"},
        "models": {},
    }
    for name in MODELS:
        folder, measured = train(name, args, file)
        model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        tokenizer.pad_token = tokenizer.eos_token
        measured["parameters"] = model.num_parameters()
        measured["cpu_seconds_per_training_step"] = training_seconds(folder, rows)
        result["models"][name] = {**measured, "answers": judge(model, tokenizer, others, args)}
    write_report(args.output, result, markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
