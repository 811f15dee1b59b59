# SPDX-License-Identifier: Apache-2.0
"""Perplexity of held-out text, or of other corpora (zero-shot), under trained models: the ELBO and its error.

    python recipes/likelihood.py --model org/fp-mdlm-owt --text_files wikitext.txt ptb.txt --num_draws 4
    python recipes/likelihood.py --model org/fp-mdlm-owt --dataset_name Salesforce/wikitext --dataset_config \\
        wikitext-2-raw-v1 --split validation --iterations 1 2 4 6 12

Each file is a corpus of its own. Writes likelihood.json (with provenance) and likelihood.md to `output_dir`. The same
command goes on where it was interrupted; more draws or iterations keep what is there.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import fpmgm  # noqa: F401  (registers the models)
from fpmgm.command_line import DatasetName, LocalPath, ModelName, parse_arguments
from fpmgm.data import load_text, pack
from fpmgm.evaluation import elbo_perplexity, plus_minus, provenance
from fpmgm.evaluation.report import short_names, table, write_report
from fpmgm.models.arguments import check_whole
from judged_samples import device_of, open_model


@dataclass
class LikelihoodArguments:
    """Which text under which models."""

    model: list[ModelName] = field(metadata={"help": "Folders or hub names."})
    text_files: list[LocalPath] | None = field(default=None, metadata={"help": "Local files, each a corpus."})
    dataset_name: DatasetName | None = field(default=None, metadata={"help": "Hub dataset, instead of local files."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the hub dataset."})
    split: str | None = field(
        default=None, metadata={"help": "Split, or a part of it; null: validation of a hub dataset, all of a file."}
    )
    text_column: str = field(default="text", metadata={"help": "Column of the text."})
    blocks: int | None = field(default=None, metadata={"help": "Most blocks of a corpus; null: all."})
    length: int | None = field(default=None, metadata={"help": "Tokens of a block; null: the model's longest."})
    iterations: list[int] | None = field(
        default=None, metadata={"help": "Fixed-point iterations, a row for each; null: the model's own number."}
    )
    num_draws: int | None = field(
        default=None, metadata={"help": "Passes over the text; null: until the standard error is under 2 %."}
    )
    batch_size: int = field(default=8, metadata={"help": "Blocks per call of the model."})
    output_dir: str = field(default="evaluation", metadata={"help": "Where everything is written."})
    seed: int = field(default=0, metadata={"help": "Of times and masks."})
    device: str | None = field(default=None, metadata={"help": "Where to run; null: a GPU where there is one."})

    def __post_init__(self):
        for name in ("blocks", "iterations"):
            value = getattr(self, name)
            for number in value if isinstance(value, list) else [] if value is None else [value]:
                check_whole(name, number, minimum=1, unit=name)


def main(argv: list[str] | None = None) -> dict:
    """A row for each model, corpus and number of iterations; returns what the JSON file holds."""
    (args,) = parse_arguments((LikelihoodArguments,), __doc__, argv)
    device, folder = device_of(args), Path(args.output_dir)
    rows = []
    for name, path in zip(short_names("model", args.model), args.model, strict=True):
        rows += measure(name, *open_model(path, device), args)
    found = {"rows": rows, "arguments": asdict(args), "provenance": provenance(device)}
    if PartialState().is_main_process:
        write_report(folder / "likelihood.json", found, markdown(rows))
        print(f"\n{markdown(rows)}")
    return found


def measure(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args) -> list[dict]:
    """Rows of one model."""
    length = args.length or model.config.max_position_embeddings
    iterations = args.iterations if args.iterations and model.config.num_fixed_point_layers else [None]
    rows = []
    for corpus, text in corpora(args):
        blocks = pack(text, tokenizer, length)
        if args.blocks is not None:
            blocks = blocks.select(range(min(len(blocks), args.blocks)))
        for number in iterations:
            found = elbo_perplexity(
                model, blocks, num_draws=args.num_draws, num_iterations=number, batch_size=args.batch_size,
                seed=args.seed, cache_dir=Path(args.output_dir) / "cache", progress_bar=True,
            )  # fmt: skip
            rows.append({"model": name, "corpus": corpus, "length": length, **found})
    return rows


def corpora(args: LikelihoodArguments) -> list[tuple]:
    """Names and documents."""
    if args.text_files is None:
        source = (None, args.dataset_name, args.dataset_config, args.split or "validation")
        return [(args.dataset_name, load_text(*source, column=args.text_column))]
    rest = (args.dataset_name, args.dataset_config, args.split or "train")
    names = short_names("text_files", args.text_files)
    texts = [load_text(file, *rest, column=args.text_column) for file in args.text_files]
    return list(zip(names, texts, strict=True))


def markdown(rows: list[dict]) -> str:
    """The rows."""
    lines = [
        [
            row["model"],
            row["corpus"],
            f"{row['protocol']['num_tokens']:,}",
            row["protocol"]["num_draws"],
            row["protocol"]["num_iterations"],
            plus_minus(row["perplexity"], row["perplexity_standard_error"]),
        ]
        for row in rows
    ]
    note = "± standard error over the draws, where there are several: the noise of the estimate on this text."
    return f"{table(['model', 'corpus', 'tokens', 'draws', 'iterations', 'perplexity ≤'], lines)}\n\n{note}\n"


if __name__ == "__main__":
    main()
