# SPDX-License-Identifier: Apache-2.0
"""Consistency post-training against formulas written out here, and its stopping rule."""

import logging

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModel

from fpmgm.trainers import ConsistencyConfig, ConsistencyTrainer

from .reference import (
    TEXT,
    assert_gradient,
    averages,
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
from .training_utils import PlannedTrainer, make_trainer, token_rows, training_model, weights


EXPLICIT = {"num_pre_layers": 2, "num_fixed_point_layers": 0, "num_post_layers": 1}


def consistency_trainer(folder, model=None, **arguments) -> ConsistencyTrainer:
    defaults = {"save_steps": 1, "eval_steps": 1, "consistency_weight": 1.0, "consistency_warmup_steps": 1}
    return make_trainer(folder, model, ConsistencyTrainer, **{**defaults, **arguments})


def recorded_states(model) -> list[dict]:
    """A list that grows by the arguments of each call of `model`, and whether it was the teacher's."""
    calls = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append({**kwargs, "teacher": not module.training}), with_kwargs=True
    )
    return calls


# --- the loss --------------------------------------------------------------------------------------------------------


# Options, the model, sequences in a micro-batch: four make an optimizer step, the last three of seven rows another.
LOSSES = {
    "mse": ({}, {}, 4),
    "mse_in_time": ({"loss_weighting": "uniform", "gap_range": [0.2, 0.4]}, {"time_conditioning": True}, 2),
    "mse_sum_ema": ({"consistency_reduction": "sum", "teacher": "ema"}, {}, 1),
    "mse_sum_normed": ({"consistency_reduction": "sum", "consistency_at": "normed"}, EXPLICIT, 2),
    "mse_relative_both": ({"consistency_reduction": "relative", "consistency_positions": "both"}, {}, 2),
    "cosine": ({"consistency_loss": "hidden_cosine"}, {}, 2),
    "cosine_normed_ema": ({"consistency_loss": "hidden_cosine", "consistency_at": "normed", "teacher": "ema"}, {}, 2),
    "projected": ({"consistency_loss": "projected_cosine"}, {}, 2),
    "projected_normed_ema": (
        {"consistency_loss": "projected_cosine", "consistency_at": "normed", "teacher": "ema"}, EXPLICIT, 1,
    ),
    "kl": ({"consistency_loss": "logit_kl"}, {}, 2),
    "kl_both": ({"consistency_loss": "logit_kl", "consistency_positions": "both"}, {}, 1),
    "kl_ema": ({"consistency_loss": "logit_kl", "teacher": "ema"}, EXPLICIT, 2),
    "images": ({}, {"class_dropout": 0.4}, 2),
    "images_cosine_normed_ema": (
        {"consistency_loss": "hidden_cosine", "consistency_at": "normed", "teacher": "ema"}, EXPLICIT, 4,
    ),
    "images_kl": ({"consistency_loss": "logit_kl"}, {"class_dropout": 0.4}, 1),
    "prompted": ({"consistency_loss": "hidden_cosine"}, {}, 2),
    "prompted_kl": ({"consistency_loss": "logit_kl"}, {}, 4),
}  # fmt: skip


