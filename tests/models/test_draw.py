# SPDX-License-Identifier: Apache-2.0
"""Draws and reveal steps on fine grids of uniforms: the share of the grid is the probability."""

import itertools
import math

import pytest
import torch

from fpmgm.models import draw
from fpmgm.models.draw import draw_tokens, draw_uniforms, truncate
from fpmgm.models.noise import stream_generator
from fpmgm.models.schedules import ancestral_reveal_steps, time_grid


GRID = 20_000
LAST = 1 - 2**-53  # the largest float64 that a uniform can be


def draws(*args, **kwargs):
    """The tokens of `draw_tokens`."""
    return draw_tokens(*args, **kwargs)[0]


def uniform_pair(batch_size, length, **kwargs):
    """Two uniforms for each position of a batch without padding."""
    return draw_uniforms(2, torch.ones(batch_size, length, dtype=torch.bool), **kwargs)


def grid(size: int = GRID) -> torch.Tensor:
    return (torch.arange(size, dtype=torch.float64) + 0.5) / size


def shares(logits: torch.Tensor, mask_token_id: int, **kwargs) -> torch.Tensor:
    """The share of a fine grid of uniforms that is mapped to each token."""
    drawn = draws(logits.expand(GRID, -1), grid(), mask_token_id, **kwargs)
    return drawn.bincount(minlength=logits.shape[-1]) / GRID


@pytest.mark.parametrize("mask_token_id", [0, 3, 7])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_draw_has_exactly_the_softmax_probabilities(temperature, mask_token_id):
    logits = 2 * torch.randn(8)
    logits[mask_token_id] = 9  # the mask would be the likeliest
    powers = [math.exp(value / temperature) for value in logits.tolist()]
    powers[mask_token_id] = 0
    expected = torch.tensor([power / sum(powers) for power in powers])
    found = shares(logits, mask_token_id, temperature=temperature)
    assert found[mask_token_id] == 0
    assert (found - expected).abs().max() <= 1.01 / GRID


@pytest.mark.parametrize("mask_token_id", [0, 2, 4])
@pytest.mark.parametrize("uniform", [0.0, 1e-300, 0.5, LAST])
def test_impossible_tokens_are_never_drawn(uniform, mask_token_id):
    # exp(−2000) is 0 in float64; what remains possible lies before, between and behind what is not.
    for possible in itertools.combinations(range(5), 2):
        logits = torch.full((1, 5), -2000.0)
        logits[:, list(possible)] = torch.randn(2)
        logits[:, mask_token_id] = 50.0
        drawn = draws(logits, torch.tensor([uniform], dtype=torch.float64), mask_token_id).item()
        assert drawn in set(possible) - {mask_token_id}


def test_draw_is_in_double_precision():
    # The rare token owns the last 1e-10 of the unit interval, which float32 cannot tell from 1.
    logits = torch.tensor([[0.0, math.log(1e-10), 5.0]]).repeat(2, 1)
    uniforms = torch.tensor([1 - 2e-10, 1 - 5e-11], dtype=torch.float64)
    assert draws(logits, uniforms, 2).tolist() == [0, 1]
    half = torch.randn(50, 8).bfloat16()
    assert torch.equal(draws(half, grid(50), 7), draws(half.double(), grid(50), 7))


def test_temperature_zero_takes_the_likeliest_token_but_the_mask():
    logits = torch.randn(100, 6)
    logits[:50, 2] = 10
    allowed = logits.clone()
    allowed[:, 2] = -1e9
    assert torch.equal(draws(logits, grid(100), 2, temperature=0), allowed.argmax(dim=1))
    assert logits[:50, 2].eq(10).all()  # the caller's logits are left alone


@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-308, 1e-30, 1e300])
@pytest.mark.parametrize("size", [1.0, 1e300])
def test_no_temperature_and_no_size_of_the_logits_overflows(temperature, size):
    logits = size * torch.randn(50, 6, dtype=torch.float64)
    allowed = logits.clone()
    allowed[:, 2] = float("-inf")
    drawn, probabilities = draw_tokens(logits, grid(50), 2, temperature, top_k=5, top_p=0.99)
    assert drawn.ne(2).all() and probabilities.gt(0).all() and probabilities.le(1).all()
    if temperature < 1:
        assert torch.equal(drawn, allowed.argmax(dim=1))


def test_draw_does_not_depend_on_the_chunks(monkeypatch):
    logits, uniforms = torch.randn(23, 6), torch.rand(23, dtype=torch.float64)
    whole = draws(logits, uniforms, 5, top_p=0.8)
    for elements in (1, 13, 24):
        monkeypatch.setattr(draw, "CHUNK_ELEMENTS", elements)
        assert torch.equal(draws(logits, uniforms, 5, top_p=0.8), whole)
    nothing = draws(logits[:0], uniforms[:0], 5)
    assert nothing.shape == (0,) and nothing.dtype == torch.long


@pytest.mark.parametrize("top_k", [1, 2, 5, 7, 100])
def test_top_k_keeps_the_k_largest(top_k):
    logits = torch.randn(40, 7, dtype=torch.float64)
    kept = truncate(logits, top_k, None).isfinite()
    for row, keep in zip(logits.tolist(), kept.tolist(), strict=True):
        assert {i for i in range(7) if keep[i]} == set(sorted(range(7), key=lambda i: -row[i])[:top_k])


def test_top_k_keeps_ties_with_the_last_one():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]])
    assert truncate(logits, 2, None).isfinite().tolist() == [[False, True, True, True, False]]


