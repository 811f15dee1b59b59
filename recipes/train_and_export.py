# SPDX-License-Identifier: Apache-2.0
"""What training recipes do around their trainer: start from a model, go on, evaluate, export."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoModel, PreTrainedModel, Trainer
from transformers.utils import cached_file

from fpmgm import load_mdlm
from fpmgm.trainers import MGMTrainer, MGMTrainingConfig, last_checkpoint
from fpmgm.trainers.arguments import LoraArguments, parse_arguments
from fpmgm.trainers.peft import lora_config
from text_data import DataArguments, load_blocks, load_tokenizer


@dataclass
class StartArguments:
    """What training starts from."""

    model_name_or_path: str = field(
        metadata={"help": "Folder or hub name of a model of this library, an original MDLM, or a Lightning .ckpt."}
    )


def load_model(name: str) -> PreTrainedModel:
    """A model of this library, or an original MDLM checkpoint."""
    if Path(name).suffix == ".ckpt":
        return load_mdlm(name)
    config = json.loads(Path(cached_file(name, "config.json")).read_text())
    return load_mdlm(name) if config.get("model_type") == "mdlm" else AutoModel.from_pretrained(name)


def train_and_export(trainer: Trainer) -> dict[str, float]:
    """Train from the last checkpoint, if there is one; evaluate, export, push with `--push_to_hub`.

    Returns:
        `dict[str, float]` of the exported weights' metrics.
    """
    last = trainer.args.resume_from_checkpoint or last_checkpoint(trainer.args.output_dir)
    trained = trainer.train(resume_from_checkpoint=last).metrics
    if trained["train_steps_per_second"] > 0:  # else an earlier run was cut off after its last step
        trainer.save_metrics("train", trained)
    metrics = trainer.evaluate()
    trainer.save_metrics("eval", metrics)
    trainer.save_model()
    return metrics


def train_with_before_and_after(trainer: Trainer) -> dict[str, float]:
    """[`train_and_export`], with validation perplexity before and after printed and saved beside the model."""
    before = trainer.evaluate(metric_key_prefix="before")
    trainer.save_metrics("before", before)
    metrics = train_and_export(trainer)
    if trainer.is_world_process_zero():
        print(
            f"validation perplexity: before {before['before_perplexity']:.2f}, after {metrics['eval_perplexity']:.2f}"
        )
        print(f"exported to {trainer.args.output_dir}")
    return before | metrics


def post_train(
    trainer_class: type[MGMTrainer], config_class: type[MGMTrainingConfig], description: str, argv: list[str] | None
) -> dict[str, float]:
    """A recipe that goes on from a model with another trainer; returns the metrics before and after."""
    types = (StartArguments, LoraArguments, DataArguments, config_class)
    start, lora, data, args = parse_arguments(types, description, argv)
    model = load_model(start.model_name_or_path)
    with args.main_process_first(desc="data"):
        tokenizer = load_tokenizer(data, start.model_name_or_path)
        train_blocks, eval_blocks = load_blocks(data, tokenizer, model.config.max_position_embeddings)
    args.data_description = args.data_description or data.description
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=train_blocks,
        eval_dataset=eval_blocks,
        processing_class=tokenizer,
        peft_config=lora_config(lora),
    )
    return train_with_before_and_after(trainer)
