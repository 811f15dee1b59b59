# SPDX-License-Identifier: Apache-2.0
"""The truth as a judge, against all texts of a world small enough to be counted."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from fpmgm.evaluation import TruthJudge, energy_distance, load_truth, measure_samples, sample_texts
from tests.evaluation.helpers import tiny_judge
from tests.testing_utils import refused


V, L, START = 3, 4, 2
TEXTS = list(itertools.product(range(V), repeat=L))  # all 81


def causal_model(seed: int = 0) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=V, n_positions=L, n_embd=8, n_layer=1, n_head=1, bos_token_id=START, initializer_range=0.4
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config).double().eval()


def joint(model) -> torch.Tensor:
    """(81,) p of all texts, token by token."""
    probabilities = []
    for text in TEXTS:
        p = 1.0
        for i, token in enumerate(text):
            p *= model(torch.tensor([[START, *text[:i]]])).logits[0, -1].softmax(dim=-1)[token].item()
        probabilities.append(p)
    return torch.tensor(probabilities, dtype=torch.float64)


def keys(count: int, seed: int = 0) -> list[tuple[int, int]]:
    return [(seed, row) for row in range(count)]


def judge_of(model, count: int = 4000) -> TruthJudge:
    return TruthJudge("tiny truth", model, *sample_texts(model, keys(count), L))


def test_texts_are_drawn_as_often_as_they_are_likely_and_their_surprise_is_exact():
    model = causal_model()
    p = joint(model)
    assert p.sum().item() == pytest.approx(1)
    drawn, surprise = sample_texts(model, keys(4000), L)
    places = (drawn * V ** torch.arange(L).flip(0)).sum(dim=1)
    torch.testing.assert_close(surprise, -p.log()[places])
    expected = 4000 * p
    often = expected > 5
    spread = (torch.bincount(places, minlength=81) - expected)[often].square() / expected[often]
    assert spread.sum() < often.sum() + 4 * math.sqrt(2 * often.sum())  # χ²
    judge = TruthJudge("tiny truth", model, drawn, surprise)
    entropy = -(p * p.log()).sum().item() / L
    assert abs(judge.entropy_rate - entropy) < 4 * judge.entropy_rate_standard_error < 0.1


def test_a_text_depends_on_its_own_key_only():
    model = causal_model()
    together, _ = sample_texts(model, [(0, 5), (0, 6), (1, 6)], L)
    alone, _ = sample_texts(model, [(0, 6)], L)
    assert together[1].tolist() == alone[0].tolist()
    assert not sample_texts(model, keys(50), L)[0].equal(sample_texts(model, keys(50, seed=1), L)[0])
    assert len({tuple(row) for row in sample_texts(model, keys(50), L)[0].tolist()}) > 10


def test_excess_is_the_cross_entropy_of_counted_texts_less_the_entropy_rate():
    model, p = causal_model(), joint(causal_model())
    judge = judge_of(model, count=100)
    found = judge.generative_perplexity(TEXTS, batch_size=7)  # the uniform distribution, all of it
    losses = -p.log() / L
    assert found["excess"] == pytest.approx(losses.mean().item() - judge.surprise.mean().item() / L)
    assert found["generative_perplexity"] == pytest.approx(losses.mean().exp().item())
    error = math.hypot(losses.std().item() / 9, judge.surprise.std().item() / L / 10)
    assert found["excess_standard_error"] == pytest.approx(error)
    own = judge_of(model).generative_perplexity(sample_texts(model, keys(2000, seed=1), L)[0])
    assert abs(own["excess"]) < 4 * own["excess_standard_error"]
    assert judge.generative_perplexity([[V, 0, 0, 0]])["excess"] == math.inf  # an id that the truth does not have


class Posterior(nn.Module):
    """The perfect denoiser of a world: p(token at a masked place | visible tokens), by counting."""

    def __init__(self, p: torch.Tensor):
        super().__init__()
        self.p, self.texts = nn.Parameter(p, requires_grad=False), torch.tensor(TEXTS)
        self.config = SimpleNamespace(
            num_fixed_point_layers=0, max_position_embeddings=L, mask_token_id=V, vocab_size=V + 1
        )
        self.name_or_path, self.device, self.dtype = "posterior", torch.device("cpu"), torch.float64

    def forward(self, input_ids, logits_positions, logits_loss, **ignored):
        fits = ((input_ids[:, None] == V) | (input_ids[:, None] == self.texts)).all(dim=-1)  # (B, 81)
        weights = fits * self.p
        marginals = torch.einsum("bn,nlv->blv", weights, nn.functional.one_hot(self.texts, V).double())
        logits = (marginals / weights.sum(dim=1)[:, None, None]).log().flatten(0, 1)[logits_positions]
        logits_loss(logits, slice(None))


def test_the_likelihood_of_the_perfect_denoiser_has_no_excess_and_that_of_a_worse_one_has():
    model = causal_model()
    p, judge = joint(model), judge_of(model, count=500)
    perfect = judge.likelihood_excess(Posterior(p), num_draws=8, batch_size=100)
    assert abs(perfect["likelihood_excess"]) < 4 * perfect["likelihood_excess_standard_error"] < 0.1
    uniform = judge.likelihood_excess(Posterior(torch.full((81,), 1 / 81).double()), num_draws=8, batch_size=100)
    error = uniform["likelihood_excess_standard_error"]
    assert uniform["likelihood_excess"] == pytest.approx(math.log(V) - judge.entropy_rate, abs=4 * error)
    assert uniform["likelihood_excess"] > 4 * error


def test_energy_distance_is_its_definition_and_permutations_tell_the_same_kind_from_another():
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(20, 3)), generator.normal(size=(15, 3))

    def mean(a, b):
        return np.mean([[np.linalg.norm(u - v) for v in b] for u in a])

    found = energy_distance(x, y)
    assert found["energy_distance"] == pytest.approx(2 * mean(x, y) - mean(x, x) - mean(y, y))
    low, high = found["energy_distance_same"]
    assert low < found["energy_distance"] < high and found["energy_distance_p"] > 0.05
    moved = energy_distance(x, y + 2)
    assert moved["energy_distance"] > moved["energy_distance_same"][1] and moved["energy_distance_p"] < 0.01


def test_samples_measured_by_the_truth_have_distances_from_its_own_texts():
    model = causal_model()
    judge = judge_of(model, count=200)
    own = measure_samples(sample_texts(model, keys(100, seed=1), L)[0].tolist(), None, judge)
    other = measure_samples([[0, 0, 0, 0], [0, 0, 0, 1]] * 50, None, judge)
    assert own["energy_distance_p"] > 0.01 > other["energy_distance_p"]
    assert other["energy_distance"] > own["energy_distance"] and other["mauve"] < own["mauve"]
    refused("`references` are texts for MAUVE", measure_samples, [[0, 0, 0, 0]], None, judge, references=["a"])


def test_what_cannot_be_judged_is_refused(tmp_path):
    judge = judge_of(causal_model(), count=5)
    refused("`sequences` have \\[2\\] tokens", judge.generative_perplexity, [[0, 1]])
    causal_model().save_pretrained(tmp_path)
    refused("`length`=5 must lie between 1 and the 4 positions", load_truth, tmp_path, 5, num_texts=2, device="cpu")
    refused("`num_texts`=1 must be", load_truth, tmp_path, 4, num_texts=1, device="cpu")  # whose error nothing tells
    refused("`references` are 1 and `surprise` 1: give two texts", judge_of, causal_model(), count=1)
    for count in (1, 6):
        refused(f"`num_texts`={count}", judge.likelihood_excess, Posterior(joint(causal_model())), num_texts=count)
    assert judge.generative_perplexity([[0, 1, 0, 1]])["excess_standard_error"] is None
    wrong = (([[0.0, np.nan]], "must be finite"), ([[0.0]], "of shapes"), (np.zeros((0, 2)), "of shapes"))
    for first, message in wrong:
        refused(message, energy_distance, np.array(first), np.zeros((3, 2)))
    nameless = tiny_judge().model
    nameless.config.bos_token_id = None
    refused("has no `bos_token_id`", sample_texts, nameless, keys(1), 2)
