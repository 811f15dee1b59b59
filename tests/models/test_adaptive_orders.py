# SPDX-License-Identifier: Apache-2.0
"""Orders that decide from the predictions: sets against plain loops, distributions against enumeration, rows alone."""

import itertools
import math
import random

import pytest
import torch

from fpmgm.models.certainty import certain_enough, certainty, margin, negative_entropy, ranked, within_entropy
from tests.models import reference_maskgit, reference_mdlm
from tests.models.helpers import lively_image_model, lively_model, record_calls
from tests.models.test_generation_mgm import REUSES, KnownDistribution, gamma


BOUNDS = {"entropy": "entropy_bound", "threshold": "confidence_threshold", "margin": "margin_threshold"}
MASK = 10  # of tiny_config


# --- which positions together ---------------------------------------------------------------------------------------


def most_certain_first(order: str, distributions: dict[int, list[float]]) -> dict[int, float]:
    """How certain each place is, of place → probabilities, the most certain one first."""
    scores = {}
    for i, p in distributions.items():
        *_, second, first = sorted(p)
        negative_entropy = sum(x * math.log(x) for x in p if x > 0)
        scores[i] = {"entropy": negative_entropy, "threshold": first, "margin": first - second}[order]
    return {i: scores[i] for i in sorted(scores, key=lambda i: (-round(scores[i], 9), i))}


def chosen(order: str, bound: float, distributions: dict[int, list[float]]) -> list[int]:
    """The positions that pass a bound, of place → probabilities, written from the rules."""
    scores = most_certain_first(order, distributions)
    best, *_ = certain = list(scores)
    if order == "entropy":
        sets = [certain[:size] for size in range(1, len(certain) + 1)]
        within = [s for s in sets if -sum(scores[i] for i in s) + min(scores[i] for i in s) <= bound + 1e-9]
        return sorted(max(within, key=len))
    return sorted({best} | {i for i in distributions if scores[i] >= bound - 1e-9})


def revealed(order: str, bound: float, distributions: dict[int, list[float]], steps_left: int) -> list[int]:
    """The positions that a step reveals: those that pass, and the most certain until an even share is reached."""
    due = math.ceil(len(distributions) / steps_left)
    return sorted({*chosen(order, bound, distributions), *list(most_certain_first(order, distributions))[:due]})


@pytest.mark.parametrize("order", BOUNDS)
def test_sets_of_random_predictions_are_those_of_plain_loops(order):
    for seed in range(40):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        rows = torch.tensor(sorted(rng.choices(range(4), k=15)))
        logits = torch.randn(15, 5, dtype=torch.float64) * 4
        logits[3], logits[7] = logits[2], logits[2]  # equals
        p = logits[:, [0, 1, 2, 4]].softmax(dim=1).tolist()
        bound = rng.choice([0.0, 0.2, 0.6, 0.95, 3.0 if order == "entropy" else 1.0])
        expected = [
            i for row in range(4) if row in rows
            for i in chosen(order, bound, {i: p[i] for i in range(15) if rows[i] == row})
        ]  # fmt: skip
        measure = {"entropy": negative_entropy, "margin": margin}.get(order, lambda log_p: log_p.exp().amax(dim=1))
        choose = within_entropy if order == "entropy" else certain_enough
        assert choose(ranked(certainty(logits, 3, measure), rows), bound).tolist() == expected


@pytest.mark.parametrize(("order", "bound"), [("entropy", 1e9), ("threshold", 0), ("margin", 0.0)])
def test_a_bound_that_everything_passes_takes_one_step(order, bound):
    out = lively_model().generate(
        batch_size=3, budget=48, order=order, **{BOUNDS[order]: bound}, return_dict_in_generate=True
    )
    assert out.num_steps == 1 and out.tokens_per_step == 8
    assert out.block_evaluations == 2 + out.iterations[0] and len(out.iterations) == 1


@pytest.mark.parametrize(("order", "bound"), [("entropy", 0), ("threshold", 1), ("margin", 1)])
def test_a_bound_that_nothing_passes_takes_one_position_at_a_step(order, bound):
    steps = []
    call = {"order": order, BOUNDS[order]: bound, "callback": steps.append, "return_dict_in_generate": True}
    out = lively_model().generate(budget=48, **call)
    assert [int(step.revealed.sum()) for step in steps] == [1] * 8 and out.num_steps == 8 and out.tokens_per_step == 1
    steps.clear()
    out = lively_model().generate(budget=24, **call)  # four steps: an even share at each
    assert [int(step.revealed.sum()) for step in steps] == [2, 2, 2, 2] and out.num_steps == 4
    steps.clear()
    lively_model().generate(num_steps=3, iterations=1, **call)
    assert [int(step.revealed.sum()) for step in steps] == [3, 3, 2]
    assert lively_model().generate(num_steps=20, iterations=1, **call).num_steps == 8


