# SPDX-License-Identifier: Apache-2.0
"""Algorithm 1's three states, one by one and against a loop over positions."""

import pytest
import torch

from fpmgm.models.reuse import REUSE_STATES, reuse_states, reuse_weights, visible_fraction, warm_start


M = 9  # the mask id


@pytest.mark.parametrize(
    ("previous", "now", "state", "gamma"),
    [
        (4, 4, "unchanged", 1.0),
        (M, M, "masked", 0.75 + 0.15 * 0.5),
        (M, 4, "changed", 0.2),  # revealed by the last step
        (3, 4, "remasked", 0.2),  # rewritten
        (4, M, "remasked", 0.2),  # masked again
    ],
)
def test_each_case_of_algorithm_1(previous, now, state, gamma):
    states = reuse_states(torch.tensor([[previous]]), torch.tensor([[now]]), M)
    assert REUSE_STATES[states.item()] == state
    assert reuse_weights(states, torch.tensor([0.5]), "3sr").item() == pytest.approx(gamma)
    assert reuse_weights(states, torch.tensor([0.5]), "full").item() == 1


def test_three_state_weights_position_by_position():
    previous, now = torch.randint(7, 10, (2, 4, 30))
    visible = torch.rand(4)
    found = reuse_weights(
        reuse_states(previous, now, M),
        visible,
        "3sr",
        gamma_unchanged=0.95,
        gamma_masked=(0.3, 0.7),
        gamma_changed=0.1,
        gamma_remasked=0.05,
    )
    for row in range(4):
        for i in range(30):
            if previous[row, i] != now[row, i]:
                expected = 0.1 if previous[row, i] == M else 0.05
            elif now[row, i] == M:
                expected = 0.3 + 0.4 * visible[row].item()
            else:
                expected = 0.95
            assert found[row, i].item() == pytest.approx(expected), (row, i)


def test_visible_fraction_counts_the_prompt_and_leaves_out_padding():
    ids = torch.tensor([[1, 2, M, M], [0, 1, M, 5], [0, 0, 0, M], [1, 2, 3, 4]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 0, 0]])
    assert visible_fraction(ids, M).tolist() == pytest.approx([1 / 2, 3 / 4, 3 / 4, 1])
    assert visible_fraction(ids, M, mask).tolist() == pytest.approx([1 / 2, 2 / 3, 0, 1])
    assert visible_fraction(ids, M, mask.bool()).tolist() == pytest.approx([1 / 2, 2 / 3, 0, 1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_warm_start_mixes_position_by_position(dtype):
    h_pre, previous = torch.randn(2, 2, 3, 4, dtype=torch.float64).to(dtype)
    weights = torch.tensor([[0.0, 1.0, 0.25], [0.5, 0.0, 1.0]])  # exact in every dtype
    start = warm_start(h_pre, previous, weights)
    assert start.dtype == dtype
    gamma = weights.double()[:, :, None]
    expected = gamma * previous.double() + (1 - gamma) * h_pre.double()
    torch.testing.assert_close(start.double(), expected, rtol=0, atol=1e-12 if dtype == torch.float64 else 0.02)
    assert torch.equal(start[0, 0], h_pre[0, 0]) and torch.equal(start[0, 1], previous[0, 1])


def test_warm_start_without_a_previous_solution_or_without_weights():
    h_pre, previous = torch.randn(2, 1, 2, 3)
    assert torch.equal(warm_start(h_pre), h_pre)
    assert torch.equal(warm_start(h_pre, None, torch.ones(1, 2)), h_pre)
    assert torch.equal(warm_start(h_pre, previous), previous)
