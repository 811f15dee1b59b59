# SPDX-License-Identifier: Apache-2.0
"""Stories by released models first, then a model of your own: train a small FP-MDLM and sample it under budgets.

    make quickstart
    python recipes/quickstart.py --text_files my_text.txt --output_dir quickstart_mine

Writes `table.md`, `results.json`, `denoising.png` and the model folder `fp_mdlm` to `output_dir`.
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
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from fpmgm import FPMDLMConfig, FPMDLMForMaskedDiffusion
from fpmgm.analysis import plot_denoising
from fpmgm.command_line import LocalPath, parse_arguments
from fpmgm.data import load_text, pack, train_tokenizer
from fpmgm.evaluation import NGramJudge, generative_perplexity, load_judge, plus_minus, provenance, unigram_entropy
from fpmgm.evaluation.report import table, write_report
from fpmgm.model_cards.escape import one_line
from fpmgm.trainers import MGMTrainer, MGMTrainingConfig
from installed_english import paragraphs


MODEL_CARDS = Path(__file__).parents[1] / "model_cards"
STORYTELLERS = ("stories-mdlm", "stories-mdlm-small", "stories-cofre")
PROMPT = "Once upon a time, there was a", "They were happy.", 40  # what is given before and after that many blanks
SAMPLERS = ("ancestral", "none"), ("ancestral", "3sr"), ("halton", "none")  # order of revealing, reuse


@dataclass
class QuickstartArguments:
    """Sizes that fit five minutes on two slow cores."""

    text_files: list[LocalPath] | None = field(default=None, metadata={"help": "Your text; null: what is installed."})
    output_dir: str = field(default="quickstart", metadata={"help": "Where everything is written."})
    vocab_size: int = field(default=320, metadata={"help": "Tokens of the byte-pair tokenizer."})
    length: int = field(default=64, metadata={"help": "Tokens of a text."})
    hidden_size: int = field(default=64, metadata={"help": "Width of the model."})
    max_steps: int = field(default=2400, metadata={"help": "Optimizer steps."})
    batch_size: int = field(default=16, metadata={"help": "Texts per step."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate."})
    stories: LocalPath = field(default=str(MODEL_CARDS), metadata={"help": "Folder of the released models."})
    num_stories: int = field(default=32, metadata={"help": "Stories of each model under each budget."})
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

    results = {
        "provenance": provenance("cuda" if torch.cuda.is_available() else "cpu"),
        "arguments": vars(args),
        "stories": tell_stories(args, folder),
        **train_and_sample(args),
        "seconds": round(time.perf_counter() - start, 1),
    }
    write_report(folder / "results.json", results)
    (folder / "table.md").write_text(markdown(results), encoding="utf-8")
    print(f"\n{markdown(results)}\n{how_to_load(folder)}")
    return results


# ------------------------------------------------------------------------------------ released models: they write


def tell_stories(args: QuickstartArguments, folder: Path) -> dict:
    """Stories of the released models under each budget, one prompt completed, one picture of a story being written."""
    source = Path(args.stories)
    judge = load_judge(source / "stories-judge", device="cpu")
    models = {name: AutoModel.from_pretrained(source / name) for name in STORYTELLERS}
    tokenizer, rows = AutoTokenizer.from_pretrained(source / STORYTELLERS[0]), []
    for budget in args.budgets:
        print(f"\n--- budget {budget}: block evaluations for each text")
        for name, model in models.items():
            rows.append(tell(name, model, tokenizer, judge, budget, args))
            row = rows[-1]
            print(f"\n{name}, {row['num_steps']} steps, perplexity {shown(row)}:\n    {one_line(row['text'])}")
    model = models[STORYTELLERS[-1]]
    before, after, blanks = PROMPT
    prompt = before + tokenizer.mask_token * blanks + " " + after
    completed = tokenizer.decode(model.generate(**tokenizer(prompt, return_tensors="pt"), seed=args.seed)[0])
    print(f"\n--- {blanks} blanks between {before!r} and {after!r}:\n    {one_line(completed)}")
    draw_picture(model, tokenizer, folder / "denoising.png", args.seed)
    return {"judge": judge.name, "rows": rows, "prompt": prompt, "completed": completed}


def tell(name: str, model, tokenizer, judge, budget: int, args: QuickstartArguments) -> dict:
    """A row of the table: what one model writes under one budget."""
    start = time.perf_counter()
    out = model.generate(batch_size=args.num_stories, budget=budget, seed=args.seed, return_dict_in_generate=True)
    seconds = time.perf_counter() - start
    texts = tokenizer.batch_decode(out.sequences, skip_special_tokens=True)
    longest = judge.model.config.max_position_embeddings
    found = generative_perplexity(texts, judge, batch_size=32, max_length=longest, add_start_token=True)
    return {
        "model": name,
        "budget": budget,
        "num_steps": out.num_steps,
        "block_evaluations": out.block_evaluations,
        "milliseconds_per_text": 1000 * seconds / args.num_stories,
        "entropy": unigram_entropy(out.sequences.numpy()),
        "perplexity": found["generative_perplexity"],
        "perplexity_standard_error": found["generative_perplexity_standard_error"],
        "text": texts[0],
    }


def draw_picture(model, tokenizer, path: Path, seed: int) -> None:
    """One text being written."""
    steps = []
    model.generate(budget=96, seed=seed, callback=steps.append)
    plot_denoising(steps, tokenizer, path)


# ------------------------------------------------------------------------------------ a model of your own


def train_and_sample(args: QuickstartArguments) -> dict:
    """Train on text, sample under each budget by each of `SAMPLERS`."""
    tokenizer, train_blocks, eval_blocks = prepare_text(args)
    judge = NGramJudge(np.array(train_blocks["input_ids"]), len(tokenizer))
    held_out = np.array(eval_blocks["input_ids"])
    model, trained = train(args, tokenizer, train_blocks, eval_blocks)
    return {
        "text": {
            "source": args.text_files or "Python's documentation and docstrings of installed packages",
            "train_tokens": len(train_blocks) * args.length,
            "held_out_tokens": len(eval_blocks) * args.length,
        },
        "judge": "interpolated 4-gram model (Witten-Bell) of the training tokens",
        "held_out": {"entropy": unigram_entropy(held_out), **judged(judge, held_out)},
        "model": trained,
        "samples": sample(model, args, tokenizer, judge),
    }


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


def train(args, tokenizer, train_blocks, eval_blocks) -> tuple[FPMDLMForMaskedDiffusion, dict]:
    """Train an FP-MDLM and export it; returns the exported model and what was measured."""
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
        input_injection="diagonal",  # the others learn next to nothing in so few steps
    )
    torch.manual_seed(args.seed)
    model = FPMDLMForMaskedDiffusion(config)
    print(f"\nFP-MDLM 1/1/1: {model.num_parameters():,} parameters, {args.max_steps} steps")
    training = MGMTrainingConfig(
        output_dir=str(Path(args.output_dir) / "fp_mdlm"),
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


def sample(model, args, tokenizer, judge) -> list[dict]:
    """A row for each budget and each of `SAMPLERS`."""
    rows = []
    runs = [(budget, *sampler) for budget in args.budgets for sampler in SAMPLERS]
    for budget, order, reuse in tqdm(runs, desc="sampling"):
        options = {"budget": budget, "order": order, "reuse": reuse}
        out = model.generate(batch_size=args.num_samples, seed=args.seed, return_dict_in_generate=True, **options)
        rows.append(
            {
                **options,
                "num_steps": out.num_steps,
                "block_evaluations": out.block_evaluations,
                "entropy": unigram_entropy(out.sequences.numpy()),
                **judged(judge, out.sequences.numpy()),
                "text": tokenizer.decode(out.sequences[0], skip_special_tokens=True),
            }
        )
    return rows


def judged(judge: NGramJudge, sequences: np.ndarray) -> dict[str, float]:
    """Perplexity under the judge, with its standard error over texts."""
    found = judge.generative_perplexity(sequences)
    return {f"perplexity{end}": found[f"generative_perplexity{end}"] for end in ("", "_standard_error")}


# ------------------------------------------------------------------------------------ what is printed


def shown(row: dict) -> str:
    """A row's perplexity, with its standard error over texts."""
    return plus_minus(row["perplexity"], row["perplexity_standard_error"], 1)


