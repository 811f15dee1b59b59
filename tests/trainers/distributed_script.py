# SPDX-License-Identifier: Apache-2.0
"""One rank of the runs that `test_distributed.py` compares with the same runs in one process.

accelerate launch --config_file recipes/accelerate/zero2.yaml --num_processes 2 \
    --module tests.trainers.distributed_script FOLDER
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch import nn

from fpmgm.trainers import ConsistencyTrainer, ConversionTrainer, MGMTrainer, SDTTTrainer
from fpmgm.trainers.shards import part_of

from ..testing_utils import CHECKPOINTING
from .training_utils import make_trainer, record_calls, token_rows, training_model, weights


STEPS = 4
EVALUATION_SETS = {"even": (16, False), "ragged": (16, True), "uneven": (10, False)}  # rows, of unequal length?
PLAIN = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}  # Adam and clipping would hide a wrong scale
ADAM = {"optim": "adamw_torch", "learning_rate": 5e-3, "lr_scheduler_type": "linear", "ema_decay": 0.5}


def build(folder: Path, ranks: int, model: nn.Module | None = None, **arguments) -> MGMTrainer:
    """A trainer of four optimizer steps of 8 ragged rows, whatever the number of ranks.

    20 rows: the epoch's last step is shorter than the others, and the fourth lies in the second epoch.
    """
    trainer = make_trainer(
        folder, model, max_steps=STEPS, per_device_train_batch_size=2, gradient_accumulation_steps=4 // ranks,
        train_dataset=token_rows(20, ragged=True), per_device_eval_batch_size=8 // ranks, save_strategy="steps",
        **{"save_steps": 1, **arguments},
    )  # fmt: skip
    if trainer.is_deepspeed_enabled:  # split weights as small as these, too
        zero = trainer.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        zero["stage3_param_persistence_threshold"] = 100
    return trainer


def losses(trainer: MGMTrainer) -> list[dict]:
    """The log's lines of the optimizer steps."""
    return [line for line in trainer.state.log_history if "loss" in line]


def plain(folder: Path, ranks: int) -> dict:
    """Gradient descent, with several ranks some iterations run again; what the run saw and reached."""
    model = training_model()
    calls = record_calls(model)
    trainer = build(folder, ranks, model, num_kept_iterations=None if ranks == 1 else 2, **PLAIN)
    trainer.train()
    trainer.save_model(str(folder / "exported"))
    return {
        "evaluations": {
            name: trainer.evaluate(token_rows(*rows, seed=1))["eval_loss"] for name, rows in EVALUATION_SETS.items()
        }
        | {"stream": trainer.evaluate(token_rows(11, seed=1).to_iterable_dataset())["eval_loss"]},
        "logs": losses(trainer),
        "times": [kwargs["timesteps"].tolist() for kwargs, _ in calls],
        "iterations": [[kwargs["num_no_grad_iterations"], kwargs["num_iterations"]] for kwargs, _ in calls],
    }


POST_TRAINING = {
    "consistency": {
        "trainer_class": ConsistencyTrainer, "consistency_warmup_steps": 2,
        "consistency_loss": "projected_cosine", "teacher": "ema", "consistency_weight": 1.0, "ema_decay": 0.5,
    },
    "conversion": {
        "trainer_class": ConversionTrainer, "distillation_warmup_steps": 2,
        "distillation_weight": 10.0, "teacher": lambda: training_model(1, num_fixed_point_layers=0),
    },
    "sdtt": {
        "trainer_class": SDTTTrainer, "rounds": 2, "steps_per_round": 2,
        "first_step_size": 0.2, "ema_decay": 0.5,
    },
}  # fmt: skip


def post_train(folder: Path, ranks: int, name: str, **arguments) -> dict:
    """Three optimizer steps of 8 ragged rows and of the 4 that are left, by one of `POST_TRAINING`."""
    options = {key: value() if key == "teacher" and callable(value) else value
               for key, value in POST_TRAINING[name].items()}  # fmt: skip
    trainer = make_trainer(
        folder, max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=4 // ranks,
        train_dataset=token_rows(20, ragged=True), optim="sgd", learning_rate=0.1, max_grad_norm=0.0, **options,
        **arguments,
    )  # fmt: skip
    trainer.train()
    distances = [line.get("consistency", line.get("divergence")) for line in trainer.state.log_history[:3]]
    return {"weights": weights(trainer.model), "distances": distances}


def adam(folder: Path, ranks: int, resume_from: Path | None = None) -> dict:
    """AdamW with recomputed activations, evaluated in between; the share of weights and state that this rank holds."""
    trainer = build(
        folder, ranks, eval_strategy="steps", eval_steps=1, eval_dataset=token_rows(6),
        **{CHECKPOINTING: True}, **ADAM,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    total = sum(p.numel() for p in training_model().parameters())
    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):  # accelerate's and DeepSpeed's wrappers
        optimizer = optimizer.optimizer
    moments = [part_of(state["exp_avg"]).numel() for state in optimizer.state.values()]
    return {
        "logs": losses(trainer),
        "evaluations": [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line],
        "held": {
            "weights": sum(part_of(p).numel() for p in trainer.model.parameters()) / total,
            "average": sum(part.numel() for part in trainer.ema.shadow.values()) / total,
            "optimizer": sum(moments) / total,
        },
    }


def bf16(folder: Path, ranks: int) -> dict:
    """The same run in bfloat16."""
    trainer = build(folder, ranks, bf16=True, **ADAM)
    trainer.train()
    return {"logs": losses(trainer)}


def fail(folder: Path, ranks: int, broken: bool) -> str:
    """The message with which `plain` ends if its loss is not finite in the second step, on `broken` ranks only."""
    model = training_model()

    def poison(module, args, output):
        return output * float("nan") if broken and trainer.state.global_step == 1 else output

    model.final_norm.register_forward_hook(poison)
    trainer = build(folder, ranks, model, **{**PLAIN, "save_steps": STEPS})
    try:
        trainer.train()
    except FloatingPointError as error:
        return str(error)
    return "no error"


def engine() -> str:
    """The engine that runs this process, as far as its quirks matter here."""
    asked = {"deepspeed": "ACCELERATE_USE_DEEPSPEED", "fsdp": "ACCELERATE_USE_FSDP"}
    return next((name for name, variable in asked.items() if os.environ.get(variable) == "true"), "ddp")


def adapt_engines_to_cpus() -> None:
    """DeepSpeed must not compile a faster exchange between CPUs first; accelerate must not refuse FSDP there."""
    if engine() == "deepspeed":
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if engine() == "fsdp":
        create_accelerator = MGMTrainer.create_accelerator_and_postprocess

        def create(self):
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU  # any but MULTI_CPU
            create_accelerator(self)

        MGMTrainer.create_accelerator_and_postprocess = create


def main() -> None:
    folder, rank, ranks = Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    adapt_engines_to_cpus()
    result = {
        "plain": plain(folder / "plain", ranks),
        "adam": adam(folder / "adam", ranks),
        "resumed": adam(folder / "resumed", ranks, folder / "adam/checkpoint-2"),
        "bf16": bf16(folder / "bf16", ranks),
        "failure": fail(folder / "failure", ranks, broken=rank == 1),
    }
    if engine() == "ddp":
        for name in POST_TRAINING:
            run = post_train(folder / name, ranks, name)
            save_file(run["weights"], folder / f"{name}-{rank}.safetensors")
            result[name] = run["distances"]
    (folder / f"result-{rank}.json").write_text(json.dumps(result))
    torch.distributed.barrier()
    os._exit(0)  # the engines' threads need not survive the interpreter's end


if __name__ == "__main__":
    main()
