# SPDX-License-Identifier: Apache-2.0
"""The base trainer against formulas written out here and against the uninterrupted, unsplit run."""

import ast
import dataclasses
import json
import logging
import math
import re
import sys
import time

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM, TrainingArguments, dynamic_module_utils

from fpmgm import FPMaskGITModel, FPMDLMConfig, FPMDLMForMaskedDiffusion
from fpmgm.data import train_tokenizer
from fpmgm.models.noise import stream_generator
from fpmgm.trainers import MGMTrainingConfig

from ..testing_utils import CHECKPOINTING, refused, tiny_config, tiny_image_config, tiny_image_model
from .reference import (
    IMAGES,
    PROMPTED,
    SEED,
    TEXT,
    assert_gradient,
    corrupt,
    cross_entropy,
    elbo,
    kind_of,
    of_student,
    recorded,
    with_weights,
)
from .training_utils import (
    LENGTH,
    MASK,
    VOCABULARY,
    CallOnce,
    RecordWeights,
    assert_close,
    assert_equal,
    image_rows,
    make_trainer,
    record_calls,
    token_rows,
    training_model,
    weights,
)


# --- the training step -----------------------------------------------------------------------------------------------

FRESH = {
    **{kind: lambda kind=kind: FPMDLMForMaskedDiffusion(fresh_config(kind)) for kind in ("mlp", "linear", "diagonal")},
    "images": lambda: FPMaskGITModel(tiny_image_config()),
}


def fresh_config(injection: str) -> FPMDLMConfig:
    sizes = {"vocab_size": VOCABULARY, "mask_token_id": MASK, "max_position_embeddings": LENGTH}
    return tiny_config(input_injection=injection, **sizes)


@pytest.mark.parametrize("name", FRESH)
def test_every_parameter_learns_from_a_fresh_start(tmp_path, name):
    # A fresh model is the identity under a zero head: the first step moves the head alone, the second what lies
    # between it and the zero gates, the third what lies behind those.
    model = FRESH[name]()
    before = weights(model)
    make_trainer(tmp_path, model, train_dataset=kind_of(name).rows(24)).train()
    assert [name for name, old in before.items() if torch.equal(old, model.get_parameter(name))] == []


# Options, the model, sequences in a micro-batch: four make an optimizer step, the last three of seven rows another.
LOSSES = {
    "whole": ({}, {}, 4),
    "split": ({}, {"time_conditioning": True}, 1),
    "explicit": ({}, {"num_fixed_point_layers": 0}, 2),
    "uniform": ({"loss_weighting": "uniform"}, {}, 2),
    "images": ({}, {}, 4),
    "images_dropped": ({}, {"class_dropout": 0.4}, 1),
    "prompted": ({}, {}, 4),
    "prompted_split": ({}, {}, 1),
}


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_are_those_of_the_masked_cross_entropy(tmp_path, name):
    options, architecture, batch = LOSSES[name]
    kind = kind_of(name)
    model = kind.model(**architecture).double()
    trainer, steps = recorded(make_trainer, tmp_path, kind, model, batch, **options)
    for k, (step, line) in enumerate(zip(steps, trainer.state.log_history, strict=False)):
        student, noisy = with_weights(model, step.weights), corrupt(step, k, kind=kind)
        if kind is IMAGES:
            shares = [torch.rand((), generator=stream_generator(SEED, "train", k, n.place, "class")) for n in noisy]
            assert [n.label == 3 for n in noisy] == [share < model.config.class_dropout for share in shares]
        beliefs = of_student(student, noisy, step)
        loss = cross_entropy(beliefs, noisy, 2.0 if "loss_weighting" in options else None)
        assert_gradient(student, loss, step.gradient)
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
        pairs = [(b.logits[n.masked].argmax(-1), n.ids[n.masked]) for b, n in zip(beliefs, noisy, strict=True)]
        guesses, ids = (torch.cat(part) for part in zip(*pairs, strict=True))
        assert line["masked_accuracy"] == pytest.approx((guesses == ids).double().mean().item(), abs=1e-6)
        solver = {"residual", "residual_ratio", "iterations", "state_norm"} & line.keys()
        assert len(solver) == (0 if name == "explicit" else 4)


