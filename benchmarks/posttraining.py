# SPDX-License-Identifier: Apache-2.0
"""The whole recipe on a small scale, on real text: base models, consistency, conversion, SDTT, and their samples.

    python benchmarks/posttraining.py --text_files train.jsonl --eval_text_files valid.jsonl --judge SmolLM2.gguf

Every model is made by a recipe with its small YAML and the overrides below, then sampled under four budgets. What is
done already in `--work_dir` is not done again. Writes JSON with provenance and a table.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import transformers

from fpmgm.data import load_text, pack
from fpmgm.evaluation import evaluate_budgets, load_judge, measure_samples, provenance
from fpmgm.evaluation.provenance import commit


sys.path.append(str(Path(__file__).resolve().parents[1] / "recipes"))

import convert_mdlm
import distill_sdtt
import posttrain_consistency
import train_owt


CONFIGS = Path(__file__).resolve().parents[1] / "recipes/configs"
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
RUNS = {  # name: recipe, YAML, model to go on from, overrides, reuses to sample with
    "fp": (train_owt, "fp_mdlm_small", None, ARCHITECTURE, ["none", "full", "3sr"]),
    "mdlm": (train_owt, "mdlm_small", None, ARCHITECTURE, ["none"]),
    "fp, as long": (train_owt, None, "fp", f"{ADAPT} --max_steps {{adapt}}", ["none", "full", "3sr"]),
    "fp + consistency": (posttrain_consistency, "consistency_small", "fp", CONSISTENCY, ["none", "full", "3sr"]),
    "fp + consistency, sum": (
        posttrain_consistency, "consistency_small", "fp", f"{CONSISTENCY} --consistency_reduction sum", ["3sr"],
    ),
    "mdlm + consistency": (posttrain_consistency, "consistency_small", "mdlm", CONSISTENCY, ["none"]),
    "converted 1/6/12": (
        convert_mdlm, "convert_small", "mdlm", "--layer_map paper --input_injection mlp --max_steps {convert}",
        ["none", "full", "3sr"],
    ),
    "converted auto": (
        convert_mdlm, "convert_small", "mdlm", "--input_injection mlp --max_steps {convert}", ["none", "3sr"],
    ),
    "converted 1/6/12, diagonal": (
        convert_mdlm, "convert_small", "mdlm",
        "--layer_map paper --input_injection diagonal --max_steps {convert}", ["none", "full", "3sr"],
    ),
    "converted, not initialised": (
        convert_mdlm, "convert_small", "mdlm",
        "--layer_map paper --input_injection mlp --initialize False --max_steps {convert}", ["none", "3sr"],
    ),
    "converted, not initialised, diagonal": (
        convert_mdlm, "convert_small", "mdlm",
        "--layer_map paper --input_injection diagonal --initialize False --max_steps {convert}", ["none", "3sr"],
    ),
    "mdlm + sdtt": (distill_sdtt, "sdtt_small", "mdlm", "", ["none"]),
    "fp + sdtt": (distill_sdtt, "sdtt_small", "fp", "", ["none", "3sr"]),
}  # fmt: skip


def folder_of(name: str, args: argparse.Namespace) -> Path:
    """Where a run's model is."""
    return Path(args.work_dir) / name.replace(", ", "_").replace(" + ", "_").replace(" ", "_").replace("/", "-")


def train(name: str, args: argparse.Namespace) -> dict:
    """Run the recipe; what it measured, with its command."""
    recipe, config, start, overrides, _ = RUNS[name]
    folder = folder_of(name, args)
    steps = {"base": args.base_steps, "adapt": args.adapt_steps, "convert": args.convert_steps}
    argv = ["--config", str(CONFIGS / f"{config}.yaml")] if config else []
    argv += ["--model_name_or_path", str(folder_of(start, args))] if start else []
    argv += [*SHARED.split(), *overrides.format(**steps).split(), "--output_dir", str(folder)]
    data = ["--text_files", *args.text_files, "--eval_text_files", *args.eval_text_files]
    done = folder / "run.json"
    if not done.is_file():
        metrics = recipe.main([*argv, *data])
        state = json.loads(
            (sorted(folder.glob("checkpoint-*"))[-1] / "trainer_state.json").read_text(encoding="utf-8")
        )
        command = " ".join(["python", f"recipes/{recipe.__name__}.py", *argv]).replace(
            str(Path(args.work_dir)), "WORK"
        )
        done.write_text(
            json.dumps({
                "command": command.replace(f"{CONFIGS.parents[1]}/", "").replace(args.work_dir, "WORK"),
                "commit": commit(),
                "steps": state["global_step"],
                "perplexity_before": metrics.get("before_perplexity"),
                "perplexity": metrics["eval_perplexity"],
                "parameters": int(transformers.AutoModel.from_pretrained(folder).num_parameters()),
            }),
            encoding="utf-8",
        )  # fmt: skip
    return json.loads(done.read_text(encoding="utf-8"))


