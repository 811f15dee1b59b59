# SPDX-License-Identifier: Apache-2.0
"""Training of images: the arccos schedule, class dropout, both losses and the evaluation against formulas written out
here, and the card."""

import math

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard

from fpmgm import FPMaskGITModel
from fpmgm.models.noise import stream_generator
from fpmgm.trainers import ConsistencyConfig, ConsistencyTrainer

from ..testing_utils import tiny_image_config, tiny_image_model
from .training_utils import image_rows, make_trainer, record_calls, weights


MASK, LENGTH, CLASSES = 7, 9, 3  # of tiny_image_config


def image_trainer(folder, model=None, **arguments):
    model = tiny_image_model(scale=0.1) if model is None else model
    return make_trainer(folder, model, **{"train_dataset": image_rows(24), **arguments})


def cross_entropies(logits: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """−log p of each code, without the mask's column."""
    allowed = logits[..., :MASK].double()
    return allowed.logsumexp(-1) - allowed.gather(-1, codes[..., None])[..., 0]


# --- the training step -----------------------------------------------------------------------------------------------


def test_every_parameter_learns_from_a_fresh_start(tmp_path):
    # The modulations start at 0: the first step opens the gates, the second moves what lies behind them.
    model = FPMaskGITModel(tiny_image_config())
    before = weights(model)
    image_trainer(tmp_path, model, max_steps=3).train()
    assert [name for name, old in before.items() if torch.equal(old, model.get_parameter(name))] == []


def test_ratios_are_arccos_of_antithetic_uniforms_and_masks_follow_them(tmp_path):
    model, data = tiny_image_model(class_dropout=0.0), image_rows(64)
    calls = record_calls(model)
    image_trainer(tmp_path, model, max_steps=8, gradient_accumulation_steps=2, train_dataset=data).train()
    rows = {tuple(row["input_ids"]): row["class_labels"] for row in data}
    masked_share = []
    for first, second in zip(calls[::2], calls[1::2], strict=True):
        ratios = torch.cat([first[0]["timesteps"], second[0]["timesteps"]]).double()
        uniforms = torch.cos(ratios * math.pi / 2) * 8  # one of the 8 sequences in each eighth
        assert sorted(uniforms.floor().tolist()) == list(range(8))
        assert (uniforms % 1).max() - (uniforms % 1).min() < 1e-4
    for kwargs, _ in calls:
        masked = kwargs["input_ids"] == MASK
        assert torch.equal(masked, kwargs["labels"] != -100)
        clean = torch.where(masked, kwargs["labels"], kwargs["input_ids"])
        assert [rows[tuple(ids)] for ids in clean.tolist()] == kwargs["class_labels"].tolist()
        torch.testing.assert_close(kwargs["loss_weights"], torch.full((4,), math.pi / 2))
        masked_share += (masked.double().mean(dim=1) - kwargs["timesteps"]).tolist()
    # 64 sequences of 9 tokens, each masked with the sequence's ratio: standard deviation of the mean about 0.015
    assert abs(sum(masked_share) / len(masked_share)) < 0.06


def test_masks_and_dropped_classes_belong_to_a_sequences_place(tmp_path):
    model = tiny_image_model(class_dropout=0.5)
    calls = record_calls(model)
    trainer = image_trainer(tmp_path, model, max_steps=1, seed=3)
    trainer.train()
    ((kwargs, _),) = calls
    for row in range(4):
        key = (3, "train", 0, row)
        uniforms = torch.rand(LENGTH, generator=stream_generator(*key))
        assert torch.equal(kwargs["input_ids"][row] == MASK, uniforms < kwargs["timesteps"][row])
        dropped = torch.rand((), generator=stream_generator(*key, "class")) < 0.5
        assert (kwargs["class_labels"][row] == CLASSES) == dropped


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_share_of_dropped_classes_is_that_of_the_configuration(tmp_path, dropout):
    model = tiny_image_model(class_dropout=dropout)
    calls = record_calls(model)
    image_trainer(tmp_path, model, max_steps=8, per_device_train_batch_size=64, train_dataset=image_rows(64)).train()
    dropped = torch.cat([kwargs["class_labels"] for kwargs, _ in calls]) == CLASSES
    assert abs(dropped.double().mean().item() - dropout) <= 4 * (dropout * (1 - dropout) / 512) ** 0.5


def test_the_loss_is_the_cross_entropy_of_its_positions(tmp_path):
    model = tiny_image_model()
    trainer = image_trainer(tmp_path, model, max_steps=1, optim="sgd", learning_rate=0.0)
    calls = record_calls(model)
    trainer.train()
    ((kwargs, _),) = calls
    masked = kwargs["input_ids"] == MASK
    clean = {tuple(row["input_ids"]) for row in image_rows(24)}
    codes = torch.where(masked, kwargs["labels"], kwargs["input_ids"])
    assert {tuple(ids) for ids in codes.tolist()} <= clean
    iterations = {name: kwargs[name] for name in ("num_iterations", "num_no_grad_iterations")}
    with torch.no_grad():
        logits = model.eval()(kwargs["input_ids"], class_labels=kwargs["class_labels"], **iterations).logits
    losses = cross_entropies(logits, codes)
    expected = math.pi / 2 * (losses * masked).sum() / masked.numel()
    line = trainer.state.log_history[0]
    assert line["loss"] == pytest.approx(expected.item(), rel=1e-5)
    right = (logits[..., :MASK].argmax(-1) == codes)[masked].double().mean().item()
    assert line["masked_accuracy"] == pytest.approx(right, abs=1e-6)


def test_the_split_into_micro_batches_does_not_change_the_weights(tmp_path):
    arguments = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
    results = []
    for batch, accumulation in ((8, 1), (2, 4)):
        trainer = image_trainer(
            tmp_path, tiny_image_model(class_dropout=0.4), per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation, **arguments,
        )  # fmt: skip
        trainer.train()
        results.append(weights(trainer.model))
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, rtol=0, atol=2e-6, msg=name)
    moved = [(results[0][name] - old).abs().max().item() for name, old in weights(tiny_image_model()).items()]
    assert max(moved) > 1e-2