def test_draws_of_iterations_are_uniform_over_the_ranges_and_depend_on_seed_and_step_alone(tmp_path):
    def draws(trainer, steps):
        for trainer.state.global_step in steps:
            torch.rand(3)  # other users of the global generator must not matter
            yield trainer.draw_iterations()

    first = list(draws(make_trainer(tmp_path), range(2000)))
    counts = [first.count((no_grad, grad)) for no_grad in range(0, 5) for grad in range(3, 7)]
    assert sum(counts) == 2000
    assert all(60 < count < 140 for count in counts)  # 100 expected, standard deviation 9.7
    other = make_trainer(tmp_path, per_device_train_batch_size=2, train_dataset=token_rows(7))
    assert list(draws(other, reversed(range(50)))) == first[:50][::-1]
    assert list(draws(make_trainer(tmp_path, seed=43), range(50))) != first[:50]


@pytest.mark.parametrize("adapter", [None, LoraConfig(r=2)])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_recomputes_and_gives_the_same_weights(tmp_path, adapter, reentrant):
    results, calls = [], []
    for checkpointing in (False, True):
        model, blocks = training_model(dropout=0.1), []
        # before the call: recomputation leaves a block as soon as it has what the backward pass needs
        model.pre_layers[0].register_forward_pre_hook(lambda *_, blocks=blocks: blocks.append(1))
        options = {CHECKPOINTING: checkpointing, f"{CHECKPOINTING}_kwargs": {"use_reentrant": reentrant}}
        torch.manual_seed(0)
        trainer = make_trainer(tmp_path, model, peft_config=adapter, **options)
        trainer.train()
        results.append(weights(trainer.model))
        calls.append(len(blocks))
    assert calls == [3, 6]
    assert_close(results[1], results[0])


def test_kept_iterations_give_the_same_weights_and_those_that_drew_more_run_again(tmp_path):
    results, calls = [], []
    for kept in (None, 1):
        model, blocks = training_model(dropout=0.1), []
        model.fixed_point.layers[0].register_forward_pre_hook(lambda *_, blocks=blocks: blocks.append(1))
        trainer = make_trainer(tmp_path, model, num_kept_iterations=kept)
        drawn = []
        draw = trainer.draw_iterations
        trainer.draw_iterations = lambda draw=draw, drawn=drawn: drawn.append(draw()) or drawn[-1]
        trainer.train()
        results.append(weights(model))
        calls.append(len(blocks))
    assert calls[1] - calls[0] == sum(grad - 1 for _, grad in drawn) > 0
    assert_close(results[1], results[0])
    for arguments in ({"num_kept_iterations": -1}, {"num_kept_iterations": 1, CHECKPOINTING: True}):
        refused("`num_kept_iterations`=", make_trainer, tmp_path, **arguments)


def test_images_without_classes_train(tmp_path):
    model = tiny_image_model()
    calls = record_calls(model)
    make_trainer(tmp_path, model, train_dataset=image_rows(8).remove_columns("class_labels")).train()
    assert len(calls) == 3 and not any("class_labels" in kwargs for kwargs, _ in calls)


def test_a_run_that_logs_nothing_keeps_one_sum_of_each_measure(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=4, logging_strategy="no", gradient_accumulation_steps=2)
    trainer.train()
    kept = trainer.since_log()
    assert {"sums.residual", "sums.masked_accuracy"} < kept.keys() and {len(values) for values in kept.values()} == {1}
    assert kept["sums.residual"][0][1].item() == pytest.approx(4)  # a weight of 1 for each step


