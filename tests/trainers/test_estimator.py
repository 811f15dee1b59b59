# SPDX-License-Identifier: Apache-2.0
"""What evaluation reports: the exact bound by enumeration, the error that it states, and how many draws it takes."""

import itertools
import math

import pytest
import torch
from datasets import Dataset

from fpmgm.trainers.estimator import MOST_DRAWS, times_of_rows

from ..testing_utils import tiny_image_model
from .reference import TEXT, elbo
from .training_utils import MASK, image_rows, make_trainer, token_rows, training_model


IDS = [3, 7, 11, 2]


@torch.no_grad()
def exact_bound(model, ids: list[int]) -> float:
    """−ELBO per token: the mean over t uniform in [1e-3, 1] of Σ over all masks of P(m | t)/t · Σ_i m_i·(−log p_i)."""
    losses = {}
    for mask in itertools.product([False, True], repeat=len(ids)):
        masked = torch.tensor(mask)
        logits = model(torch.tensor([ids]).masked_fill(masked, MASK)).logits[0, :, :MASK].double()
        log_p = logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)]
        losses[sum(mask)] = losses.get(sum(mask), 0.0) - log_p[masked].sum().item()
    t = 1e-3 + (1 - 1e-3) * (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    p = (1 - 1e-3) * t
    return sum((p**k * (1 - p) ** (len(ids) - k) / t).mean().item() * loss for k, loss in losses.items()) / len(ids)


def test_the_stated_error_is_that_of_the_exact_value(tmp_path):
    model = training_model(scale=0.3)
    data = Dataset.from_dict({"input_ids": [IDS] * 50})
    trainer = make_trainer(tmp_path, model, eval_dataset=data, per_device_eval_batch_size=50)
    exact = exact_bound(model.eval(), IDS)
    errors, stated = [], []
    for trainer.args.seed in range(100):
        metrics = trainer.evaluate()
        errors.append(metrics["eval_loss"] - exact)
        stated.append(metrics["eval_perplexity_stderr"] / metrics["eval_perplexity"])
    spread = math.sqrt(sum(e * e for e in errors) / 100)
    assert abs(sum(errors) / 100) < 4 * spread / 10
    assert math.sqrt(sum(e * e for e in stated) / 100) == pytest.approx(spread, rel=0.25)  # 7 % by chance

    trainer.args.eval_num_draws = None
    metrics = trainer.evaluate()
    assert 1 < metrics["eval_num_draws"] < MOST_DRAWS or metrics["eval_perplexity_stderr"] > 0.02
    assert abs(metrics["eval_loss"] - exact) < 4 * metrics["eval_perplexity_stderr"] / metrics["eval_perplexity"]


@pytest.mark.parametrize("batch_size", [3, 10])
def test_draws_are_independent_passes_over_the_same_rows(tmp_path, batch_size):
    data = token_rows(10, ragged=True, seed=1)
    trainer = make_trainer(
        tmp_path, eval_dataset=data, per_device_eval_batch_size=batch_size, seed=7, eval_num_draws=3
    )
    metrics = trainer.evaluate()
    draws = [elbo(trainer.model, TEXT, data, 7, draw) for draw in range(3)]
    assert len({round(draw, 6) for draw in draws}) == 3
    assert metrics["eval_loss"] == pytest.approx(sum(draws) / 3, rel=1e-5)
    assert (metrics["eval_num_draws"], metrics["eval_perplexity"]) == (
        3,
        pytest.approx(math.exp(sum(draws) / 3), rel=1e-5),
    )


def test_a_row_alone_is_masked_at_times_all_over(tmp_path):
    """One time says nothing of the others, and at an early one nothing may be masked: a perplexity of 1 ± 0."""
    trainer = make_trainer(tmp_path, training_model(scale=0.3), eval_num_draws=1)
    data = [{"input_ids": IDS[:2]}]
    trainer.args.seed = next(seed for seed in range(99) if elbo(trainer.model, TEXT, data, seed) == 0)
    assert trainer.evaluate(data)["eval_loss"] == 0
    trainer.args.eval_num_draws = None
    metrics = trainer.evaluate(data)
    assert metrics["eval_num_draws"] == 64
    exact = exact_bound(trainer.model.eval(), IDS[:2])
    assert abs(metrics["eval_loss"] - exact) < 4 * metrics["eval_perplexity_stderr"] / metrics["eval_perplexity"]
    ten = trainer.evaluate(token_rows(10).map(lambda row: {"input_ids": row["input_ids"][:1]}))
    assert ten["eval_num_draws"] >= 7  # 64 times
    for rows in (1, 3, 8):
        places = torch.arange(rows)
        drawn = [times_of_rows((0, "eval", 0), draw, places, lambda uniforms: uniforms) for draw in range(64 // rows)]
        points = torch.cat([torch.zeros(1), *drawn, torch.ones(1)]).sort().values
        assert points.diff().max() < 4 / 64  # of random ones it would be about 5 / 64


def test_the_number_of_draws_follows_the_error(tmp_path):
    few = make_trainer(tmp_path, eval_dataset=token_rows(4), eval_num_draws=None).evaluate()
    assert few["eval_num_draws"] == MOST_DRAWS
    trainer = make_trainer(tmp_path, tiny_image_model(), train_dataset=image_rows(8), eval_dataset=image_rows(60))
    one = trainer.evaluate()
    trainer.args.eval_num_draws = None
    enough = trainer.evaluate()
    needed = math.ceil((one["eval_perplexity_stderr"] / one["eval_perplexity"] / 0.02) ** 2)
    assert 1 < enough["eval_num_draws"] == needed < MOST_DRAWS
    assert enough["eval_perplexity_stderr"] / enough["eval_perplexity"] == pytest.approx(0.02, rel=0.15)


def test_metrics_and_predictions_are_those_of_the_first_draw(tmp_path):
    data, seen = token_rows(6, ragged=True), []

    def accuracy(prediction):
        labelled = prediction.label_ids != -100
        seen.append((prediction.predictions.shape, labelled.any(axis=1)))
        return {"accuracy": float((prediction.predictions == prediction.label_ids)[labelled].mean())}

    trainer = make_trainer(
        tmp_path, eval_dataset=data, compute_metrics=accuracy, eval_num_draws=2, per_device_eval_batch_size=4,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )  # fmt: skip
    metrics = trainer.evaluate()
    longest = max(map(len, data["input_ids"]))
    assert [shape for shape, _ in seen] == [(6, longest)]  # once, of all rows
    plain = make_trainer(tmp_path, trainer.model, eval_dataset=data, per_device_eval_batch_size=6, eval_num_draws=2)
    assert metrics["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-6)
    found = plain.predict(data)
    right = total = 0
    with torch.no_grad():
        for ids, logits, labels in zip(data["input_ids"], found.predictions, found.label_ids, strict=True):
            masked = torch.tensor(labels[: len(ids)] != -100)
            expected = trainer.model.eval()(torch.tensor([ids]).masked_fill(masked, MASK)).logits[0, :, :MASK]
            torch.testing.assert_close(torch.tensor(logits)[: len(ids), :MASK], expected, rtol=1e-4, atol=1e-5)
            right += int((expected.argmax(-1) == torch.tensor(ids))[masked].sum())
            total += int(masked.sum())
    assert metrics["eval_accuracy"] == pytest.approx(right / total)
    assert plain.predict(data, metric_key_prefix="other").metrics["other_loss"] == found.metrics["test_loss"]
    only = make_trainer(tmp_path, trainer.model, prediction_loss_only=True)
    assert only.predict(data).predictions is None
