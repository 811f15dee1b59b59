# SPDX-License-Identifier: Apache-2.0
"""What the recipes that judge samples share: their arguments, the judge, the model, the report's files."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import AutoConfig, AutoModel, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from fpmgm.command_line import LocalPath, ModelName, given
from fpmgm.conversion.checkpoint import read_json
from fpmgm.data import load_text, pack
from fpmgm.evaluation import (
    AnyJudge,
    NGramJudge,
    TruthJudge,
    load_judge,
    load_truth,
    measure_samples,
    plus_minus,
)
from fpmgm.evaluation.report import table
from fpmgm.evaluation.samples import check_setting
from fpmgm.models.loading import saved_generation_config
from fpmgm.models.reuse import GAMMAS
from fpmgm.models.text_input import read_tokenizer


JUDGES = {  # option that names a judge → other options of this judge
    "truth": ("truth_texts", "judge_batch_size"),
    "judge_text_files": ("judge_blocks",),
    "judge": ("judge_batch_size", "max_length"),
}


OF_THE_SOLVER = ("reuse", *GAMMAS, "iterations_per_step", "tolerance", "solver", "freeze_tolerance")


@dataclass(kw_only=True)
class JudgedSamplesArguments:
    """How texts are drawn, who judges them, where everything goes."""

    length: int | None = field(default=None, metadata={"help": "Tokens of a text; null: the model's longest."})
    batch_size: int = field(default=8, metadata={"help": "Texts per call of the model."})
    judge: ModelName | None = field(
        default=None, metadata={"help": "Causal model: hub name, folder, .gguf file; null: gpt2-large."}
    )
    judge_text_files: list[LocalPath] | None = field(
        default=None, metadata={"help": "Text of a 4-gram judge, instead of `judge`: cheap, for small models."}
    )
    truth: ModelName | None = field(
        default=None,
        metadata={"help": "Causal language model whose samples the models learnt, as the judge: folder, hub name."},
    )
    truth_texts: int = field(default=2000, metadata={"help": "Texts of the truth that its entropy is measured on."})
    judge_blocks: int | None = field(default=None, metadata={"help": "Blocks that the 4-gram judge reads; null: all."})
    judge_batch_size: int | None = field(
        default=None, metadata={"help": "Texts per call of a language model as the judge; null: 8."}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Tokens of a text that a language model reads as the judge; null: 1024."}
    )
    output_dir: str = field(default="evaluation", metadata={"help": "Where everything is written."})
    seed: int = field(default=0, metadata={"help": "Of the samples."})
    device: str | None = field(default=None, metadata={"help": "Where to run; null: a GPU where there is one."})

    def __post_init__(self):
        judge = next((name for name in JUDGES if getattr(self, name) is not None), "judge")
        options = {*JUDGES, *(name for names in JUDGES.values() for name in names)} - {judge, *JUDGES[judge]}
        idle = {name: value for name, value in sorted(given(self).items()) if name in options}
        if idle:
            raise ValueError(f"{idle} does nothing where `{judge}` is the judge: leave it out.")

    @property
    def sampling(self) -> dict:
        """Options of `sweep` and `evaluate_budgets`."""
        return {
            "length": self.length,
            "batch_size": self.batch_size,
            "judge_batch_size": self.judge_batch_size,
            "max_length": self.max_length,
            "seed": self.seed,
            "cache_dir": Path(self.output_dir) / "cache",
            "progress_bar": True,
        }


def device_of(args) -> str:
    """The `device` asked for, or the one there is."""
    state = PartialState(cpu=args.device == "cpu")
    return args.device or str(state.device)


def open_model(path: str, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A checkpoint, ready to sample."""
    return AutoModel.from_pretrained(path).to(device).eval(), read_tokenizer(path)


def check_settings(
    models: list[str], settings_of: Callable[[PreTrainedModel], list[dict]], length: int | None
) -> None:
    """Raise before the first model is sampled what `generate` would raise of any setting of any of them."""
    for path in models:
        model = without_weights(path)
        for setting in settings_of(model):
            check_setting(model, setting, length)


def without_weights(path: str) -> PreTrainedModel:
    """A checkpoint's configuration and defaults of `generate`, in a model whose weights are not read: of an adapter
    those of the model that it adapts."""
    adapter = find_adapter_config_file(path)
    base = path if adapter is None else read_json(Path(adapter))["base_model_name_or_path"]
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.from_pretrained(base))
    model.generation_config = saved_generation_config(model.generation_config_class, base)
    return model


def fitting_options(options: dict, config) -> dict:
    """The options of `generate` that a model can have: without fixed-point layers nothing iterates or is reused, and a
    looped model reuses nothing."""
    if config.is_looped and options.get("reuse", "none") != "none":
        return {name: value for name, value in options.items() if name != "reuse" and name not in GAMMAS}
    if config.num_fixed_point_layers:
        return options
    return {name: value for name, value in options.items() if name not in OF_THE_SOLVER}