def distances(args: ConsistencyConfig, student, belief, target) -> torch.Tensor:
    """(L,)"""
    if args.consistency_loss == "logit_kl":
        return divergence(target.logits, belief.logits)
    h, h_target = getattr(belief, args.consistency_at), getattr(target, args.consistency_at)
    if args.consistency_loss == "hidden_mse":
        sizes = {"sum": 1, "mean": h.shape[-1], "relative": (h_target**2).sum(-1)}
        return ((h - h_target) ** 2).sum(-1) / sizes[args.consistency_reduction]
    if args.consistency_loss == "projected_cosine":
        h = h @ student.consistency_projection.weight.T + student.consistency_projection.bias
    return 1 - (h * h_target).sum(-1) / (h.norm(dim=-1) * h_target.norm(dim=-1))


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_are_those_of_the_formula(tmp_path, name):
    options, architecture, batch = LOSSES[name]
    kind = kind_of(name)
    model = kind.model(**architecture).double()
    trainer, steps = recorded(
        consistency_trainer, tmp_path, kind, model, batch, consistency_warmup_steps=3, consistency_weight=6.0,
        ema_decay=0.5, **options,
    )  # fmt: skip
    averaged = averages([step.weights for step in steps], decay=0.5)
    empty, both = 0, trainer.args.consistency_positions == "both"
    for k, step in enumerate(steps):
        student = with_weights(model, step.weights)
        teacher = with_weights(model, averaged[k] if trainer.args.teacher == "ema" else step.weights)
        noisy = corrupt(step, k, trainer.args.gap_range, kind)
        empty += sum(not n.masked.any() for n in noisy)
        total = sum(step.iterations.values())
        targets = of_teacher(teacher, noisy, num_iterations=total)
        beliefs = of_student(student, noisy, step)
        compared = [n.still_masked if both else n.masked for n in noisy]
        found = [distances(trainer.args, student, b, t) for b, t in zip(beliefs, targets, strict=True)]
        distance = mean_of_means(found, noisy, lambda n: n.still_masked if both else n.masked)
        base = cross_entropy(beliefs, noisy, 2.0 if "loss_weighting" in options else None)
        loss = base + 6.0 * (k + 1) / 3 * distance
        assert_gradient(student, loss, step.gradient, tolerance=1e-5 if trainer.args.teacher == "ema" else 1e-6)
        line = trainer.state.log_history[k]
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert line["consistency"] == pytest.approx(distance.item(), rel=1e-5)
        if trainer.args.consistency_reduction == "relative":
            share = sum(bool(c.any()) for c in compared) / len(noisy)
            assert line["relative_consistency"] == pytest.approx(distance.item() / share, rel=1e-5)
    if kind is TEXT:
        assert empty > 0
    if "class_dropout" in architecture:
        assert {label == 3 for step in steps for label in step.classes} == {True, False}


@pytest.mark.parametrize(("kind", "teacher"), [("hidden_mse", "self"), ("logit_kl", "ema")])
def test_the_teacher_has_no_dropout_no_graph_no_head_and_as_many_iterations(tmp_path, kind, teacher):
    model, calls, heads = training_model(dropout=0.3, scale=0.3), [], []
    model.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((module.training, weights(module), kwargs, output)),
        with_kwargs=True,
    )
    model.lm_head.register_forward_hook(lambda module, args, output: heads.append(len(calls)))
    consistency_trainer(tmp_path, model, consistency_loss=kind, teacher=teacher, ema_decay=0.5).train()
    assert [training for training, *_ in calls] == [False, True] * 3
    assert heads == [1, 3, 5]  # inside the student's calls
    counts = set()
    for (_, held, clean, target), (_, _, noisy, student) in zip(calls[::2], calls[1::2], strict=True):
        assert target.logits is None and target.loss is None and not target.last_hidden_state.requires_grad
        assert student.last_hidden_state.requires_grad
        total = noisy["num_no_grad_iterations"] + noisy["num_iterations"]
        assert len(target.residuals) == len(student.residuals) == total
        counts.add(total)
        with torch.no_grad():
            output = with_weights(training_model(), held).eval()(clean["input_ids"], num_iterations=total)
        expected = output.last_hidden_state.flatten(0, 1)[noisy["logits_positions"]]
        torch.testing.assert_close(target.last_hidden_state, expected, rtol=1e-4, atol=1e-5)
    assert len(counts) > 1


# --- interruption and export -----------------------------------------------------------------------------------------


def test_an_export_has_no_projection_and_training_goes_on(tmp_path):
    trainer = consistency_trainer(
        tmp_path, consistency_loss="projected_cosine", max_steps=2, save_strategy="steps", ema_decay=0.5
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "export"))
    beside = load_file(tmp_path / "checkpoint-2/consistency_projection.safetensors")
    torch.testing.assert_close(beside["weight"], trainer.model.consistency_projection.weight, rtol=0, atol=0)
    assert load_file(tmp_path / "export/model.safetensors").keys() == weights(training_model()).keys()
    loaded, report = AutoModel.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not any(report.values())
    for name, parameter in loaded.named_parameters():
        torch.testing.assert_close(parameter, trainer.ema.shadow[name], rtol=0, atol=1e-7)
    assert (trainer.model.consistency_projection.weight - torch.eye(16)).abs().max() > 1e-3
    assert "consistency_projection.weight" in trainer.ema.shadow