def markdown(results: dict) -> str:
    """The results in Markdown."""
    found, text, model, stories = (results[name] for name in ("provenance", "text", "model", "stories"))
    told = [
        [
            row["budget"],
            row["model"],
            row["num_steps"],
            row["block_evaluations"],
            f"{row['milliseconds_per_text']:.1f}",
            f"{row['entropy']:.2f}",
            shown(row),
        ]
        for row in stories["rows"]
    ]
    samples = [
        [row["budget"], row["order"], row["reuse"], row["num_steps"], f"{row['entropy']:.2f}", shown(row)]
        for row in results["samples"]
    ]
    held_out = results["held_out"]
    samples.append([None, "held-out text", None, None, f"{held_out['entropy']:.2f}", shown(held_out)])
    perplexity = plus_minus(model["validation_perplexity"], model["validation_perplexity_standard_error"], 1)
    count, length = (results["arguments"][name] for name in ("num_samples", "length"))
    code = f"commit {found['commit']}" if found["commit"] else f"fpmgm {found['versions']['fpmgm']}"
    return (
        f"On {found['device']}; torch {found['versions']['torch']}, transformers {found['versions']['transformers']}, "
        f"{code}; {results['seconds']:.0f} s in all. ± is one standard error over texts.\n\n"
        f"Stories, {results['arguments']['num_stories']} of each row, perplexity under {stories['judge']}:\n\n"
        f"{table(['budget', 'model', 'steps', 'block evaluations', 'ms per text', 'entropy', 'perplexity'], told)}\n\n"
        f"A model of your own, {model['parameters']:,} parameters, {model['steps']} steps of "
        f"{model['seconds_per_step']:.3f} s on {text['train_tokens']:,} tokens of {text['source']}: validation "
        f"perplexity {perplexity}. {count} texts of {length} tokens a row, judged by an {results['judge']}, "
        "which sees local fluency only:\n\n"
        f"{table(['budget', 'order', 'reuse', 'steps', 'entropy', '4-gram perplexity'], samples)}\n"
    )


def how_to_load(folder: Path) -> str:
    """The lines that use what was trained."""
    model = str(folder / "fp_mdlm")
    return (
        f"A story being written, as a picture: {folder / 'denoising.png'}\n"
        "Use your model:\n\n"
        "    from transformers import AutoModel, AutoTokenizer\n"
        f"    model = AutoModel.from_pretrained({model!r}, trust_remote_code=True)\n"
        f"    print(AutoTokenizer.from_pretrained({model!r}).batch_decode(model.generate(budget=96)))\n"
    )


if __name__ == "__main__":
    main()
