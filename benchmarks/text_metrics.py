# SPDX-License-Identifier: Apache-2.0
"""What each measure of text says of human text, of the same words shuffled or repeated, and of a model's samples.

    python benchmarks/text_metrics.py --text_files novels.jsonl --model outputs/fp_mdlm_small --judge gpt2-large

Human text is cut into the model's blocks. *Shuffled* has the words of each block in random order; *repeated* says the
first words of each block over and over. Reference text for MAUVE are other blocks of the same files. Checks that every
measure orders these as it must, and writes the table with its provenance.
"""

import random
from dataclasses import asdict, dataclass, field
from pathlib import Path

from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from fpmgm.command_line import LocalPath, ModelName, parse_arguments
from fpmgm.data import load_text, pack
from fpmgm.evaluation import elbo_perplexity, load_judge, measure_samples, provenance, sample_sequences
from fpmgm.evaluation.report import table, write_report
from fpmgm.models.text_input import encode_text


MEASURES = {
    "generative_perplexity": "gen. PPL (eq. 4)",
    "generative_perplexity_token_weighted": "gen. PPL (tokens)",
    "unigram_entropy": "entropy",
    "distinct_2": "distinct-2",
    "repetition_4": "rep-4",
    "mauve": "MAUVE",
    "elbo_perplexity": "model's PPL ≤",
}
# What must hold, whatever the model: a measure, and texts of which it gives the first less than the second.
ORDER = [
    ("generative_perplexity", "human", "shuffled"),
    ("generative_perplexity_token_weighted", "human", "shuffled"),
    ("generative_perplexity", "repeated", "human"),  # perplexity alone rewards degenerate text,
    ("unigram_entropy", "repeated", "human"),  # which entropy,
    ("distinct_2", "repeated", "human"),
    ("repetition_4", "human", "repeated"),  # repetition
    ("mauve", "repeated", "human"),  # and MAUVE detect
    ("mauve", "shuffled", "human"),
    ("elbo_perplexity", "human", "shuffled"),
]


@dataclass
class Arguments:
    """Which text, which model, which judge."""

    text_files: list[LocalPath] = field(metadata={"help": "Human text that the model has not seen."})
    model: ModelName = field(metadata={"help": "Folder or hub name of a masked model of text."})
    judge: ModelName = field(
        default="gpt2-large", metadata={"help": "Causal language model: hub name, folder, .gguf file."}
    )
    num_samples: int = field(default=200, metadata={"help": "Texts on each line."})
    budgets: list[int] = field(default_factory=lambda: [96], metadata={"help": "Of the model's samples."})
    num_draws: int = field(default=4, metadata={"help": "Of the likelihood."})
    batch_size: int = field(default=16, metadata={"help": "Texts per call of the judge."})
    max_length: int = field(default=1024, metadata={"help": "Tokens that the judge reads."})
    cache_dir: str = field(default="outputs/text_metrics", metadata={"help": "Keeps finished batches."})
    seed: int = field(default=0, metadata={"help": "Of the samples and the shuffling."})
    output: str = field(default="benchmarks/results/text_metrics.json", metadata={"help": "JSON to write."})


def variants(blocks: list[list[int]], tokenizer: PreTrainedTokenizerBase, seed: int) -> dict[str, list[list[int]]]:
    """Human blocks, and two kinds of blocks of the same lengths made of their words."""
    generator, shuffled, repeated = random.Random(seed), [], []
    ends = [block[-1:] for block in blocks]
    for block, end in zip(blocks, ends, strict=True):
        words = tokenizer.decode(block, skip_special_tokens=True).split()
        mixed = generator.sample(words, len(words))
        for rows, text in ((shuffled, mixed), (repeated, words[1:5] * len(words))):
            (ids,) = encode_text(tokenizer, [" ".join(text)])
            rows.append([block[0], *ids[: len(block) - 2], *end])
    return {"human": blocks, "shuffled": shuffled, "repeated": repeated}


