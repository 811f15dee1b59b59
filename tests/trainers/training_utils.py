# SPDX-License-Identifier: Apache-2.0
"""A tiny model, data and trainer that the trainers' tests share."""

import gc
from dataclasses import fields
from pathlib import Path

import torch
from datasets import Dataset
from torch import nn
from transformers import TrainerCallback

from fpmgm import FPMDLMForMaskedDiffusion
from fpmgm.trainers import ConsistencyTrainer, MGMTrainer

from ..testing_utils import tiny_model


gc.freeze()  # `Trainer.train` begins with a collection, which would go through all that the imports brought

LENGTH, VOCABULARY, MASK = 16, 20, 19


def training_model(seed: int = 0, scale: float = 0.1, **overrides) -> FPMDLMForMaskedDiffusion:
    """A model for sequences of up to 16 tokens; weights small enough for the solver to stay tame in float32."""
    sizes = {"vocab_size": VOCABULARY, "mask_token_id": MASK, "max_position_embeddings": LENGTH}
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # for what a fresh model draws: two calls give equal weights
        return tiny_model(seed, scale, **{**sizes, **overrides})


def token_rows(count: int, ragged: bool = False, seed: int = 0) -> Dataset:
    """Random rows, of 16 tokens or of 5 to 16."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [int(torch.randint(5, LENGTH + 1, (), generator=generator)) if ragged else LENGTH for _ in range(count)]
    return Dataset.from_dict(
        {"input_ids": [torch.randint(0, MASK, (n,), generator=generator).tolist() for n in lengths]}
    )


def image_rows(count: int, seed: int = 0) -> Dataset:
    """Random images for `tiny_image_config`: 3 × 3 of 7 codes, the 3 classes in turn."""
    codes = torch.randint(7, (count, 9), generator=torch.Generator().manual_seed(seed))
    return Dataset.from_dict({"input_ids": codes.tolist(), "class_labels": [i % 3 for i in range(count)]})


def make_trainer(
    folder: Path | str,
    model: nn.Module | None = None,
    trainer_class: type[MGMTrainer] = MGMTrainer,
    **arguments,
) -> MGMTrainer:
    """A trainer that logs every step, evaluates one draw and saves nothing; `arguments` of it and its configuration
    mixed."""
    defaults = {
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "logging_steps": 1,
        "eval_num_draws": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    of_config = {f.name for f in fields(trainer_class.config_class)} & arguments.keys()
    of_config = {name: arguments.pop(name) for name in of_config}
    return trainer_class(
        model=training_model() if model is None else model,
        args=trainer_class.config_class(output_dir=str(folder), **{**defaults, **of_config}),
        **{"train_dataset": token_rows(24), **arguments},
    )


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_equal(actual: dict, expected: dict) -> None:
    """Assert that tensors of the same names are the same, bit for bit."""
    assert actual.keys() == expected.keys()
    assert [name for name in actual if not torch.equal(actual[name], expected[name])] == []


def assert_close(actual: dict, expected: dict, tolerance: float = 1e-6) -> None:
    """Assert that tensors of the same names differ by at most `tolerance` anywhere."""
    assert actual.keys() == expected.keys()
    worst = {name: (actual[name].double() - expected[name].double()).abs().max().item() for name in actual}
    assert {name: x for name, x in worst.items() if not x <= tolerance} == {}


def losses(trainer: MGMTrainer) -> list[float]:
    """The training loss of each log line."""
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def record_calls(model: nn.Module) -> list[tuple[dict, object]]:
    """A list that grows by (keyword arguments, output) with each training call of `model`."""
    calls = []

    def hook(module, args, kwargs, output):
        if module.training:
            calls.append((kwargs, output))

    model.register_forward_hook(hook, with_kwargs=True)
    return calls


class PlannedTrainer(ConsistencyTrainer):
    """Its evaluations give the perplexities `planned` by step."""

    planned: dict[int, float] = {}

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics[f"{metric_key_prefix}_perplexity"] = self.planned[self.state.global_step]
        return output


class RecordWeights(TrainerCallback):
    """Keeps the weights before training and after each optimizer step."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.history = [weights(model)]

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.history.append(weights(model))


class CallOnce(TrainerCallback):
    """Runs `function(model)` just before optimizer step `step`."""

    def __init__(self, step, function):
        self.step, self.function = step, function

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            self.function(model)
