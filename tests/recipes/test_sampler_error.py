# SPDX-License-Identifier: Apache-2.0
"""The perfect denoiser of a hidden Markov chain against all texts of a chain small enough to be counted."""

import itertools

import pytest
import torch

from study.sampler_error import RULES, HiddenMarkovChain, PerfectDenoiser, SamplerErrorArguments, main, measure


S, V, L = 2, 3, 4
TEXTS = torch.tensor(list(itertools.product(range(V), repeat=L)))  # (81, L)


def joint(chain) -> torch.Tensor:
    """(81,) p of all texts, as a sum over all paths of hidden states."""
    p = torch.zeros(len(TEXTS), dtype=torch.float64)
    for path in itertools.product(range(S), repeat=L):
        moves = torch.stack([chain.start[path[0]], *(chain.moves[a, b] for a, b in itertools.pairwise(path))]).prod()
        p += moves * torch.stack([chain.emissions[s, TEXTS[:, i]] for i, s in enumerate(path)]).prod(dim=0)
    return p


def test_probabilities_and_posteriors_are_those_of_all_texts():
    chain = HiddenMarkovChain.random(S, V, seed=1)
    p = joint(chain)
    assert p.sum().item() == pytest.approx(1)
    torch.testing.assert_close(chain.log_probability(TEXTS), p.log())
    for seen in ([V, V, V, V], [V, 2, V, V], [0, V, V, 1], [V, 1, 0, 2]):
        seen = torch.tensor(seen)
        fits = ((seen == V) | (seen == TEXTS)).all(dim=1) * p
        for i in (seen == V).nonzero().flatten().tolist():
            expected = torch.stack([fits[TEXTS[:, i] == v].sum() for v in range(V)]) / fits.sum()
            torch.testing.assert_close(chain.posterior(seen[None], V)[0, i], expected)


def test_one_step_draws_the_product_of_marginals_and_one_symbol_a_step_draws_the_truth():
    rows = [0.5, 0.5], [[0.95, 0.05], [0.05, 0.95]], [[0.9, 0.1, 0.0], [0.0, 0.1, 0.9]]
    chain = HiddenMarkovChain(*(torch.tensor(values, dtype=torch.float64) for values in rows))
    p, model = joint(chain), PerfectDenoiser(chain, L)
    marginals = torch.stack([torch.stack([p[TEXTS[:, i] == v].sum() for v in range(V)]) for i in range(L)])
    product = marginals[torch.arange(L), TEXTS].prod(dim=1)
    weights = V ** torch.arange(L).flip(0)
    certain = {"order": "entropy", "entropy_bound": 0.0}  # reveals nothing uncertain together, and adds no error
    apart = {"order": "halton"}
    cases = ((1, {}, product, p), (1, apart, product, p), (200, {}, p, product), (4, apart, p, product),
             (4, certain, p, product))  # fmt: skip
    for steps, options, expected, other in cases:
        drawn = model.generate(batch_size=4000, seed=0, budget=steps, num_steps=steps, **options)
        shares = torch.bincount((drawn * weights).sum(dim=1), minlength=len(TEXTS)) / 4000
        assert (shares - expected).abs().sum() < 0.12
        assert (shares - other).abs().sum() > 0.5


def test_tokens_far_apart_leave_less_than_half_of_the_samplers_error():
    args = SamplerErrorArguments(num_samples=1000)
    chain = HiddenMarkovChain.random(args.num_states, args.num_symbols, args.seed)
    rates = -chain.log_probability(chain.sample(4000, args.length, args.seed)) / args.length
    model = PerfectDenoiser(chain, args.length)
    near, apart = (measure(model, rule, 8, args, rates) for rule in ({}, {"order": "halton"}))
    assert near["excess"] > 0.09 and apart["excess"] < 0.5 * near["excess"]
    assert abs(apart["unigram_entropy"] - near["unigram_entropy"]) < 0.05  # and no diversity is lost for it


def test_the_table_has_every_rule(tmp_path):
    sizes = ["--num_states", "3", "--num_symbols", "4", "--length", "6", "--num_samples", "20"]
    found = main([*sizes, "--num_steps", "1", "6", "--output", str(tmp_path / "error")])
    assert len(found["rows"]) == 2 * len(RULES)
    table = (tmp_path / "error.md").read_text().splitlines()
    assert table[3].startswith("| final argmax |")
    assert all(line.count("±") == 2 for line in table[2 : 2 + len(RULES)])
