# SPDX-License-Identifier: Apache-2.0
"""The whole recipe on a small scale, on real text: base models, consistency, conversion, SDTT, and their samples.

    python benchmarks/posttraining.py --text_files train.jsonl --eval_text_files valid.jsonl --judge SmolLM2.gguf

Every model is made by a recipe with its small YAML and the overrides below, then sampled under four budgets. What is
done already in `--work_dir` is not done again. Writes JSON with provenance and a table.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

import fpmgm  # noqa: F401  (registers the models)
from fpmgm.command_line import LocalPath, ModelName, parse_arguments
from fpmgm.data import load_text, pack
from fpmgm.evaluation import evaluate_budgets, load_judge, measure_samples, plus_minus, provenance
from fpmgm.evaluation.report import table, write_report
from made_models import Run, arguments_of, folder_of, make, parameters_of


ARCHITECTURE = (
    "--hidden_size 64 --intermediate_size 256 --num_attention_heads 4 --max_position_embeddings 64 --rope_theta 100 "
    "--tokenizer_vocab_size 320 --learning_rate 2e-3 --lr_scheduler_type cosine --max_steps {base}"
)
SHARED = (
    "--loss_weighting uniform --per_device_train_batch_size 16 --per_device_eval_batch_size 50 --adam_beta2 0.95 "
    "--ema_decay 0.99 --eval_blocks 400 --logging_steps 100 --save_total_limit 1 --warmup_steps 50 "
    "--disable_tqdm True --report_to none --dataloader_pin_memory False"
)
ADAPT = "--learning_rate 5e-4 --lr_scheduler_type constant_with_warmup"
CONSISTENCY = "--eval_steps 50 --save_steps 50 --max_steps {adapt}"
MEASURES = ("generative_perplexity", "generative_perplexity_standard_error", "unigram_entropy")
CONVERT, PAPER = "--max_steps {convert}", "--layer_map paper --max_steps {convert}"
EVERY, ENDS = ["none", "full", "3sr"], ["none", "3sr"]
RUNS = {
    "fp": Run("train_owt", "fp_mdlm_small", None, ARCHITECTURE, EVERY),
    "mdlm": Run("train_owt", "mdlm_small", None, ARCHITECTURE, ["none"]),
    "fp, as long": Run("train_owt", None, "fp", f"{ADAPT} --max_steps {{adapt}}", EVERY),
    "fp + consistency": Run("posttrain_consistency", "consistency_small", "fp", CONSISTENCY, EVERY),
    "fp + consistency, sum": Run(
        "posttrain_consistency", "consistency_small", "fp", f"{CONSISTENCY} --consistency_reduction sum", ["3sr"]
    ),
    "mdlm + consistency": Run("posttrain_consistency", "consistency_small", "mdlm", CONSISTENCY, ["none"]),
    **{
        name: Run("convert_mdlm", "convert_small", "mdlm", overrides, reuses)
        for name, overrides, reuses in [
            ("converted 1/6/12", f"{PAPER} --input_injection mlp", EVERY),
            ("converted auto", f"{CONVERT} --input_injection mlp", ENDS),
            ("converted 1/6/12, diagonal", f"{PAPER} --input_injection diagonal", EVERY),
            ("converted, not initialised", f"{PAPER} --input_injection mlp --initialize False", ENDS),
            ("converted, not initialised, diagonal", f"{PAPER} --input_injection diagonal --initialize False", ENDS),
        ]
    },
    "mdlm + sdtt": Run("distill_sdtt", "sdtt_small", "mdlm", "", ["none"]),
    "fp + sdtt": Run("distill_sdtt", "sdtt_small", "fp", "", ENDS),
}


@dataclass
class Arguments:
    """Which text, which judge, how long."""

    text_files: list[LocalPath] = field(metadata={"help": "Text to train on."})
    eval_text_files: list[LocalPath] = field(metadata={"help": "Text to validate on."})
    judge: ModelName = field(
        default="gpt2-large", metadata={"help": "A causal language model: hub name, folder, .gguf file."}
    )
    base_steps: int = field(default=4000, metadata={"help": "Optimizer steps of the base models."})
    adapt_steps: int = field(default=1000, metadata={"help": "Of consistency, and of as much training without."})
    convert_steps: int = field(default=2000, metadata={"help": "Of conversions."})
    budgets: list[int] = field(default_factory=lambda: [24, 48, 96, 192], metadata={"help": "Block evaluations."})
    num_samples: int = field(default=96, metadata={"help": "Texts per row."})
    work_dir: str = field(default="outputs/posttraining", metadata={"help": "Keeps what is done."})
    output: str = field(default="benchmarks/results/posttraining_cpu.json", metadata={"help": "JSON to write."})


def train(name: str, args: Arguments) -> dict:
    """Run the recipe; what it measured, with its command."""
    folder, run = folder_of(name, args.work_dir), RUNS[name]
    steps = {"base": args.base_steps, "adapt": args.adapt_steps, "convert": args.convert_steps}
    argv = arguments_of(run, name, args.work_dir, SHARED, steps)
    data = ["--text_files", *args.text_files, "--eval_text_files", *args.eval_text_files]
    made = make(run.recipe, argv, data, folder, {args.work_dir: "WORK"})
    return {
        **{key: made[key] for key in ("command", "commit", "steps")},
        "perplexity_before": made.get("before_perplexity"),
        "perplexity_before_standard_error": made.get("before_perplexity_stderr"),
        "perplexity": made["eval_perplexity"],
        "perplexity_standard_error": made.get("eval_perplexity_stderr"),
        "parameters": parameters_of(folder),
    }


def sample(name: str, judge, args: Arguments) -> list[dict]:
    """Rows of samples under the budgets, for each reuse."""
    folder = folder_of(name, args.work_dir)
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    settings = [{"reuse": reuse} for reuse in RUNS[name].reuses]
    rows = evaluate_budgets(
        model, tokenizer, judge, args.budgets, settings, num_samples=args.num_samples, batch_size=args.num_samples,
        judge_batch_size=24, cache_dir=Path(args.work_dir) / "cache",
    )  # fmt: skip
    kept = ("budget", "reuse", "num_steps", "block_evaluations", *MEASURES, "sample")
    return [{key: row[key] for key in kept} for row in rows]


def human(judge, args: Arguments) -> dict:
    """The same measures of held-out text."""
    tokenizer = AutoTokenizer.from_pretrained(folder_of("fp", args.work_dir))
    blocks = pack(load_text(args.eval_text_files), tokenizer, 64).select(range(args.num_samples))["input_ids"]
    found = measure_samples(list(blocks), tokenizer, judge, batch_size=24)
    return {key: found[key] for key in (*MEASURES, "protocol")}


def markdown(result: dict) -> str:
    """Both tables."""
    runs = []
    for name, run in result["runs"].items():
        before = None
        if run["perplexity_before"] is not None:
            before = plus_minus(run["perplexity_before"], run["perplexity_before_standard_error"])
        after = plus_minus(run["perplexity"], run["perplexity_standard_error"])
        runs.append([name, run["steps"], before, after])
    budgets, samples = result["arguments"]["budgets"], []
    for name, run in result["runs"].items():
        for reuse in dict.fromkeys(row["reuse"] for row in run["samples"]):
            samples.append([name, reuse, *(cell(row) for row in run["samples"] if row["reuse"] == reuse)])
    samples.append(["held-out text", None, *[cell(result["held_out_text"])] * len(budgets)])
    return (
        table(["model", "steps", "validation perplexity before", "after"], runs)
        + "\n\n"
        + table(["model", "reuse", *(f"{budget}: perplexity, entropy" for budget in budgets)], samples)
    )


def cell(row: dict) -> str:
    """Perplexity and entropy of samples or text."""
    perplexity = plus_minus(row["generative_perplexity"], row["generative_perplexity_standard_error"], 0)
    return f"{perplexity}, {row['unigram_entropy']:.2f}"


def main() -> None:
    """Train, sample, judge; write JSON and table."""
    (args,) = parse_arguments((Arguments,), __doc__)
    logging.set_verbosity_error()
    names = {key: [Path(file).name for file in getattr(args, key)] for key in ("text_files", "eval_text_files")}
    result = {
        "provenance": provenance("cuda" if torch.cuda.is_available() else "cpu"),
        "arguments": {**asdict(args), **names, "judge": Path(args.judge).name, "work_dir": "WORK"},
        "runs": {name: train(name, args) for name in RUNS},
    }
    judge = load_judge(args.judge)
    result["held_out_text"] = human(judge, args)
    for name, run in result["runs"].items():
        run["samples"] = sample(name, judge, args)
    write_report(args.output, result, markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
