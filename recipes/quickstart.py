# SPDX-License-Identifier: Apache-2.0
"""The main job on a small scale: train an FP-MDLM and an MDLM of equal width, sample both under budgets, compare.

    make quickstart
    python recipes/quickstart.py --text_files my_text.txt --output_dir quickstart_mine

Writes `table.md`, `results.json`, `denoising.png` and the two model folders to `output_dir`.
"""

import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import transformers
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from fpmgm import FPMDLMConfig, FPMDLMForMaskedDiffusion
from fpmgm.analysis import plot_denoising
from fpmgm.command_line import LocalPath, parse_arguments
from fpmgm.data import load_text, pack, train_tokenizer
from fpmgm.evaluation import NGramJudge, plus_minus, provenance, unigram_entropy
from fpmgm.evaluation.report import table, write_report
from fpmgm.trainers import MGMTrainer, MGMTrainingConfig
from installed_english import paragraphs


ARCHITECTURES = {
    # `"diagonal"`: the other injections learn next to nothing in so few steps.
    "fp_mdlm": {"num_pre_layers": 1, "num_fixed_point_layers": 1, "num_post_layers": 1, "input_injection": "diagonal"},
    "mdlm": {"num_pre_layers": 12, "num_fixed_point_layers": 0, "num_post_layers": 0},
}
TITLES = {"fp_mdlm": "FP-MDLM 1/1/1", "mdlm": "MDLM 12/0/0"}
REUSES = {"fp_mdlm": ("none", "full", "3sr"), "mdlm": ("none",)}