def test_tokens_that_are_padded_with_elsewhere_are_counted(tmp_path):
    """The end of text is the padding of most prompts, and text in a row."""
    tokenizer = train_tokenizer(["the cat sat"] * 9, 258)
    tokenizer.pad_token = tokenizer.eos_token
    model = training_model(vocab_size=258, mask_token_id=257)
    data = [{"input_ids": [0, 5, 6, 0]}] * 8 + [{"input_ids": [0, 5]}] * 2
    trainer = make_trainer(
        tmp_path, model, train_dataset=data, processing_class=tokenizer, include_num_input_tokens_seen="non_padding"
    )
    trainer.train()
    assert trainer.state.num_input_tokens_seen == 8 * 4 + 2 * 2


def test_the_end_of_a_stream_that_fills_no_step_goes_into_none(tmp_path):
    def train(count):
        options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4}
        trainer = make_trainer(tmp_path, train_dataset=token_rows(count).to_iterable_dataset(), **options)
        trainer.train()
        return weights(trainer.model), [line["loss"] for line in trainer.state.log_history if "loss" in line]

    (found, losses), (expected, expected_losses) = train(10), train(8)  # two steps a pass
    assert_equal(found, expected)
    assert losses == expected_losses


# --- interruption ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("steps", [2, 3])  # inside an epoch of three steps, and at its end
def test_a_finished_run_that_is_resumed_takes_no_step(tmp_path, streaming, steps):
    rows = token_rows(12)
    options = {"train_dataset": rows.to_iterable_dataset() if streaming else rows, "max_steps": steps}
    options |= {"save_strategy": "steps", "save_steps": steps}
    finished = make_trainer(tmp_path, **options)
    finished.train()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    model = training_model(1)
    calls, again = record_calls(model), make_trainer(tmp_path, model, **options)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{steps}"))
    assert (again.state.global_step, calls) == (steps, [])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()} == before != {}
    assert_equal(weights(model), weights(finished.model))
    assert_equal(again.ema.shadow, finished.ema.shadow)


# --- the average of the weights --------------------------------------------------------------------------------------


def test_ema_follows_its_formula_and_is_what_is_saved_evaluated_and_exported(tmp_path):
    record, decay = RecordWeights(), 0.3  # (1 + n)/(10 + n) passes 0.3 at the third step
    trainer = make_trainer(
        tmp_path, max_steps=4, ema_decay=decay, callbacks=[record], save_strategy="steps", save_steps=4,
        eval_dataset=token_rows(8),
    )  # fmt: skip
    trainer.train()
    expected = {name: w.double() for name, w in record.history[0].items()}
    for n, current in enumerate(record.history[1:], start=1):
        d = min(decay, (1 + n) / (10 + n))
        expected = {name: d * old + (1 - d) * current[name].double() for name, old in expected.items()}
    assert_close(trainer.ema.shadow, expected)
    assert_close(load_file(tmp_path / "checkpoint-4/ema.safetensors"), expected)
    raw = record.history[-1]
    assert_equal(load_file(tmp_path / "checkpoint-4/model.safetensors"), raw)
    assert max((raw[name] - x).abs().max().item() for name, x in expected.items()) > 1e-3

    seen = []
    trainer.model.register_forward_pre_hook(lambda module, _: seen.append(weights(module)))
    trainer.evaluate()
    assert_close(seen[0], expected)
    assert_equal(weights(trainer.model), raw)

    trainer.save_model(str(tmp_path / "export"))
    assert_close(weights(AutoModelForMaskedLM.from_pretrained(tmp_path / "export")), expected)
    assert_equal(weights(trainer.model), raw)


def test_without_ema_the_raw_weights_are_evaluated_and_exported(tmp_path):
    trainer = make_trainer(tmp_path, ema_decay=None, save_strategy="steps", save_steps=3, eval_dataset=token_rows(4))
    trainer.train()
    raw = weights(trainer.model)
    trainer.save_model(str(tmp_path / "export"))
    assert_equal(weights(AutoModelForMaskedLM.from_pretrained(tmp_path / "export")), raw)
    assert trainer.evaluate()["eval_loss"] > 0
    assert not (tmp_path / "checkpoint-3/ema.safetensors").exists()


