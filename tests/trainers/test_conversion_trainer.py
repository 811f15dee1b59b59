# SPDX-License-Identifier: Apache-2.0
"""Adaptation to a frozen teacher against formulas written out here."""

from functools import partial

import pytest
import torch
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fpmgm import convert_to_fixed_point
from fpmgm.models import head
from fpmgm.trainers import ConversionTrainer, SDTTTrainer
from fpmgm.trainers.distillation import warmed_up

from ..testing_utils import refused
from .reference import (
    assert_gradient,
    corrupt,
    cross_entropy,
    divergence,
    kind_of,
    mean_of_means,
    of_student,
    of_teacher,
    recorded,
    with_weights,
)
from .training_utils import LENGTH, MASK, make_trainer, token_rows, training_model, weights


EXPLICIT = {"num_pre_layers": 4, "num_fixed_point_layers": 0, "num_post_layers": 0}
LAYERS = {"pre": [1], "fixed_point": [2], "post": [4]}


def conversion_trainer(folder, model=None, *, teacher, **arguments) -> ConversionTrainer:
    defaults = {"distillation_warmup_steps": 1, "distillation_weight": 1.0, "teacher": teacher}
    return make_trainer(folder, model, ConversionTrainer, **{**defaults, **arguments})


# Options, what changes the student and the teacher, sequences in a micro-batch.
LOSSES = {
    "explicit_teacher": ({}, {}, EXPLICIT, 2),
    "fixed_point_teacher": ({"distillation_temperature": 0.7}, {}, {"num_fixed_point_iterations": 3}, 4),
    "in_time": (
        {"gap_range": [0.2, 0.4], "loss_weighting": "uniform"},
        {"time_conditioning": True}, {**EXPLICIT, "time_conditioning": True}, 1,
    ),
    "explicit_student": ({"distillation_temperature": 1.0}, EXPLICIT, EXPLICIT, 2),
    "images": ({}, {"class_dropout": 0.4, "dropout": 0.0}, EXPLICIT, 2),
    "images_from_fixed_point": ({"distillation_temperature": 0.7}, {"num_post_layers": 0}, {}, 1),
    "prompted": ({}, {}, EXPLICIT, 2),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_are_those_of_the_formula(tmp_path, name):
    options, of_model, of_its_teacher, batch = LOSSES[name]
    kind = kind_of(name)
    model, teacher = kind.model(0, **of_model).double(), kind.model(1, 0.2, **of_its_teacher).double()
    trainer, steps = recorded(
        partial(conversion_trainer, teacher=teacher), tmp_path, kind, model, batch, distillation_warmup_steps=3,
        distillation_weight=6.0, **options,
    )  # fmt: skip
    tau = options.get("distillation_temperature", 1.5)
    for k, step in enumerate(steps):
        student = with_weights(model, step.weights)
        noisy = corrupt(step, k, options.get("gap_range", (0.05, 0.3)), kind)
        targets, beliefs = of_teacher(teacher, noisy), of_student(student, noisy, step)
        distance = tau**2 * mean_of_means(
            [divergence(t.logits, b.logits, tau) for b, t in zip(beliefs, targets, strict=True)], noisy
        )
        base = cross_entropy(beliefs, noisy, 2.0 if "loss_weighting" in options else None)
        loss = base + 6.0 * (k + 1) / 3 * distance
        assert_gradient(student, loss, step.gradient)
        line = trainer.state.log_history[k]
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert line["divergence"] == pytest.approx(distance.item(), rel=1e-5)


def test_the_weight_grows_linearly_and_stays():
    found = [warmed_up(0.1, step, 4) for step in range(7)]
    assert found == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1, 0.1])


class LargestTensor(TorchDispatchMode):
    """The largest tensor that an operation makes, in elements; weights are left out."""

    def __init__(self, model):
        super().__init__()
        shapes = [p.shape for p in model.parameters()]
        self.known, self.elements = {*shapes, *(s[::-1] for s in shapes), *((s.numel(),) for s in shapes)}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if torch.is_tensor(x) and x.shape not in self.known]
        self.elements = max([self.elements, *sizes])
        return result