def test_images_without_classes_train(tmp_path):
    model = tiny_image_model()
    calls = record_calls(model)
    image_trainer(tmp_path, model, train_dataset=image_rows(8).remove_columns("class_labels")).train()
    assert len(calls) == 3 and not any("class_labels" in kwargs for kwargs, _ in calls)


# --- evaluation and post-training ------------------------------------------------------------------------------------


def test_evaluation_is_on_masked_tokens_with_every_class(tmp_path):
    data = image_rows(10, seed=1)
    model = tiny_image_model(class_dropout=0.9)
    trainer = image_trainer(tmp_path, model, eval_dataset=data, per_device_eval_batch_size=4, seed=7)
    total, shift = 0.0, torch.rand((), generator=stream_generator(7, "eval", 0, "shift")).item()
    for j, row in enumerate(data):
        ratio = math.acos(1 - abs(2 * ((shift + j * 0.6180339887498949) % 1) - 1)) / (math.pi / 2)
        masked = torch.rand(LENGTH, generator=stream_generator(7, "eval", 0, j)) < ratio
        codes = torch.tensor(row["input_ids"])
        with torch.no_grad():
            logits = model(codes.masked_fill(masked, MASK)[None], class_labels=torch.tensor([row["class_labels"]]))
        total += (cross_entropies(logits.logits[0], codes) * masked).sum().item()
    expected = math.pi / 2 * total / (10 * LENGTH)
    for batch_size in (4, 10):
        trainer.args.per_device_eval_batch_size = batch_size
        metrics = trainer.evaluate()
        assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)
        assert metrics["eval_perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)


def test_consistency_post_training_shows_teacher_and_student_one_class_and_nested_ratios(tmp_path):
    model = tiny_image_model(scale=0.1, class_dropout=0.5)
    seen = []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    args = ConsistencyConfig(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-3, report_to="none",
        use_cpu=True, disable_tqdm=True, save_strategy="no", eval_strategy="no", stop_at_perplexity_increase=None,
        logging_steps=1,
    )  # fmt: skip
    trainer = ConsistencyTrainer(model=model, args=args, train_dataset=image_rows(16))
    trainer.train()
    assert all(math.isfinite(line["consistency"]) for line in trainer.state.log_history if "loss" in line)
    for teacher, student in zip(seen[::2], seen[1::2], strict=True):
        assert torch.equal(teacher["class_labels"], student["class_labels"])
        gap = student["timesteps"] - teacher["timesteps"]  # taken off the ratio
        low, high = args.gap_range
        assert ((gap <= high + 1e-6) & ((gap >= low - 1e-6) | (teacher["timesteps"] <= 1e-3 + 1e-6))).all()
        assert ((teacher["input_ids"] == MASK) <= (student["input_ids"] == MASK)).all()


# --- bad input, and the card ----------------------------------------------------------------------------------------


def test_losses_that_a_model_does_not_have_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`loss_weighting`='elbo' must be one of \(None, 'uniform'\)"):
        image_trainer(tmp_path, loss_weighting="elbo")


def test_rows_of_other_lengths_are_refused(tmp_path):
    rows = Dataset.from_dict({"input_ids": [[1] * LENGTH, [1] * 5], "class_labels": [0, 1]})
    with pytest.raises(ValueError, match=r"row 1 of the training data.*5 codes.*has 9.*all are of one length"):
        image_trainer(tmp_path, train_dataset=rows).train()


def test_the_card_is_that_of_an_image_model(tmp_path):
    trainer = image_trainer(tmp_path, max_steps=1, data_description="random codes")
    trainer.train()
    trainer.save_model()
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag is None and "fpmgm" in card.data.tags
    assert "fixed-point masked generative image model" in card.text and "random codes" in card.text
    assert f"| tokens, codes, classes | {LENGTH}, {MASK}, {CLASSES} |" in card.text
    assert "class_labels=[0]" in card.text and "AutoTokenizer" not in card.text
