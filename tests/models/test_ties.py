# SPDX-License-Identifier: Apache-2.0
"""Positions that see the same are equal, whatever rounding says: of equals the first come first, in any batch.

Without a prompt, and without a place of their own in the embedding, all positions of a text have the same logits but
for the last bits, which depend on what else is in the batch.
"""

import itertools
import math

import pytest
import torch

from fpmgm.models.certainty import most_confident
from fpmgm.models.draw import COARSE_TIE, TIE, draw_tokens, truncate
from tests.models.helpers import lively_model
from tests.models.reference_mdlm import reference_forward


TEMPERATURE = 3.0  # no text of the enumeration is rare


def test_unprompted_positions_differ_by_rounding_alone():
    logits = lively_model()(torch.full((1, 8), 10)).logits[0]
    assert 0 < (logits - logits[:1]).abs().max() < 1e-13


@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"top_k": 3}, {"reuse": "none", "top_p": 0.8}], ids=str)
@pytest.mark.parametrize("length", [8, 16])
def test_a_row_with_ties_is_the_row_alone(length, options):
    model, seeds = lively_model(max_position_embeddings=24), list(range(12))
    call = {"order": "confidence", "num_steps": 6, "iterations": 2, **options}
    ids = torch.full((12, length + 7), 10)
    real = torch.ones_like(ids)
    real[1:, :7] = 0  # positions are turned, and rounded, otherwise
    batch = model.generate(ids, seed=seeds, attention_mask=real, **call)
    for row in range(1, 12):
        alone = model.generate(ids[:1, :length], seed=seeds[row : row + 1], **call)
        assert torch.equal(alone[0], batch[row, 7:])


def enumerated(model, length: int, counts: list[int], iterations: int) -> dict[tuple[int, ...], float]:
    """Probability of each text in the confidence order, by all draws at all steps; ties go to the first positions."""
    mask, weights = model.config.mask_token_id, model.state_dict()
    states = {(mask,) * length: 1.0}
    for count in counts:
        following = {}
        for ids, p_ids in states.items():
            logits = reference_forward(model.config, weights, torch.tensor([ids]), iterations=iterations).logits[0]
            p = (logits[:, :mask] / TEMPERATURE).softmax(dim=-1).tolist()
            masked = [i for i, token in enumerate(ids) if token == mask]
            for drawn in itertools.product(range(mask), repeat=len(masked)):
                ranked = sorted(
                    zip(masked, drawn, strict=True), key=lambda x: (-round(math.log(p[x[0]][x[1]]), 8), x[0])
                )
                after = list(ids)
                for i, token in ranked[:count]:
                    after[i] = token
                chance = p_ids * math.prod(p[i][token] for i, token in zip(masked, drawn, strict=True))
                following[tuple(after)] = following.get(tuple(after), 0) + chance
        states = following
    return states


@pytest.mark.parametrize("counts", [[2, 1], [2, 2], [1, 1, 1]], ids=str)
def test_tied_draws_follow_the_enumerated_distribution(counts):
    model, rows = lively_model(vocab_size=3, mask_token_id=2), 6_000
    expected = enumerated(model, sum(counts), counts, iterations=3)
    assert sum(expected.values()) == pytest.approx(1) and min(expected.values()) * rows > 5
    tokens = model.generate(
        length=sum(counts), batch_size=rows, num_steps=len(counts), iterations=3, order="confidence", reuse="none",
        temperature=TEMPERATURE, seed=1,
    )  # fmt: skip
    found = dict.fromkeys(expected, 0)
    for text in tokens.tolist():
        found[tuple(text)] += 1
    statistic = sum((found[text] - rows * p) ** 2 / (rows * p) for text, p in expected.items())
    # χ² has mean n and variance 2n for n degrees of freedom: 5 standard deviations.
    freedom = len(expected) - 1
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


def test_equals_are_ranked_by_place_and_others_by_probability():
    p = torch.tensor([0.3, 0.5, 0.3, 0.5, 0.5, 0.3], dtype=torch.float64)
    noise = torch.tensor([0, 1, 3, 2, 3, 1], dtype=torch.float64) * 2.0**-52
    rows, counts = torch.zeros(6, dtype=torch.long), torch.tensor([4])
    assert most_confident(p + noise, rows, counts).tolist() == [0, 1, 3, 4]
    assert most_confident(p * (1 + noise * 2**24), rows, counts).tolist() == [1, 2, 3, 4]  # not rounding: 0.3 differ
    assert most_confident(p * (1 + noise * 2**24), rows, counts, COARSE_TIE).tolist() == [0, 1, 3, 4]
    # A row of neighbours that differ by rounding is one group, wherever a grid would cut it; rows stay apart.
    close = torch.tensor([0.5, 0.5 + TIE / 8, 0.5 + TIE / 4, 0.5 + TIE / 8, 0.5], dtype=torch.float64)
    rows = torch.tensor([0, 0, 0, 1, 1])
    assert most_confident(close, rows, torch.tensor([2, 1])).tolist() == [0, 1, 3]


def test_single_precision_breaks_no_ties_either():
    model, call = lively_model(), {"order": "confidence", "num_steps": 4, "iterations": 3, "batch_size": 16, "seed": 2}
    expected = model.generate(**call)
    assert (model.float().generate(**call) == expected).float().mean() > 0.95  # other draws flip as rarely as ever


def test_tokens_that_differ_by_rounding_are_equal_too():
    noise = 3 * 2.0**-52
    logits = torch.tensor([[1.0, 2.0 + noise, 2.0, -5.0], [1.0, 2.0, 2.0 + noise, -5.0]], dtype=torch.float64)
    uniforms = torch.full((2,), 0.5, dtype=torch.float64)
    assert draw_tokens(logits, uniforms, 3, temperature=0)[0].tolist() == [1, 1]
    assert truncate(logits, 1, None).isfinite().tolist() == [[False, True, True, False]] * 2
    half = torch.tensor([[0.5, 0.25, 0.25], [0.5 - 1e-16, 0.25, 0.25]], dtype=torch.float64).log()
    assert truncate(half, None, 0.5).isfinite().sum(dim=1).tolist() == [1, 1]