@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.62, 0.95, 0.999999])
def test_top_p_keeps_the_smallest_set_that_holds_p(top_p):
    logits = 1.5 * torch.randn(20, 6, dtype=torch.float64)
    kept = truncate(logits, None, top_p).isfinite()
    probabilities = logits.softmax(dim=1)
    for p, keep in zip(probabilities.tolist(), kept.tolist(), strict=True):
        # All subsets by size, and of one size the one that holds most.
        subsets = (subset for size in range(1, 7) for subset in itertools.combinations(range(6), size))
        enough = [subset for subset in subsets if sum(p[i] for i in subset) >= top_p]
        best = max((s for s in enough if len(s) == len(enough[0])), key=lambda s: sum(p[i] for i in s))
        assert tuple(i for i in range(6) if keep[i]) == best


def test_truncation_sees_the_tempered_distribution_without_the_mask():
    p = torch.tensor([0.4, 0.3, 0.2, 0.1])
    logits = torch.cat([p.log(), torch.tensor([20.0])])
    assert shares(logits, 4, top_k=1).tolist() == [1, 0, 0, 0, 0]
    torch.testing.assert_close(shares(logits, 4, top_k=2)[:2], torch.tensor([4 / 7, 3 / 7]), rtol=0, atol=1e-4)
    # Squared, 0.16 : 0.09 : 0.04 : 0.01 hold 0.53, 0.83 and 0.97 of their sum.
    sharp = shares(logits, 4, temperature=0.5, top_p=0.8)
    torch.testing.assert_close(sharp, torch.tensor([0.64, 0.36, 0, 0, 0]), rtol=0, atol=1e-4)
    # Among the three likeliest (4/9, 3/9, 2/9), two hold 0.7.
    both = shares(logits, 4, top_k=3, top_p=0.7)
    torch.testing.assert_close(both, torch.tensor([4 / 7, 3 / 7, 0, 0, 0]), rtol=0, atol=1e-4)


def surviving_shares(num_steps: int) -> list[float]:
    """Probability of still being masked after each step, by the chain of reveal probabilities (P_t − P_s)/P_t."""
    times = [1 - i * (1 - 1e-5) / num_steps for i in range(num_steps + 1)]
    masked = [(1 - 1e-3) * t for t in times]
    surviving = [1.0]
    for p_t, p_s in itertools.pairwise(masked):
        surviving.append(surviving[-1] * (1 - (p_t - p_s) / p_t))
    return surviving


@pytest.mark.parametrize("num_steps", [1, 2, 7, 64])
def test_reveal_steps_follow_the_chain_of_conditional_probabilities(num_steps):
    steps = ancestral_reveal_steps(grid().view(4, -1), num_steps)
    assert steps.shape == (4, GRID // 4)
    surviving = surviving_shares(num_steps)
    expected = [before - after for before, after in itertools.pairwise(surviving)] + surviving[-1:]
    found = steps.flatten().bincount(minlength=num_steps + 1) / GRID
    assert (found.double() - torch.tensor(expected, dtype=torch.float64)).abs().max() <= 1.01 / GRID


@pytest.mark.parametrize("num_steps", [1, 4, 128])
def test_reveal_steps_change_exactly_at_the_surviving_shares(num_steps):
    surviving = torch.tensor(surviving_shares(num_steps)[1:], dtype=torch.float64)
    assert surviving[-1].item() == pytest.approx(1e-5)  # P(1e-5)/P(1): what no step reveals
    above = ancestral_reveal_steps(surviving[None] * (1 + 1e-9), num_steps)
    below = ancestral_reveal_steps(surviving[None] * (1 - 1e-9), num_steps)
    assert above.tolist() == [list(range(num_steps))]
    assert below.tolist() == [list(range(1, num_steps + 1))]
    ends = torch.tensor([[0.0, LAST]], dtype=torch.float64)
    assert ancestral_reveal_steps(ends, num_steps).tolist() == [[num_steps, 0]]


def test_time_grid_ends():
    times = time_grid(4)
    assert times.dtype == torch.float64
    assert times.tolist() == pytest.approx([1, 0.7500025, 0.500005, 0.2500075, 1e-5], abs=1e-15)


def test_seeds_give_each_row_its_stream():
    reveal, token = uniform_pair(3, 5, seed=[8, 2, 8])
    assert reveal.shape == token.shape == (3, 5) and reveal.dtype == token.dtype == torch.float64
    assert torch.equal(reveal[0], reveal[2]) and torch.equal(token[0], token[2])
    assert torch.equal(reveal[1], uniform_pair(1, 5, seed=[2])[0][0])
    assert torch.equal(token[1], uniform_pair(1, 5, seed=2)[1][0])  # seed s is the stream (s, row)
    batch = uniform_pair(4, 5, seed=2)
    assert torch.equal(batch[0][:2], uniform_pair(2, 5, seed=2)[0])
    assert len({value for part in batch for value in part.flatten().tolist()}) == 40
    # Golden: samples stay the same from version to version.
    assert uniform_pair(2, 1, seed=0)[0].flatten().tolist() == [0.8815075204518859, 0.1986747844851391]


def test_without_a_seed_the_generator_or_torch_decides():
    first = uniform_pair(2, 5, generator=stream_generator("a"))
    assert torch.equal(first, uniform_pair(2, 5, generator=stream_generator("a")))
    assert not torch.equal(first[0], first[1])
    torch.manual_seed(3)
    draw = uniform_pair(2, 5)
    torch.manual_seed(3)
    assert torch.equal(draw, uniform_pair(2, 5))
    assert not torch.equal(draw, uniform_pair(2, 5))