def test_a_step_never_holds_all_logits_of_either_model(tmp_path, monkeypatch):
    vocabulary, rows, batch = 1500, 8, 4
    sizes = {"vocab_size": vocabulary, "mask_token_id": vocabulary - 1}
    monkeypatch.setattr(head, "chunk_rows", lambda *_: rows)
    teacher = training_model(1, **sizes, **EXPLICIT)
    trainer = conversion_trainer(tmp_path, convert_to_fixed_point(teacher, LAYERS), teacher=teacher, max_steps=2)
    with LargestTensor(trainer.model) as largest:
        trainer.train()
    assert largest.elements == rows * vocabulary  # the mode sees what is made in the head
    assert rows * vocabulary < batch * LENGTH * vocabulary / 4  # about half of all positions are masked


def test_the_teacher_is_left_as_it_is_but_for_its_dropout(tmp_path):
    teacher, calls = training_model(1, dropout=0.3, **EXPLICIT).train(), []
    before = weights(teacher)
    teacher.register_forward_hook(lambda module, args, output: calls.append((module.training, output)))
    student = convert_to_fixed_point(teacher, LAYERS)
    start = weights(student)
    conversion_trainer(tmp_path, student, teacher=teacher.train(), learning_rate=0.1).train()
    assert [training for training, _ in calls] == [False] * 3
    assert all(output.logits is None and not output.last_hidden_state.requires_grad for _, output in calls)
    assert not teacher.training  # from the start: no flag changes while others may use it
    assert all(torch.equal(parameter, before[name]) for name, parameter in teacher.named_parameters())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in teacher.parameters())
    assert [name for name, old in start.items() if torch.equal(student.get_parameter(name), old)] == []


@pytest.mark.parametrize("kind", [ConversionTrainer, SDTTTrainer])
def test_under_bf16_a_teacher_runs_in_bf16_too(tmp_path, kind):
    teacher, types = training_model(1, **EXPLICIT), []
    trainer = make_trainer(tmp_path, training_model(2, **EXPLICIT), kind, teacher=teacher, bf16=True, max_steps=1)
    teacher.pre_layers[0].up_proj.register_forward_hook(lambda module, args, output: types.append(output.dtype))
    trainer.train()
    assert set(types) == {torch.bfloat16} and teacher.dtype == torch.float32


def test_adapters_alone_learn_from_the_teacher(tmp_path):
    teacher, rows = training_model(1, 0.2, **EXPLICIT), token_rows(8)
    student = convert_to_fixed_point(teacher, LAYERS)
    trainer = conversion_trainer(
        tmp_path, student, teacher=teacher, peft_config=LoraConfig(r=4), max_steps=30, distillation_weight=30.0,
        train_dataset=rows, logging_steps=30,
    )  # fmt: skip
    masked = torch.rand(8, LENGTH) < 0.6
    noisy = torch.tensor(rows["input_ids"]).masked_fill(masked, MASK)

    @torch.no_grad()
    def distance() -> float:
        target, logits = (model.eval()(noisy).logits[masked][:, :MASK] for model in (teacher, trainer.model))
        return divergence(target, logits).mean().item()

    start, before = distance(), weights(trainer.model)
    trainer.train()
    changed = {name for name, old in before.items() if not torch.equal(old, trainer.model.get_parameter(name))}
    assert changed == {name for name in before if "lora_" in name}
    assert distance() < 0.75 * start


def test_a_teacher_that_is_split_over_processes_is_refused(tmp_path):
    teacher = training_model()
    teacher.post_layers[0].up_proj.weight.data = torch.empty(0)
    refused("`teacher` was split", conversion_trainer, tmp_path, teacher=teacher)