def open_judge(args: JudgedSamplesArguments, models: list[str], device: str) -> AnyJudge:
    """The language model named, the truth, or a 4-gram model of text in the tokens that all `models` share."""
    if args.truth is not None:
        return open_truth(args, models, device)
    if args.judge_text_files is None:
        return load_judge(args.judge or "gpt2-large", device)
    tokenizer = read_tokenizer(models[0])
    for path in models[1:]:
        if read_tokenizer(path).get_vocab() != tokenizer.get_vocab():
            raise ValueError(
                f"`judge_text_files`: {path!r} has another tokenizer than {models[0]!r}, and a 4-gram model judges "
                "token ids: compare models of one tokenizer, or give a language model as `judge`."
            )
    length = args.length or AutoConfig.from_pretrained(models[0]).max_position_embeddings
    blocks = cut(args.judge_text_files, tokenizer, length, args.judge_blocks, "judge_text_files", "judge_blocks")
    name = f"4-gram model of {', '.join(Path(file).name for file in args.judge_text_files)}"
    return NGramJudge(blocks, len(tokenizer), name=name)


def open_truth(args: JudgedSamplesArguments, models: list[str], device: str) -> TruthJudge:
    """The truth, whose tokens all `models` must have."""
    known = read_tokenizer(args.truth).get_vocab()
    for path in models:
        tokenizer = read_tokenizer(path)
        if {token: i for token, i in tokenizer.get_vocab().items() if i != tokenizer.mask_token_id} != known:
            raise ValueError(
                f"`truth`={args.truth!r} has another tokenizer than {path!r}, which did not learn its texts: give the "
                "truth that the model was trained on (see recipes/sample_world.py)."
            )
    lengths = {args.length or AutoConfig.from_pretrained(path).max_position_embeddings for path in models}
    if len(lengths) > 1:
        raise ValueError(f"`model`s of lengths {sorted(lengths)}: give `length`, for which the entropy is measured.")
    return load_truth(args.truth, lengths.pop(), args.truth_texts, args.seed + 1, device)


def cut(
    files: list[str], tokenizer: PreTrainedTokenizerBase, length: int, count: int | None, name: str, limit: str
) -> list[list[int]]:
    """The first `count` blocks of `length` ids, as in training (`None`: all); messages say `name` and `limit`."""
    blocks = pack(load_text(files), tokenizer, length)
    if count is not None and len(blocks) < count:
        raise ValueError(f"`{name}` give {len(blocks)} texts of {length} tokens, fewer than `{limit}`={count}.")
    return list((blocks if count is None else blocks.select(range(count)))["input_ids"])


def measure_text(
    args: JudgedSamplesArguments, files: list[str], tokenizer: PreTrainedTokenizerBase, judge: AnyJudge,
    length: int, count: int,
) -> dict:  # fmt: skip
    """The measures of human text, cut like the samples."""
    blocks = cut(files, tokenizer, length, count, "text_files", "num_samples")
    judging = {"batch_size": args.judge_batch_size, "max_length": args.max_length}
    return measure_samples(blocks, tokenizer, judge, **judging, cache_dir=args.sampling["cache_dir"])


def rows_table(rows: list[dict], names: list[str]) -> str:
    """A line per row: what it sets, what it costs, what it measured."""
    lines = []
    for row in rows:
        settings = {**row, **row["sampling"]["options"]}
        measures = [shown_perplexity(row), f"{row['unigram_entropy']:.3f}", f"{row['milliseconds_per_sequence']:.1f}"]
        lines.append([*(settings[name] for name in names), row["num_steps"], row["block_evaluations"], *measures])
    columns = [*names, "steps", "block evaluations", "Gen. PPL ↓", "entropy ↑", "ms per text"]
    return table(columns, lines) + "\n"


def timed_on(rows: list[dict]) -> str:
    """The devices by whose clock rows were sampled: finished batches may have been kept from others."""
    return ", ".join(sorted({row["timed_on"] or "a device that was not noted" for row in rows}))


def shown_perplexity(row: dict) -> str:
    """Generative perplexity with its standard error over the texts."""
    return plus_minus(row["generative_perplexity"], row["generative_perplexity_standard_error"])


def markdown(found: dict, rows: str) -> str:
    """The table, the text given, and how the numbers were made."""
    row = found["rows"][0]
    times = f" ms: generation only, on {timed_on(found['rows'])}." if "ms per" in rows else ""
    protocol, sampling = row["protocol"]["generative_perplexity"], row["sampling"]
    lines = [rows]
    if "text" in found:
        text = found["text"]
        lines.append(f"The text given: Gen. PPL {shown_perplexity(text)}, entropy {text['unigram_entropy']:.3f}.\n")
    lines.append(
        f"Gen. PPL ± standard error over texts: under {protocol['judge']}, mean over texts first (equation 4); "
        f"special tokens {protocol['special_tokens']}, at most {protocol['max_length']} tokens. Each row: "
        f"{protocol['num_samples']} texts of {sampling['length']} tokens, in batches of {sampling['batch_size']}, the "
        f"same seeds in all. Entropy: nats, of the model's tokens.{times} "
        f"`{found['provenance']['command']}`, on {found['provenance']['device']}.\n"
    )
    return "\n".join(lines)