def test_adapters_train_alone(tmp_path):
    trainer = consistency_trainer(tmp_path, peft_config=LoraConfig(r=2), teacher="ema")
    before = weights(trainer.model)
    trainer.train()
    assert all(line["consistency"] > 0 for line in trainer.state.log_history if "loss" in line)
    changed = {name for name, old in before.items() if not torch.equal(old, trainer.model.get_parameter(name))}
    assert changed == {name for name in before if "lora_" in name}
    consistency_trainer(tmp_path, peft_config=LoraConfig(r=2, target_modules=["lm_head"]))  # which no state meets


# --- the stopping rule -----------------------------------------------------------------------------------------------


def planned_trainer(folder, planned, **arguments) -> PlannedTrainer:
    defaults = {"max_steps": 6, "eval_dataset": token_rows(4), "eval_steps": 1, "ema_decay": 0.5}
    trainer = make_trainer(folder, None, PlannedTrainer, **{**defaults, **arguments})
    trainer.planned = planned
    return trainer


def test_it_stops_at_the_first_evaluation_above_the_threshold_and_keeps_that_checkpoint(tmp_path):
    trainer = planned_trainer(tmp_path, {0: 100.0, 1: 99.0, 2: 114.99, 3: 115.01, 4: 90.0})
    trainer.train()
    assert trainer.state.global_step == 3
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    saved = load_file(tmp_path / "checkpoint-3/model.safetensors")
    assert all(torch.equal(saved[name], parameter) for name, parameter in trainer.model.named_parameters())
    trainer.save_model(str(tmp_path / "export"))
    exported, average = (load_file(tmp_path / f) for f in ("export/model.safetensors", "checkpoint-3/ema.safetensors"))
    assert all(torch.equal(exported[name], average[name]) for name in average)


def test_the_first_perplexity_and_the_stop_survive_an_interruption(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    planned_trainer(tmp_path, {0: 100.0, 1: 105.0, 2: 112.0}, max_steps=2, **saving).train()
    # 116 is above 1.15 · 100, not above 1.15 · 112, the first perplexity of the resumed process
    resumed = planned_trainer(tmp_path, {2: 112.0, 3: 116.0}, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 3
    again = planned_trainer(tmp_path, {3: 116.0, 4: 90.0}, **saving)
    calls = recorded_states(again.model)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.state.global_step == 3
    assert [call for call in calls if call["teacher"] is False] == []
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(again.model.get_parameter(name), parameter)


def warnings_of(caplog, function) -> list[str]:
    logging.Logger.warning_once.cache_clear()  # transformers remembers what it has said
    caplog.clear()
    with caplog.at_level("WARNING"):
        function()
    texts = [record.getMessage() for record in caplog.records]
    return [text for text in texts if "`stop_at_perplexity_increase` is off" in text]


def test_the_rule_is_off_with_one_warning_where_it_has_no_perplexity_to_go_by(tmp_path, caplog):
    trainers = []

    def run(**arguments):
        trainers.append(planned_trainer(tmp_path, {0: 1.0, 1: 99.0, 2: 99.0}, max_steps=2, **arguments))
        trainers[-1].train()

    assert len(warnings_of(caplog, lambda: [run(eval_dataset=None), run(eval_dataset=None)])) == 1
    assert len(warnings_of(caplog, lambda: run(eval_strategy="no"))) == 1
    assert len(warnings_of(caplog, lambda: run(eval_on_start=False))) == 1
    before_and_after = planned_trainer(tmp_path, {0: 1.0, 3: 9.0})
    for before_and_after.state.global_step in (0, 3):
        assert warnings_of(caplog, lambda: before_and_after.evaluate(metric_key_prefix="other")) == []
    sets = {"books": token_rows(2), "news": token_rows(2)}
    assert len(warnings_of(caplog, lambda: run(eval_dataset=sets))) == 1
    logged = {name for line in trainers[-1].state.log_history for name in line}
    assert {"eval_books_perplexity", "eval_news_perplexity"} <= logged
    assert warnings_of(caplog, lambda: run(stop_at_perplexity_increase=0)) == []
    assert warnings_of(caplog, lambda: run(eval_dataset=None, stop_at_perplexity_increase=None)) == []
    assert [trainer.state.global_step for trainer in trainers] == [2] * len(trainers)
