# SPDX-License-Identifier: Apache-2.0
"""What training recipes do around their trainer: start from a model, go on, evaluate, export."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import Dataset
from transformers import (
    AutoModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)
from transformers.utils import cached_file

from fpmgm import load_halton_maskgit, load_mdlm
from fpmgm.command_line import ModelName, given, parse_arguments
from fpmgm.conversion.checkpoint import read_json
from fpmgm.trainers import MGMTrainer, MGMTrainingConfig
from fpmgm.trainers.checkpoints import checkpoint_step, checkpoint_to_resume, has_checkpoints
from fpmgm.trainers.lock import hold_folder
from fpmgm.trainers.peft import LoraArguments, lora_config
from fpmgm.trainers.run_record import Origin, describe_files
from image_data import (
    CodesArguments,
    check_model_reads,
    describe_codes,
    describe_rows,
    keep_preparation,
    load_code_rows,
)
from narration import say_what_came_of_it, say_what_is_trained
from text_data import DataArguments, describe_text, load_blocks, load_tokenizer


@dataclass
class StartArguments:
    """What training starts from."""

    model_name_or_path: ModelName = field(
        metadata={
            "help": "Folder or hub name of a model of this library, an MDLM or one of its descendants (SDTT, Duo's, "
            "DiDi-Instruct), its .ckpt, or a Halton-MaskGIT .pth."
        }
    )
    revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of it on the hub: of jdeschena/sdtt, the model."}
    )


@dataclass
class OptionalStartArguments:
    """What training starts from, if not from fresh weights."""

    model_name_or_path: ModelName | None = field(
        default=None, metadata={"help": "Folder or hub name of a model to go on from; null: fresh weights."}
    )


class Rows(NamedTuple):
    """What a recipe trains and validates on, what is saved beside the model, and what its card says of the data."""

    train: Dataset
    validation: Dataset
    tokenizer: PreTrainedTokenizerBase | None
    description: str
    data: dict


def run_checkpoint(args: TrainingArguments) -> str | None:
    """The checkpoint that the run in `output_dir` goes on from; `None`: it begins.

    Raises:
        `ValueError`: if there are checkpoints, but none is whole, or not the one named.
    """
    return checkpoint_to_resume(args.resume_from_checkpoint or has_checkpoints(args.output_dir), args.output_dir)


def describe_start(name: str | None, revision: str | None = None) -> list[dict] | str | None:
    """What a checkpoint records of the model that training started from: the contents of its files, or its name."""
    path = Path(name) if name is not None else None
    if path is None or not path.exists():
        return name if revision is None else f"{name}@{revision}"
    return describe_files(sorted(path.glob("*.safetensors")) if path.is_dir() else [path])


def load_model(name: str, revision: str | None = None) -> PreTrainedModel:
    """A model of this library, or a checkpoint of MDLM, its descendants or Halton-MaskGIT; in float32, to train it."""
    refuse_adapter(name)
    if Path(name).is_file():
        halton = Path(name).suffix in (".pth", ".safetensors")
        return load_halton_maskgit(name) if halton else load_mdlm(name)
    kinds = {}
    for file in ("config.json", "adapter_config.json"):
        path = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
        kinds[file] = None if path is None else read_json(Path(path)).get("model_type", "")
    # Some descendants' configurations name no type, others have no configuration.
    if kinds["adapter_config.json"] is None and kinds["config.json"] in (None, "", "mdlm"):
        return load_mdlm(name, revision=revision)
    return AutoModel.from_pretrained(name, revision=revision or "main", dtype=torch.float32)


def load_rows(
    text: DataArguments,
    codes: CodesArguments,
    config: PreTrainedConfig,
    start: StartArguments,
    checkpoint: str | None,
) -> Rows:
    """Blocks of text, by the tokenizer of the `checkpoint` to resume from or of the model; or codes of pictures for an
    image model."""
    model_name = start.model_name_or_path
    check_one_source(text, codes)
    if (config.model_type == "fpmaskgit") != (codes.codes_dir is not None):
        raise ValueError(
            f"`codes_dir`={codes.codes_dir!r} does not fit `model_name_or_path`={model_name!r}, which is of "
            f"`model_type`={config.model_type!r}: give `codes_dir` to an image model, text to one of text."
        )
    if codes.codes_dir is not None:
        train_rows, eval_rows, preparation = load_code_rows(codes)
        check_model_reads(config, model_name, preparation, start.revision)
        data = describe_rows(codes, preparation)
        return Rows(train_rows, eval_rows, None, describe_codes(preparation), data)
    tokenizer = load_tokenizer(text, model_name, checkpoint, start.revision)
    blocks = load_blocks(text, tokenizer, config.max_position_embeddings)
    return Rows(*blocks, tokenizer, text.description, describe_text(text))


def check_one_source(text: DataArguments, codes: CodesArguments) -> None:
    """Raise a `ValueError` for options of the data that would not be read: of text beside codes, of codes without."""
    read, other = ("`codes_dir`", text) if codes.codes_dir is not None else ("text", codes)
    if given(other):
        raise ValueError(f"{given(other)} does nothing where {read} is trained on: leave it out.")


def check_architecture(architecture, config: PreTrainedConfig, model_name: str) -> None:
    """Raise a `ValueError` for options of the architecture that the model to go on from contradicts."""
    default = type(architecture)()
    asked = {name: value for name, value in asdict(architecture).items() if value != getattr(default, name)}
    wrong = {name: value for name, value in asked.items() if value != getattr(config, name)}
    if wrong:
        raise ValueError(f"{wrong} is not what `model_name_or_path`={model_name!r} has: leave it out.")


def refuse_adapter(name: str) -> None:
    """Raise a `ValueError` for the folder of an adapter, whose weights would be frozen."""
    folder = Path(name)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ValueError(
            f"`model_name_or_path`={name!r} is an adapter: start from its model with it in the weights, which "
            "`PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(folder)` writes."
        )


def check_adapter(lora: LoraArguments, start: OptionalStartArguments) -> None:
    """Raise a `ValueError` for an adapter of fresh weights, or of a model with one."""
    if start.model_name_or_path is not None:
        refuse_adapter(start.model_name_or_path)
    if lora.use_peft and start.model_name_or_path is None:
        raise ValueError("`use_peft` adapts a trained model: give `model_name_or_path`.")


def make_trainer(
    trainer_class: type[MGMTrainer], rows: Rows, start: StartArguments | OptionalStartArguments, lora: LoraArguments,
    args: MGMTrainingConfig, options: dict | None = None, **models: PreTrainedModel,
) -> MGMTrainer:  # fmt: skip
    """A trainer of `models` (`model=…`, and a teacher) on `rows`, whose checkpoints record what the run started from
    and `options`."""
    args.data_description = args.data_description or rows.description
    described = describe_start(start.model_name_or_path, getattr(start, "revision", None))
    return trainer_class(
        **models,
        args=args,
        train_dataset=rows.train,
        eval_dataset=rows.validation,
        processing_class=rows.tokenizer,
        peft_config=lora_config(lora),
        origin=Origin(rows.data, {**(options or {}), "start": described}, start.model_name_or_path),
    )


def train_and_export(
    trainer: Trainer, checkpoint: str | None, data: list[str], before: dict[str, float] | None = None
) -> dict[str, float]:
    """Train from `checkpoint`, if there is one; evaluate, export, push with `--push_to_hub`; say so, and with `data`,
    the options that name the rows, what comes next. `before`: metrics of the model that training started from.

    Returns:
        `dict[str, float]` of the exported weights' metrics.
    """
    say_what_is_trained(trainer, checkpoint)
    trained = trainer.train(resume_from_checkpoint=checkpoint).metrics
    first = checkpoint_step(checkpoint) if checkpoint is not None else 0
    if trainer.state.global_step > first:  # else an earlier run was cut off after its last step
        trainer.save_metrics("train", trained)
    metrics = trainer.evaluate()
    trainer.save_metrics("eval", metrics)
    trainer.save_model()
    say_what_came_of_it(trainer, (before or {}) | metrics, data)
    return metrics


def train_with_before_and_after(trainer: Trainer, checkpoint: str | None, data: list[str]) -> dict[str, float]:
    """[`train_and_export`], with validation perplexity before and after printed and saved beside the model."""
    before = trainer.evaluate(metric_key_prefix="before")
    trainer.save_metrics("before", before)
    return before | train_and_export(trainer, checkpoint, data, before)


def post_train(
    trainer_class: type[MGMTrainer], config_class: type[MGMTrainingConfig], description: str, argv: list[str] | None
) -> dict[str, float]:
    """A recipe that goes on from a model with another trainer; returns the metrics before and after."""
    types = (StartArguments, DataArguments, CodesArguments, LoraArguments, config_class)
    start, text, codes, lora, args = parse_arguments(types, description, argv)
    with hold_folder(args.output_dir, take=args.should_save):
        return go_on(start, text, codes, lora, args, lambda model, rows: (trainer_class, {"model": model}, {}))


def go_on(
    start: StartArguments, text: DataArguments, codes: CodesArguments, lora: LoraArguments, args: MGMTrainingConfig,
    prepare: Callable[[PreTrainedModel, Rows], tuple[type[MGMTrainer], dict, dict]],
) -> dict[str, float]:  # fmt: skip
    """Train on from a model, in a folder that is this run's alone; returns the metrics before and after.

    `prepare` makes of the model and the rows the trainer's class, the models that it takes, and options that a
    checkpoint records.
    """
    model, checkpoint = load_model(start.model_name_or_path, start.revision), run_checkpoint(args)
    with args.main_process_first(desc="data"):
        rows = load_rows(text, codes, model.config, start, checkpoint)
    keep_preparation(codes, args)
    trainer_class, models, options = prepare(model, rows)
    trainer = make_trainer(trainer_class, rows, start, lora, args, options, **models)
    return train_with_before_and_after(trainer, checkpoint, codes.words or text.words)