def test_temperature_and_truncation_change_the_draw_and_not_the_choice():
    revealed = []
    for options in ({}, {"temperature": 0}, {"temperature": 3.0}, {"top_k": 1}, {"top_p": 0.2}):
        steps = []
        lively_model().generate(
            num_steps=4, iterations=3, order="threshold", confidence_threshold=0.4, seed=1, callback=steps.append,
            **options,
        )  # fmt: skip
        revealed.append(steps[0].revealed)  # the first step sees the same
    assert all(torch.equal(x, revealed[0]) for x in revealed)


@pytest.mark.parametrize("final", ["sample", "argmax", "none"])
def test_final_decides_about_what_the_last_step_is_not_certain_of(final):
    model = KnownDistribution(torch.tensor([0.2, 0.7, 50.0, 0.1]).log().tolist(), mask_token_id=2, length=400)
    tokens = model.generate(
        num_steps=3, iterations=0, order="threshold", confidence_threshold=0.8, final=final, seed=0
    )
    shares = tokens[0].bincount(minlength=4)
    due = 134 + 133  # at the first two of three steps
    if final == "none":
        assert shares[2] == 400 - due - 1  # one is always sure
    elif final == "argmax":
        drawn = shares[1] - (400 - due - 1)
        assert abs(drawn / (due + 1) - 0.7) < 4 * (0.7 * 0.3 / due) ** 0.5 and shares[2] == 0
    else:
        assert shares[2] == 0 and abs(shares[1] / 400 - 0.7) < 4 * (0.7 * 0.3 / 400) ** 0.5


# --- the distribution of texts and images ---------------------------------------------------------------------------


def enumerated(predict, ids, order, bound, num_steps, mask):
    """Probability of each result; `predict(ids, step, memory)` gives (L, V) probabilities without the mask's, and what
    the next step remembers."""
    states = [(tuple(ids), None, 1.0)]
    found = {}
    for step in range(num_steps):
        following = []
        for now, memory, chance in states:
            left = [i for i, token in enumerate(now) if token == mask]
            if not left:
                found[now] = found.get(now, 0) + chance
                continue
            p, remembered = predict(now, step, memory)
            together = revealed(order, bound, {i: p[i] for i in left}, num_steps - step)
            for drawn in itertools.product(range(len(p[0])), repeat=len(together)):
                after = list(now)
                for i, token in zip(together, drawn, strict=True):
                    after[i] = token
                share = math.prod(p[i][token] for i, token in zip(together, drawn, strict=True))
                following.append((tuple(after), remembered, chance * share))
        states = following
    for now, _, chance in states:
        found[now] = found.get(now, 0) + chance
    return found


def text_predictions(model, ids, iterations, reuse):
    """For `enumerated`: the reference, with the time that the masks left say."""
    weights, mask, masks = model.state_dict(), model.config.mask_token_id, ids.count(2)

    def predict(now, step, memory):
        tokens = torch.tensor([now])
        start = {}
        if memory is not None and reuse != "none":
            before, state = memory
            share = gamma(reuse, before, tokens, mask, torch.ones(tokens.shape))
            start = {"previous_state": state, "previous_share": share}
        out = reference_mdlm.reference_forward(
            model.config,
            weights,
            tokens,
            torch.tensor([now.count(mask) / masks]),
            iterations=iterations[step],
            **start,
        )
        return out.logits[0, :, :mask].softmax(dim=-1).tolist(), (tokens, out.state)

    return predict


def deviation(tokens, expected) -> float:
    """χ² of the rows of `tokens`, in its standard deviations from its mean."""
    rows, found = len(tokens), dict.fromkeys(expected, 0)
    for text in tokens.tolist():
        found[tuple(text)] += 1
    assert sum(expected.values()) == pytest.approx(1)
    statistic = sum((found[text] - rows * p) ** 2 / (rows * p) for text, p in expected.items())
    freedom = len(expected) - 1
    return (statistic - freedom) / (2 * freedom) ** 0.5


# Each lets a first step reveal some positions and not all.
PARTIAL = {"entropy": 0.7, "threshold": 0.775, "margin": 0.53}


