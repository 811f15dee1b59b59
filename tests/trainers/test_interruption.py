# SPDX-License-Identifier: Apache-2.0
"""What a run carries from step to step beside its weights: it resumes with all of it, its history included."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import EarlyStoppingCallback, TrainerCallback

from fpmgm.trainers import ConsistencyTrainer, ConversionTrainer, ImageTokenizerTrainer, SDTTTrainer

from .same_run import contents, differences
from .test_image_tokenizer_trainer import tokenizer_trainer
from .training_utils import CallOnce, PlannedTrainer, make_trainer, token_rows, training_model


EXPLICIT = {"num_pre_layers": 4, "num_fixed_point_layers": 0, "num_post_layers": 0}
SAVED = {"save_strategy": "steps", "logging_steps": 3, "eval_dataset": token_rows(4, seed=1)}
BEST = {"load_best_model_at_end": True, "metric_for_best_model": "perplexity"}


def consistency(folder, planned=None, **options):
    options = {"eval_steps": 1, "ema_decay": 0.5, **SAVED, **options}
    kind = ConsistencyTrainer if planned is None else PlannedTrainer
    trainer = make_trainer(folder, training_model(dropout=0.1), kind, **options)
    trainer.planned = planned
    return trainer


def text(folder, **options):
    return make_trainer(folder, training_model(dropout=0.1), ema_decay=0.5, **{**SAVED, **options})


def early(folder, planned, **options):
    patient = [EarlyStoppingCallback(early_stopping_patience=2)]
    rule = {"stop_at_perplexity_increase": None, "callbacks": patient, **BEST}
    return consistency(folder, planned, **{**rule, **options})


def conversion(folder, **options):
    options = {"teacher": training_model(7, **EXPLICIT), "distillation_warmup_steps": 3, **SAVED, **options}
    return make_trainer(folder, training_model(dropout=0.1), ConversionTrainer, **options)


def sdtt(folder, **options):
    options = {"ema_decay": 0.5, "rounds": 3, "steps_per_round": 2, "first_step_size": 0.1, **SAVED, **options}
    return make_trainer(folder, training_model(0, 0.3, dropout=0.1), SDTTTrainer, **options)


class Noisy(list):
    """Rows that draw a random number each time, as augmentations do."""

    def __getitem__(self, index):
        torch.rand(())
        return super().__getitem__(index)


def pictures(folder, **options):
    trainer = tokenizer_trainer(folder, **options)
    trainer.eval_dataset = Noisy(trainer.eval_dataset)
    return trainer


def resumed(make, folder: Path, step: int, **options) -> tuple[dict, dict]:
    """What the uninterrupted run's last checkpoint holds, and what that of a run from its checkpoint `step` holds."""
    straight = make(folder / "straight", **options)
    straight.train()
    last = straight.last_saved[1].name
    shutil.copytree(folder / f"straight/checkpoint-{step}", folder / f"again/checkpoint-{step}")
    best = f"checkpoint-{straight.state.best_global_step}"
    if (folder / "straight" / best).is_dir() and not (folder / "again" / best).exists():
        shutil.copytree(folder / "straight" / best, folder / "again" / best)
    again = make(folder / "again", **options)
    with torch.no_grad():
        for parameter in again.model.parameters():
            parameter.add_(parameter.requires_grad)  # the checkpoint's take their place
    again.train(resume_from_checkpoint=str(folder / f"again/checkpoint-{step}"))
    return contents(folder / "straight" / last), contents(folder / "again" / last)


PLANS = {
    "a learned projection": (
        consistency,
        {
            "max_steps": 4, "save_steps": 2, "consistency_loss": "projected_cosine", "teacher": "ema",
            "consistency_warmup_steps": 3, "stop_at_perplexity_increase": None,
        },
        2,
    ),
    "conversion": (conversion, {"max_steps": 6, "save_steps": 2}, 2),
    "rounds, at a boundary": (sdtt, {"max_steps": 6, "save_steps": 2}, 2),
    "rounds, within the second": (sdtt, {"max_steps": 6, "save_steps": 3}, 3),
    "rounds of an adapter": (sdtt, {"max_steps": 6, "save_steps": 3, "peft_config": LoraConfig(r=2)}, 3),
    "a teacher of its own": (
        sdtt, {"max_steps": 2, "save_steps": 1, "logging_steps": 1, "teacher": training_model(7, **EXPLICIT)}, 1,
    ),
    "adapter": (text, {"max_steps": 6, "save_steps": 3, "peft_config": LoraConfig(r=4)}, 3),
    "its rule": (consistency, {"max_steps": 9, "save_steps": 2, "planned": {0: 9, 1: 8, 2: 9, 3: 10, 4: 99}}, 2),
    "early stopping": (early, {"max_steps": 9, "save_steps": 1, "planned": {0: 1, 1: 5, 2: 4, 3: 6, 4: 6, 5: 1}}, 3),
    "lower rates on a plateau": (
        text,
        {
            "max_steps": 8, "save_steps": 4, "lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps",
            "eval_steps": 1, "lr_scheduler_kwargs": {"patience": 1, "threshold": 10.0}, **BEST,
        },
        4,
    ),
    "epochs": (
        text,
        {
            "max_steps": 18, "save_steps": 6, "eval_strategy": "epoch", "logging_strategy": "epoch",
            "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2,
        },
        12,
    ),
    "means": (text, {"max_steps": 9, "save_steps": 5, "gradient_accumulation_steps": 2}, 5),
    "image tokenizer": (
        pictures,
        {
            # The restart at step 6 sees uses and latents from before the checkpoint.
            "max_steps": 8, "save_steps": 2, "save_strategy": "steps", "eval_strategy": "steps", "eval_steps": 3,
            "mirror": True, "restart_every": 3, "gradient_accumulation_steps": 2,
        },
        4,
    ),
}  # fmt: skip