def sample(name: str, judge, args: argparse.Namespace) -> list[dict]:
    """Rows of samples under the budgets, for each reuse."""
    folder = folder_of(name, args)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    settings = [{"reuse": reuse} for reuse in RUNS[name][-1]]
    rows = evaluate_budgets(
        model, tokenizer, judge, args.budgets, settings, num_samples=args.num_samples, batch_size=args.num_samples,
        judge_batch_size=24, cache_dir=Path(args.work_dir) / "cache",
    )  # fmt: skip
    kept = ("budget", "reuse", "num_steps", "block_evaluations", "generative_perplexity", "unigram_entropy", "sample")
    return [{key: row[key] for key in kept} for row in rows]


def human(judge, args: argparse.Namespace) -> dict:
    """The same measures of held-out text."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder_of("fp", args))
    blocks = pack(load_text(args.eval_text_files), tokenizer, 64).select(range(args.num_samples))["input_ids"]
    found = measure_samples(list(blocks), tokenizer, judge, batch_size=24)
    return {key: found[key] for key in ("generative_perplexity", "unigram_entropy", "protocol")}


def markdown(result: dict) -> str:
    """Both tables."""
    lines = ["| model | steps | validation perplexity before | after |", "|---|---|---|---|"]
    for name, run in result["runs"].items():
        before = f"{run['perplexity_before']:.2f}" if run["perplexity_before"] else ""
        lines.append(f"| {name} | {run['steps']} | {before} | {run['perplexity']:.2f} |")
    budgets = result["arguments"]["budgets"]
    lines += ["", "| model | reuse | " + " | ".join(f"{b}: perplexity, entropy" for b in budgets) + " |"]
    lines.append("|---" * (2 + len(budgets)) + "|")
    for name, run in result["runs"].items():
        for reuse in dict.fromkeys(row["reuse"] for row in run["samples"]):
            rows = [row for row in run["samples"] if row["reuse"] == reuse]
            cells = [f"{row['generative_perplexity']:.0f}, {row['unigram_entropy']:.2f}" for row in rows]
            lines.append(f"| {name} | {reuse} | " + " | ".join(cells) + " |")
    text = result["held_out_text"]
    cell = f"{text['generative_perplexity']:.0f}, {text['unigram_entropy']:.2f}"
    lines.append("| held-out text | | " + " | ".join([cell] * len(budgets)) + " |")
    return "\n".join(lines)


def main() -> None:
    """Train, sample, judge; write JSON and table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text_files", nargs="+", required=True)
    parser.add_argument("--eval_text_files", nargs="+", required=True)
    parser.add_argument("--judge", default="gpt2-large", help="A causal language model: hub name, folder, .gguf file.")
    parser.add_argument("--base_steps", type=int, default=4000)
    parser.add_argument("--adapt_steps", type=int, default=1000)
    parser.add_argument("--convert_steps", type=int, default=2000)
    parser.add_argument("--budgets", type=int, nargs="+", default=[24, 48, 96, 192])
    parser.add_argument("--num_samples", type=int, default=96, help="Texts per row.")
    parser.add_argument("--work_dir", default="outputs/posttraining")
    parser.add_argument("--output", default="benchmarks/results/posttraining_cpu.json")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    names = {key: [Path(file).name for file in getattr(args, key)] for key in ("text_files", "eval_text_files")}
    result = {
        "provenance": provenance("cuda" if torch.cuda.is_available() else "cpu"),
        "arguments": {**vars(args), **names, "judge": Path(args.judge).name, "work_dir": "WORK"},
        "runs": {name: train(name, args) for name in RUNS},
    }
    judge = load_judge(args.judge)
    result["held_out_text"] = human(judge, args)
    for name, run in result["runs"].items():
        run["samples"] = sample(name, judge, args)
    path = Path(args.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(result) + "\n", encoding="utf-8")
    print(markdown(result))


if __name__ == "__main__":
    main()