@pytest.mark.parametrize("reuse", REUSES)
@pytest.mark.parametrize("order", BOUNDS)
def test_texts_follow_the_exactly_enumerated_distribution(order, reuse):
    model = lively_model(seed=2, vocab_size=3, mask_token_id=2, time_conditioning=True)
    ids, iterations = [2, 1, 2, 2, 2], [2, 1, 1, 1]
    predict, bound = text_predictions(model, ids, iterations, reuse), PARTIAL[order]
    first = predict(tuple(ids), 0, None)[0]
    assert 1 < len(chosen(order, bound, {i: first[i] for i in (0, 2, 3, 4)})) < 4
    expected = enumerated(predict, ids, order, bound, len(iterations), 2)
    tokens = model.generate(
        torch.tensor([ids]), batch_size=3000, iterations=iterations, reuse=reuse, order=order, seed=3,
        **{BOUNDS[order]: bound},
    )  # fmt: skip
    assert deviation(tokens, expected) < 5
    other = enumerated(predict, ids, order, 0.0 if order == "entropy" else 1.0, len(iterations), 2)
    assert deviation(tokens, other) > 20  # the test can tell


@pytest.mark.parametrize("order", BOUNDS)
def test_images_under_guidance_follow_the_exactly_enumerated_distribution(order):
    model = lively_image_model(codebook_size=2, grid_size=2)
    weights, bound = model.state_dict(), {"entropy": 1.0, "threshold": 0.6, "margin": 0.2}[order]

    def predict(now, step, memory):
        tokens = torch.tensor([now])
        given, free = (
            reference_maskgit.reference_forward(model.config, weights, tokens, labels, iterations=3).logits[0, :, :2]
            for labels in (torch.tensor([1]), None)
        )
        scale = 1 + 1.5 * (1 - now.count(2) / 4)  # linear: with the share revealed
        return (free + scale * (given - free)).softmax(dim=-1).tolist(), None

    expected = enumerated(predict, [2] * 4, order, bound, 3, 2)
    tokens = model.generate(
        batch_size=3000, num_steps=3, iterations=3, reuse="none", class_labels=1, guidance_scale=2.5,
        guidance_schedule="linear", order=order, seed=0, **{BOUNDS[order]: bound},
    )  # fmt: skip
    assert deviation(tokens, expected) < 5


# --- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reuse", REUSES)
@pytest.mark.parametrize("order", BOUNDS)
def test_a_row_is_the_row_alone_and_ends_by_itself(order, reuse):
    model, M = lively_model(), MASK
    bound = {"entropy": 2.5, "threshold": 0.43, "margin": 0.28}[order]
    rows = [[1, 2, M, M, M], [M] * 8, [M, 3, 4, 5, 6, 7], [M] * 8, [9, M, M, 0]]
    ids, real = torch.zeros(5, 8, dtype=torch.long), torch.zeros(5, 8, dtype=torch.long)
    for k, row in enumerate(rows):
        ids[k, : len(row)], real[k, : len(row)] = torch.tensor(row), 1
    call = {"order": order, BOUNDS[order]: bound, "budget": 48, "reuse": reuse, "return_dict_in_generate": True}
    calls = record_calls(model)
    out = model.generate(ids, attention_mask=real, seed=[5, 6, 7, 8, 9], **call)
    ran = [len(call["input_ids"]) for call in calls]
    spent = []
    for k, row in enumerate(rows):
        alone = model.generate(torch.tensor([row]), seed=[5 + k], **call)
        assert out.sequences[k, : len(row)].tolist() == alone.sequences[0].tolist()
        assert out.block_evaluations_per_sequence[k] == alone.block_evaluations
        assert torch.equal(out.iterations_taken[: alone.num_steps, k], alone.iterations_taken[:, 0])
        assert out.residuals[alone.num_steps :, :, k].isnan().all()
        spent.append(alone.num_steps)
    assert out.num_steps == max(spent) and len(set(spent)) > 1
    assert ran == [sum(steps > step for steps in spent) for step in range(max(spent))]  # nothing else was computed
    assert out.tokens_per_step == pytest.approx(sum(row.count(M) for row in rows) / sum(spent))
    assert out.block_evaluations == max(out.block_evaluations_per_sequence) <= 48


def test_steps_of_models_without_fixed_point_layers_end_early_too():
    model = lively_model(num_pre_layers=3, num_fixed_point_layers=0, num_post_layers=0)
    out = model.generate(
        batch_size=4, budget=24, order="entropy", entropy_bound=2.5, seed=0, return_dict_in_generate=True
    )
    assert out.num_steps < 8 and out.sequences.ne(MASK).all() and out.block_evaluations == 3 * out.num_steps