def rates(run: dict) -> list[float]:
    return [line["learning_rate"] for line in run["lines"] if "learning_rate" in line]


SHOWN = {  # what a plan is there for
    "its rule": lambda run: run["state"]["global_step"] == 4,
    "early stopping": lambda run: (run["state"]["global_step"], run["state"]["best_global_step"]) == (4, 2),
    "lower rates on a plateau": lambda run: rates(run)[0] > rates(run)[-1],
    "a learned projection": lambda run: (run["consistency_projection"]["weight"] - torch.eye(16)).abs().max() > 1e-3,
    "rounds, at a boundary": lambda run: "teacher" in run,
}


@pytest.mark.parametrize("name", PLANS)
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, name):
    make, options, step = PLANS[name]
    straight, again = resumed(make, tmp_path, step, **options)
    assert straight["state"]["global_step"] > step and len(straight["lines"]) > 1
    assert differences(again, straight) == []
    assert name not in SHOWN or SHOWN[name](straight)


def test_a_run_that_a_rule_has_stopped_stays_stopped_unless_options_change(tmp_path):
    planned = {0: 9, 1: 99, 2: 1, 3: 1}
    consistency(tmp_path, planned, save_steps=9, max_steps=9).train()
    again = consistency(tmp_path, planned, save_steps=9, max_steps=9)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 1
    on = consistency(tmp_path, planned, save_steps=9, max_steps=3, stop_at_perplexity_increase=None)
    on.train(resume_from_checkpoint=True)
    assert on.state.global_step == 3


class Signal(TrainerCallback):
    """SIGTERM before the end of step `step`."""

    def __init__(self, step: int):
        self.step = step

    def on_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("step", [4, 6], ids=["within an epoch", "at its end"])
def test_a_signal_saves_a_step_from_which_the_same_run_goes_on(tmp_path, step):
    options = {"max_steps": 8, "save_steps": 8, "eval_strategy": "steps", "eval_steps": 2}

    def trainer(folder, **more):
        made = text(folder, **options, **more)
        made.train(resume_from_checkpoint=(folder / f"checkpoint-{step}").is_dir())
        return made

    trainer(tmp_path / "straight")
    handler = signal.getsignal(signal.SIGTERM)
    made = text(tmp_path / "cut", **options, enable_jit_checkpoint=True, callbacks=[Signal(step)])
    manager = next(c.jit_manager for c in made.callback_handler.callbacks if hasattr(c, "jit_manager"))
    manager._sigterm_handler = None
    signal.signal(signal.SIGTERM, lambda *args: manager._enable_checkpoint())  # without three seconds of waiting
    made.train()
    assert signal.getsignal(signal.SIGTERM) == handler
    assert made.state.global_step == step and [path.name for path in (tmp_path / "cut").iterdir()] == [
        f"checkpoint-{step}"
    ]
    trainer(tmp_path / "cut", enable_jit_checkpoint=False)
    straight, cut = (contents(tmp_path / name / "checkpoint-8") for name in ("straight", "cut"))
    assert differences(cut, straight) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_run_that_a_bad_loss_has_stopped_goes_on_as_the_uninterrupted_one(tmp_path, value):
    def poison(model):
        model.final_norm.register_forward_hook(lambda module, args, output: output * value)

    options = {"max_steps": 6, "save_steps": 6}
    text(tmp_path / "straight", **options).train()
    with pytest.raises(FloatingPointError, match="Step 4 is saved"):
        text(tmp_path / "cut", **options, callbacks=[CallOnce(5, poison)]).train()
    text(tmp_path / "cut", **options).train(resume_from_checkpoint=True)
    straight, cut = (contents(tmp_path / name / "checkpoint-6") for name in ("straight", "cut"))
    assert differences(cut, straight) == []


def test_a_trainer_that_failed_goes_on_in_its_process_without_what_failed(tmp_path):
    straight = text(tmp_path / "straight", max_steps=6, save_steps=2, logging_steps=4)
    straight.train()

    class Fail(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 3:
                trainer.remove_callback(Fail)
                raise RuntimeError("cut off")

    trainer = text(tmp_path / "cut", max_steps=6, save_steps=2, logging_steps=4, callbacks=[Fail()])
    with pytest.raises(RuntimeError, match="cut off"):
        trainer.train()
    trainer.train(resume_from_checkpoint=True)
    expected, cut = (contents(tmp_path / name / "checkpoint-6") for name in ("straight", "cut"))
    assert differences(cut, expected) == []
    assert isinstance(trainer, type(straight)) and not isinstance(trainer, ImageTokenizerTrainer)
    assert torch.isfinite(torch.tensor(trainer.state.log_history[-1]["train_loss"]))