@pytest.mark.parametrize("metric", [None, "eval_perplexity"])
@pytest.mark.parametrize("adapter", [None, LoraConfig(r=4, lora_alpha=10)], ids=["whole", "adapter"])
def test_the_best_checkpoint_is_loaded_with_its_average(tmp_path, adapter, metric):
    # A rate that ruins the model, so that the best average is not the last.
    trainer = make_trainer(
        tmp_path, max_steps=5, learning_rate=0.3, ema_decay=0.5, eval_dataset=token_rows(8), eval_strategy="steps",
        eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True, peft_config=adapter,
        metric_for_best_model=metric,
    )  # fmt: skip
    trainer.train()
    evaluated = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    best = 1 + evaluated.index(min(evaluated))
    assert best < 5
    if adapter is None:
        assert_equal(weights(trainer.model), load_file(tmp_path / f"checkpoint-{best}/model.safetensors"))
    assert trainer.evaluate()["eval_loss"] == evaluated[best - 1]
    trainer.save_model()
    assert f"| optimizer steps | {best} |" in (tmp_path / "README.md").read_text()


# --- evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [TEXT, PROMPTED, IMAGES], ids=["text", "prompted", "images"])
def test_evaluation_is_the_elbo_per_token_under_fixed_noise(tmp_path, kind):
    options = {"class_dropout": 0.9} if kind is IMAGES else {}  # an evaluation drops none
    model, data = kind.model(**options), kind.rows(10)
    trainer = make_trainer(tmp_path, model, eval_dataset=data, per_device_eval_batch_size=10, seed=7)
    first = trainer.evaluate()
    torch.rand(5)
    trainer.model.train()
    assert trainer.evaluate()["eval_loss"] == first["eval_loss"]
    assert first["eval_perplexity"] == pytest.approx(math.exp(first["eval_loss"]), rel=1e-6)
    expected = elbo(trainer.model, kind, data, seed=7)
    assert first["eval_loss"] == pytest.approx(expected, rel=1e-5)
    trainer.args.per_device_eval_batch_size = 4  # a short last batch
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_weight_decay_shrinks_matrices_and_no_norm_bias_or_gate(tmp_path):
    fresh, runs = training_model().state_dict(), []
    for decay in (0.0, 0.5):
        trainer = make_trainer(tmp_path / str(decay), weight_decay=decay, max_steps=1, ema_decay=None)
        trainer.train()
        runs.append({name: p.detach() for name, p in trainer.model.named_parameters()})
    for name, start in fresh.items():  # one step of AdamW differs by -rate · decay · weight
        expected = -1e-2 * 0.5 * start if start.dim() > 1 else torch.zeros_like(start)
        torch.testing.assert_close(runs[1][name] - runs[0][name], expected, rtol=0, atol=1e-7, msg=name)


def test_an_evaluation_reads_the_rows_that_training_would_drop(tmp_path):
    losses = [
        make_trainer(
            tmp_path, eval_dataset=token_rows(5), per_device_eval_batch_size=size, dataloader_drop_last=True
        ).evaluate()["eval_loss"]
        for size in (1, 4, 8)
    ]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_evaluation_leaves_the_global_random_stream_alone(tmp_path):
    trainer = make_trainer(tmp_path, training_model(dropout=0.5), eval_dataset=token_rows(8))
    state = torch.get_rng_state()
    trainer.evaluate()
    assert torch.equal(torch.get_rng_state(), state)


# --- logs ------------------------------------------------------------------------------------------------------------


