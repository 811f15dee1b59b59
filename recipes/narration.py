# SPDX-License-Identifier: Apache-2.0
"""What training recipes say of their work: what is trained on what, from where, where it goes, what comes next."""

import shlex
from pathlib import Path

from accelerate import PartialState
from transformers import Trainer

from fpmgm.evaluation import plus_minus
from fpmgm.trainers import ConsistencyTrainer, ConversionTrainer, SDTTTrainer


CONFIGS = Path(__file__).parent / "configs"
AFTER_TRAINING = {  # whether the model has fixed-point layers → recipe, its YAML and its trainer
    True: {"posttrain_consistency": ("consistency", ConsistencyTrainer)},
    False: {"convert_mdlm": ("convert", ConversionTrainer), "distill_sdtt": ("sdtt", SDTTTrainer)},
}


def say(line: str) -> None:
    """Print on the main process."""
    if PartialState().is_main_process:
        print(line, flush=True)


def say_what_is_trained(trainer: Trainer, checkpoint: str | None) -> None:
    """Model, rows, steps, and where the run begins."""
    model, args = trainer.accelerator.unwrap_model(trainer.model), trainer.args
    config = model.config
    layers = [f"{getattr(config, f'num_{name}_layers')} {name}" for name in ("pre", "fixed_point", "post")]
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    of_them = "" if trained == total else f", {trained:,} of them trained"
    say(f"model: {', '.join(layers).replace('_', '-')} blocks; {total:,} parameters{of_them}")
    rows = (trainer.train_dataset, trainer.eval_dataset)
    train, validation = (f"{len(some):,} rows" if hasattr(some, "__len__") else "a stream of rows" for some in rows)
    length = f"{'at most ' * has_prompts(trainer)}{config.max_position_embeddings:,}"
    say(f"data: {train} of {length} tokens to train on, {validation} to validate on")
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    where = "from its beginning" if checkpoint is None else f"resuming from {checkpoint}"
    planned = f"{args.max_steps:,} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs in steps"
    say(f"run: {planned} of {batch:,} rows in {args.output_dir}, {where}")


def has_prompts(trainer: Trainer) -> bool:
    """Whether the rows to train on say which of their tokens are a completion."""
    return "completion_mask" in (getattr(trainer.train_dataset, "column_names", None) or ())


def say_what_came_of_it(trainer: Trainer, metrics: dict[str, float], data: list[str]) -> None:
    """Where the model is, how good it is (and was before), and the next commands, which take `data`, options of the
    recipes."""
    folder, config = trainer.args.output_dir, trainer.accelerator.unwrap_model(trainer.model).config
    shown = {
        key: plus_minus(metrics[f"{key}_perplexity"], metrics[f"{key}_perplexity_stderr"])
        for key in ("before", "eval")
        if f"{key}_perplexity_stderr" in metrics
    }
    result = f"validation loss {metrics['eval_loss']:.4f}"
    if "before" in shown:
        result = f"validation perplexity before {shown['before']}, after {shown['eval']}"
    elif shown:
        result = f"validation perplexity {shown['eval']}"
    say(f"exported to {folder}: {result}")
    if has_prompts(trainer):
        length = str(trainer.args.completion_multiple)
        words = ["--prompt", "...", "--max_new_tokens", length, "--stop_at_eos", "True"]
        say(f"next:\n    {shlex.join(['python', 'recipes/sample.py', '--model', folder, *words])}")
        return
    commands = [] if config.model_type == "fpmaskgit" else [["recipes/sample.py", "--model", folder]]
    for recipe, (name, trainer_class) in AFTER_TRAINING[config.num_fixed_point_layers > 0].items():
        if isinstance(trainer, trainer_class):  # this is what was just done
            continue
        kind = Path(folder).name.split("_")[-1]
        path = CONFIGS / f"{name}_{kind}.yaml"
        path = path if path.is_file() else CONFIGS / f"{name}_small.yaml"
        options = ["--config", f"recipes/configs/{path.name}", "--model_name_or_path", folder, *data]
        commands.append([f"recipes/{recipe}.py", *options])
    if commands:
        say("\n    ".join(["next:", *(shlex.join(["python", *words]) for words in commands)]))
