# SPDX-License-Identifier: Apache-2.0
"""One rank of the run that `test_distributed.py` compares with a run in one process.

python -m torch.distributed.run --nproc_per_node 2 --module tests.trainers.distributed_script FOLDER
"""

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from fpmgm.trainers import (
    ConsistencyConfig,
    ConsistencyTrainer,
    ConversionConfig,
    ConversionTrainer,
    SDTTConfig,
    SDTTTrainer,
)

from .training_utils import make_trainer, record_calls, token_rows, training_model, weights


STEPS = 4
EVALUATION_SETS = {"even": (16, False), "ragged": (16, True), "uneven": (10, False)}  # rows, of unequal length?


def train(folder: Path, ranks: int, **arguments) -> dict:
    """Four optimizer steps of 8 ragged rows, whatever the number of ranks; what the run saw and reached.

    20 rows: the epoch's last step is shorter than the others, and the fourth lies in the second epoch.
    """
    model = training_model()
    calls = record_calls(model)
    trainer = make_trainer(
        folder, model, max_steps=STEPS, per_device_train_batch_size=2, gradient_accumulation_steps=4 // ranks,
        train_dataset=token_rows(20, ragged=True), per_device_eval_batch_size=8 // ranks, optim="sgd",
        learning_rate=0.1, max_grad_norm=0.0, **arguments,
    )  # fmt: skip
    trainer.train()
    return {
        "weights": weights(model),
        "average": trainer.ema.shadow,
        "evaluations": {
            name: trainer.evaluate(token_rows(*rows, seed=1))["eval_loss"] for name, rows in EVALUATION_SETS.items()
        },
        "logs": [line for line in trainer.state.log_history if "loss" in line],
        "times": [kwargs["timesteps"].tolist() for kwargs, _ in calls],
        "iterations": [[kwargs["num_no_grad_iterations"], kwargs["num_iterations"]] for kwargs, _ in calls],
    }


POST_TRAINING = {
    "consistency": {
        "trainer_class": ConsistencyTrainer, "config_class": ConsistencyConfig, "consistency_warmup_steps": 2,
        "consistency_loss": "projected_cosine", "teacher": "ema", "consistency_weight": 1.0, "ema_decay": 0.5,
    },
    "conversion": {
        "trainer_class": ConversionTrainer, "config_class": ConversionConfig, "distillation_warmup_steps": 2,
        "distillation_weight": 10.0, "teacher": lambda: training_model(1, num_fixed_point_layers=0),
    },
    "sdtt": {
        "trainer_class": SDTTTrainer, "config_class": SDTTConfig, "rounds": 2, "steps_per_round": 2,
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


def fail(folder: Path, broken: bool, **arguments) -> str:
    """The message with which a run ends whose loss is not finite from the second step on, on `broken` ranks only."""
    model, calls = training_model(), []

    def poison(module, args, output):
        calls.append(1)
        return output * float("nan") if broken and len(calls) == 2 else output

    model.final_norm.register_forward_hook(poison)
    try:
        make_trainer(folder, model, **arguments).train()
    except FloatingPointError as error:
        return str(error)
    return "no error"


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    arguments = {"ddp_backend": "gloo"}
    result = train(folder / "run", int(os.environ["WORLD_SIZE"]), **arguments)
    for name in ("weights", "average"):
        save_file(result.pop(name), folder / f"{name}-{rank}.safetensors")
    for name in POST_TRAINING:
        run = post_train(folder / name, int(os.environ["WORLD_SIZE"]), name, **arguments)
        save_file(run["weights"], folder / f"{name}-{rank}.safetensors")
        result[name] = run["distances"]
    result["failure"] = fail(folder / "failure", broken=rank == 1, **arguments)
    (folder / f"result-{rank}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