@dataclass
class QuickstartArguments:
    """Sizes that fit ten minutes on two slow cores."""

    text_files: list[LocalPath] | None = field(default=None, metadata={"help": "Your text; null: what is installed."})
    output_dir: str = field(default="quickstart", metadata={"help": "Where everything is written."})
    vocab_size: int = field(default=320, metadata={"help": "Tokens of the byte-pair tokenizer."})
    length: int = field(default=64, metadata={"help": "Tokens of a text."})
    hidden_size: int = field(default=64, metadata={"help": "Width of both models."})
    max_steps: int = field(default=1800, metadata={"help": "Optimizer steps of each model."})
    batch_size: int = field(default=16, metadata={"help": "Texts per step."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of both models."})
    budgets: list[int] = field(default_factory=lambda: [24, 48, 96, 192], metadata={"help": "Block evaluations."})
    num_samples: int = field(default=256, metadata={"help": "Texts per row of the table."})
    eval_blocks: int = field(default=400, metadata={"help": "Blocks of held-out text."})
    seed: int = field(default=0, metadata={"help": "Seed of everything."})


def main(argv: list[str] | None = None) -> dict:
    """Run everything; returns what `results.json` holds."""
    (args,) = parse_arguments((QuickstartArguments,), __doc__, argv)
    start, folder = time.perf_counter(), Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    transformers.logging.set_verbosity_error()

    tokenizer, train_blocks, eval_blocks = prepare_text(args)
    judge = NGramJudge(np.array(train_blocks["input_ids"]), len(tokenizer))
    held_out = np.array(eval_blocks["input_ids"])
    results = {
        "provenance": provenance("cuda" if torch.cuda.is_available() else "cpu"),
        "arguments": vars(args),
        "text": {
            "source": args.text_files or "Python's documentation and docstrings of installed packages",
            "train_tokens": len(train_blocks) * args.length,
            "held_out_tokens": len(eval_blocks) * args.length,
        },
        "judge": "interpolated 4-gram model (Witten-Bell) of the training tokens",
        "held_out": {"entropy": unigram_entropy(held_out), **judged(judge, held_out)},
        "models": {},
        "samples": [],
    }
    for name, architecture in ARCHITECTURES.items():
        model, results["models"][name] = train(name, architecture, args, tokenizer, train_blocks, eval_blocks)
        results["samples"] += sample(name, model, args, tokenizer, judge)
        if name == "fp_mdlm":
            draw_picture(model, tokenizer, folder / "denoising.png", args.seed)
    results["seconds"] = round(time.perf_counter() - start, 1)

    write_report(folder / "results.json", results)
    (folder / "table.md").write_text(markdown(results), encoding="utf-8")
    print(f"\n{markdown(results)}\n{how_to_load(folder / 'fp_mdlm')}")
    return results


def prepare_text(args: QuickstartArguments) -> tuple[PreTrainedTokenizerBase, Dataset, Dataset]:
    """A tokenizer trained here, blocks to train on, and blocks held out (the last paragraphs after a shuffle)."""
    print("reading text ...")
    texts = list(load_text(args.text_files)["text"]) if args.text_files else paragraphs()
    random.Random(args.seed).shuffle(texts)
    print(f"{len(texts):,} documents, {sum(map(len, texts)) / 1e6:.1f} MB; training the tokenizer ...")
    tokenizer = train_tokenizer(texts[: max(1, len(texts) // 2)], args.vocab_size)
    blocks = pack(Dataset.from_dict({"text": texts}), tokenizer, args.length)
    if len(blocks) <= args.eval_blocks:
        raise ValueError(f"`text_files` give {len(blocks)} blocks, {args.eval_blocks} are held out: give more text.")
    split = len(blocks) - args.eval_blocks
    return tokenizer, blocks.select(range(split)), blocks.select(range(split, len(blocks)))


def train(name, architecture, args, tokenizer, train_blocks, eval_blocks) -> tuple[FPMDLMForMaskedDiffusion, dict]:
    """Train one model and export it; returns the exported model and what was measured."""
    config = FPMDLMConfig(
        vocab_size=len(tokenizer),
        mask_token_id=tokenizer.mask_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        hidden_size=args.hidden_size,
        num_attention_heads=4,
        intermediate_size=4 * args.hidden_size,
        conditioning_size=32,
        rope_theta=100.0,  # short texts
        max_position_embeddings=args.length,
        dropout=0.0,
        **architecture,
    )
    torch.manual_seed(args.seed)
    model = FPMDLMForMaskedDiffusion(config)
    print(f"\n{TITLES[name]}: {model.num_parameters():,} parameters, {args.max_steps} steps")
    training = MGMTrainingConfig(
        output_dir=str(Path(args.output_dir) / name),
        max_steps=args.max_steps,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=50,
        adam_beta2=0.95,
        loss_weighting="uniform",  # batches this small see too few of the small times to weigh them by 1/t
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=50,
        ema_decay=0.99,
        logging_steps=max(1, args.max_steps // 4),
        save_strategy="no",
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=args.seed,
        data_description="Python's documentation and docstrings of installed packages"
        if args.text_files is None
        else f"{len(args.text_files)} local file(s)",
    )
    trainer = MGMTrainer(
        model=model, args=training, train_dataset=train_blocks, eval_dataset=eval_blocks, processing_class=tokenizer
    )
    trained = trainer.train().metrics
    metrics = trainer.evaluate()
    trainer.save_metrics("train", trained)
    trainer.save_metrics("eval", metrics)
    trainer.save_model()
    measured = {
        "parameters": model.num_parameters(),
        "steps": args.max_steps,
        "seconds_per_step": trained["train_runtime"] / args.max_steps,
        "validation_perplexity": metrics["eval_perplexity"],
        "validation_perplexity_standard_error": metrics.get("eval_perplexity_stderr"),
    }
    return FPMDLMForMaskedDiffusion.from_pretrained(training.output_dir), measured


def sample(name, model, args, tokenizer, judge) -> list[dict]:
    """A row for each budget and reuse."""
    rows = []
    runs = [(budget, reuse) for budget in args.budgets for reuse in REUSES[name]]
    for budget, reuse in tqdm(runs, desc="sampling"):
        start = time.perf_counter()
        out = model.generate(
            batch_size=args.num_samples, budget=budget, reuse=reuse, seed=args.seed, return_dict_in_generate=True
        )
        seconds = time.perf_counter() - start
        rows.append(
            {
                "model": name,
                "budget": budget,
                "reuse": reuse,
                "num_steps": out.num_steps,
                "block_evaluations": out.block_evaluations,
                "milliseconds_per_text": 1000 * seconds / args.num_samples,
                "entropy": unigram_entropy(out.sequences.numpy()),
                **judged(judge, out.sequences.numpy()),
                "text": tokenizer.decode(out.sequences[0], skip_special_tokens=True),
            }
        )
    return rows


def judged(judge: NGramJudge, sequences: np.ndarray) -> dict[str, float]:
    """Perplexity under the judge, with its standard error over texts."""
    found = judge.generative_perplexity(sequences)
    return {f"ngram_perplexity{end}": found[f"generative_perplexity{end}"] for end in ("", "_standard_error")}


def shown_perplexity(row: dict) -> str:
    """What [`judged`] found."""
    return plus_minus(row["ngram_perplexity"], row["ngram_perplexity_standard_error"], 1)


def draw_picture(model, tokenizer, path: Path, seed: int) -> None:
    """One text being written."""
    steps = []
    model.generate(budget=96, seed=seed, callback=steps.append)
    plot_denoising(steps, tokenizer, path)


def markdown(results: dict) -> str:
    """The results in Markdown."""
    found, text = results["provenance"], results["text"]
    models = [
        [
            TITLES[name],
            f"{m['parameters']:,}",
            m["steps"],
            f"{m['seconds_per_step']:.3f}",
            plus_minus(m["validation_perplexity"], m["validation_perplexity_standard_error"], 1),
        ]
        for name, m in results["models"].items()
    ]
    samples = []
    for row in sorted(results["samples"], key=lambda row: row["budget"]):
        cost = [row["num_steps"], row["block_evaluations"], f"{row['milliseconds_per_text']:.1f}"]
        quality = [f"{row['entropy']:.2f}", shown_perplexity(row)]
        samples.append([row["budget"], TITLES[row["model"]], row["reuse"], *cost, *quality])
    held_out = results["held_out"]
    samples.append([None, "held-out text", *[None] * 4, f"{held_out['entropy']:.2f}", shown_perplexity(held_out)])
    columns = ["budget", "model", "reuse", "steps", "block evaluations", "ms per text", "entropy", "4-gram perplexity"]
    return (
        f"Text: {text['source']}; {text['train_tokens']:,} training and {text['held_out_tokens']:,} held-out tokens.\n"
        f"On {found['device']}; torch {found['versions']['torch']}, transformers {found['versions']['transformers']}, "
        f"commit {found['commit']}; {results['seconds']:.0f} s in all.\n\n"
        f"{table(['model', 'parameters', 'steps', 'seconds per step', 'validation perplexity'], models)}\n\n"
        f"{table(columns, samples)}\n\n"
        f"4-gram perplexity ± standard error over texts: under an {results['judge']}; it sees local fluency only. "
        f"Each row: {results['arguments']['num_samples']} texts of {results['arguments']['length']} tokens.\n"
    )


def how_to_load(folder: Path) -> str:
    """The three lines that use what was trained."""
    return (
        f"The picture of one text being written: {folder.parent / 'denoising.png'}\n"
        "Use the model:\n\n"
        "    from transformers import AutoModel, AutoTokenizer\n"
        f"    model = AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=True)\n"
        f"    print(AutoTokenizer.from_pretrained({str(folder)!r}, trust_remote_code=True)"
        ".batch_decode(model.generate(budget=96)))\n"
    )


if __name__ == "__main__":
    main()