def measure(
    name: str, sequences: list[list[int]], references: list[str], model: PreTrainedModel, tokenizer, judge, args
) -> dict:
    """One line of the table."""
    options = {"batch_size": args.batch_size, "max_length": args.max_length, "cache_dir": args.cache_dir}
    row = measure_samples(sequences, tokenizer, judge, references=references, **options)
    likelihood = elbo_perplexity(model, sequences, num_draws=args.num_draws, batch_size=32)
    row["protocol"]["elbo_perplexity"] = likelihood["protocol"]
    error = likelihood["standard_error_draws"]
    row |= {"elbo_perplexity": likelihood["perplexity"], "elbo_nats_standard_error_draws": error}
    return {"text": name, **row}


def broken(rows: list[dict]) -> list[str]:
    """What of [`ORDER`] does not hold."""
    by_name = {row["text"]: row for row in rows}
    return [
        f"{measure}: {low} {by_name[low][measure]:.4g}, {high} {by_name[high][measure]:.4g}"
        for measure, low, high in ORDER
        if not by_name[low][measure] < by_name[high][measure]
    ]


def markdown(result: dict) -> str:
    """The lines, and how they were made."""
    protocol = result["rows"][0]["protocol"]["generative_perplexity"]
    mauve = result["rows"][0]["protocol"]["mauve"]
    rows = [[row["text"], *(f"{row[measure]:.4g}" for measure in MEASURES)] for row in result["rows"]]
    return (
        f"{table(['text', *MEASURES.values()], rows)}\n\n"
        f"{mauve['num_samples']} texts of {result['length']} tokens of the model on every line, read by the judge "
        f"{protocol['judge']}. MAUVE against as many other human blocks (the usual number is 5,000), features: "
        f"{mauve['featurizer']}. Model's PPL: ELBO, "
        f"{result['arguments']['num_draws']} draws. {result['provenance']['device']}; "
        f"commit {result['provenance']['commit']}."
    )


def main() -> None:
    """Measure, check, print and save."""
    (args,) = parse_arguments((Arguments,), __doc__)
    tokenizer, model = AutoTokenizer.from_pretrained(args.model), AutoModel.from_pretrained(args.model).eval()
    judge, length = load_judge(args.judge), model.config.max_position_embeddings
    model.to(judge.model.device)
    blocks = pack(load_text(args.text_files), tokenizer, length)
    if len(blocks) < 2 * args.num_samples:
        raise ValueError(f"`text_files` give {len(blocks)} blocks, fewer than 2 × `num_samples`={args.num_samples}.")
    # Spread over the files, every other one a reference.
    places = [i * len(blocks) // (2 * args.num_samples) for i in range(2 * args.num_samples)]
    references = tokenizer.batch_decode(list(blocks.select(places[1::2])["input_ids"]), skip_special_tokens=True)
    texts = variants(list(blocks.select(places[::2])["input_ids"]), tokenizer, args.seed)
    for budget in args.budgets:
        samples = sample_sequences(model, args.num_samples, batch_size=20, seed=args.seed, budget=budget)
        texts[f"samples, budget {budget}"] = samples.sequences.tolist()
    rows = [
        measure(name, sequences, references, model, tokenizer, judge, args)
        for name, sequences in logging.tqdm(texts.items(), desc="texts")
    ]
    names = {"text_files": [Path(file).name for file in args.text_files]}
    names |= {name: Path(getattr(args, name)).name for name in ("model", "judge", "cache_dir", "output")}
    result = {
        "arguments": asdict(args) | names,
        "length": length,
        "provenance": provenance(judge.model.device),
        "rows": rows,
        "broken": broken(rows),
    }
    write_report(args.output, result, markdown(result))
    print(markdown(result))
    if result["broken"]:
        raise SystemExit("a measure does not order the texts as it must: " + "; ".join(result["broken"]))


if __name__ == "__main__":
    main()