def test_logs_hold_the_means_of_what_the_model_reported(tmp_path):
    model, pause, predictions = training_model(), 0.05, []
    calls = record_calls(model)

    def predict(head, args, output):
        predictions.append((args[0] @ head.weight.T + head.bias)[:, :MASK].argmax(-1))

    model.lm_head.register_forward_hook(predict)
    model.register_forward_hook(lambda *_: time.sleep(pause))
    trainer = make_trainer(tmp_path, model, max_steps=4, gradient_accumulation_steps=2, logging_steps=2)
    start = time.perf_counter()
    trainer.train()
    elapsed = time.perf_counter() - start
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 2
    right = [
        kwargs["labels"][kwargs["labels"] != -100] == guesses
        for (kwargs, _), guesses in zip(calls, predictions, strict=True)
    ]
    assert torch.cat(right).any() and len({len(part) for part in right}) > 1
    for i, line in enumerate(lines):
        group = slice(4 * i, 4 * i + 4)  # micro-batches of the two steps
        outputs = [output for _, output in calls[group]]
        mean = {
            "masked_accuracy": torch.cat(right[group]).float().mean().item(),
            "residual": sum(output.residuals[-1].mean().item() for output in outputs) / 4,
            "iterations": sum(len(output.residuals) for output in outputs) / 4,
            "state_norm": sum(output.fixed_point_state.square().mean().sqrt().item() for output in outputs) / 4,
            "loss": sum(output.loss.item() for output in outputs) / 2,  # of two steps, whose micro-batches add up
        }
        assert {name: line[name] for name in mean} == pytest.approx(mean, rel=1e-5)
        tokens = 2 * 2 * 4 * LENGTH
        assert tokens / elapsed < line["tokens_per_second"] < tokens / (4 * pause)


@pytest.mark.parametrize(("expansion", "warnings"), [(1.5, 1), (0.5, 0)])
def test_a_residual_that_grows_over_the_iterations_warns_once(tmp_path, caplog, expansion, warnings):
    # F(h) = λh + (1.01 − λ)u, started at h = u: one percent off its fixed point, from which λ > 1 leads away.
    config = tiny_config(
        vocab_size=VOCABULARY, mask_token_id=MASK, max_position_embeddings=LENGTH, input_injection="linear"
    )
    model = FPMDLMForMaskedDiffusion(config)
    with torch.no_grad():
        model.fixed_point.injection.state_proj.weight.copy_(expansion * torch.eye(16))
        model.fixed_point.injection.input_proj.weight.copy_((1.01 - expansion) * torch.eye(16))
    logging.Logger.warning_once.cache_clear()  # transformers remembers what it has said
    trainer = make_trainer(tmp_path, model, learning_rate=1e-9)
    with caplog.at_level("WARNING"):
        trainer.train()
    assert sum("residual does not fall" in record.getMessage() for record in caplog.records) == warnings
    ratio = trainer.state.log_history[0]["residual_ratio"]
    assert (ratio > 1) == bool(warnings)


# --- failures --------------------------------------------------------------------------------------------------------


def test_a_first_loss_that_is_not_finite_says_that_nothing_was_saved(tmp_path):
    model = training_model()
    model.final_norm.register_forward_hook(lambda module, args, output: output * float("nan"))
    with pytest.raises(FloatingPointError, match=r"step 1\b.*No step"):
        make_trainer(tmp_path, model).train()
    assert list(tmp_path.glob("checkpoint-*")) == []


def test_a_gradient_that_is_not_finite_never_reaches_a_checkpoint(tmp_path):
    # A loss can be finite where its gradient overflows; clipping then turns every gradient into NaN.
    def poison(model):
        model.lm_head.weight.register_hook(lambda gradient: gradient * float("inf"))

    trainer = make_trainer(tmp_path, max_steps=5, save_strategy="steps", save_steps=1, callbacks=[CallOnce(3, poison)])
    with pytest.raises(FloatingPointError):
        trainer.train()
    folders = sorted(tmp_path.glob("checkpoint-*"))
    assert folders
    for path in (folder / name for folder in folders for name in ("model.safetensors", "ema.safetensors")):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values()), path


def test_models_that_cannot_be_trained_are_refused(tmp_path):
    bert = BertForMaskedLM(
        BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    )
    refused("`model_type`='bert'", make_trainer, tmp_path, bert)
    model = training_model()
    with torch.no_grad():
        model.post_layers[0].up_proj.bias[3] = float("nan")
    refused(r"post_layers\.0\.up_proj\.bias", make_trainer, tmp_path, model)


def test_a_checkpoint_without_its_average_is_refused(tmp_path):
    make_trainer(tmp_path, ema_decay=None, save_strategy="steps", save_steps=3).train()
    with pytest.raises(ValueError, match=r"ema\.safetensors"):
        make_trainer(tmp_path, max_steps=6).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


# --- the configuration -----------------------------------------------------------------------------------------------


def test_the_docstring_lists_exactly_the_defaults_that_differ(tmp_path):
    theirs = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    ours = {field.name: field.default for field in dataclasses.fields(MGMTrainingConfig)}
    different = {name: ours[name] for name, default in theirs.items() if str(ours[name]) != str(default)}
    note = MGMTrainingConfig.__doc__.split("Defaults that differ")[1].split("Args:")[0]
    documented = {name: ast.literal_eval(value) for name, value in re.findall(r"`(\w+)=([^`]+)`", note)}
    assert documented == different


# --- what is written beside the weights ------------------------------------------------------------------------------


def test_every_number_of_the_card_comes_from_the_model_the_run_or_a_file(tmp_path):
    trainer = make_trainer(
        tmp_path, learning_rate=3e-3, ema_decay=0.97, data_description="random rows", eval_dataset=token_rows(8)
    )
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    assert "None recorded" in (tmp_path / "README.md").read_text()
    trainer.save_metrics("eval", trainer.evaluate())
    trainer.create_model_card()

    card, config = ModelCard.load(tmp_path / "README.md"), trainer.model.config
    results = json.loads((tmp_path / "eval_results.json").read_text())
    assert card.data.library_name == "transformers"
    assert "random rows" in card.text
    rows = dict(re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|$", card.text, flags=re.MULTILINE))
    assert float(rows["eval_loss"]) == float(f"{results['eval_loss']:.5g}")
    value, error = map(float, rows["eval_perplexity"].split(" ± "))
    assert abs(value - results["eval_perplexity"]) < error and error > 0
    assert not {name for name in rows if "runtime" in name or "per_second" in name or "epoch" in name}
    parameters = sum(p.numel() for p in trainer.model.parameters())
    assert f"{parameters:,} parameters" in card.text
    known = [
        parameters, config.num_pre_layers, config.num_fixed_point_layers, config.num_post_layers, config.hidden_size,
        config.num_attention_heads, config.max_position_embeddings, config.vocab_size,
        trainer.state.global_step, 3e-3, 0.97, *(float(x) for name in results if name in rows
                                                 for x in rows[name].split(" ± ")),
    ]  # fmt: skip
    # neither the folder's name, nor the version, nor the example's own numbers
    prose = re.sub(r"^## Use$.*?(?=^## Results$)", "", card.text.replace(tmp_path.name, ""), flags=re.S | re.M)
    prose = re.sub(r"written by fpmgm \S+", "", prose)
    numbers = [float(x.replace(",", "")) for x in re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?:e-?\d+)?", prose)]
    assert len(numbers) > 10
    assert [x for x in numbers if x not in known] == []


def test_a_model_loaded_as_remote_code_trains_as_ours_does(tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    ours = training_model()
    ours.save_pretrained(tmp_path / "saved")
    remote_class = dynamic_module_utils.get_class_from_dynamic_module(
        "modeling_fpmdlm.FPMDLMForMaskedDiffusion", str(tmp_path / "saved")
    )
    remote = remote_class.from_pretrained(tmp_path / "saved")
    assert not isinstance(remote, FPMDLMForMaskedDiffusion)
    for model in (ours, remote):
        make_trainer(tmp_path, model).train()
    assert_equal(weights(remote), weights(ours))
