# SPDX-License-Identifier: Apache-2.0
"""lm-eval's model against enumeration of every mask, and against plain loops."""

import json
import math
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fpmgm.evaluation.lm_eval import MGMLM, PROTOCOLS, make_table

from ..testing_utils import tiny_model


EOS, MASK = 0, 10
WORDS = "abcdefghi"  # ids 1 … 9


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per letter."""
    vocabulary = {"<eos>": EOS, "<mask>": MASK, **{word: i for i, word in enumerate(WORDS, 1)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", mask_token="<mask>")


def evaluated(model=None, **arguments) -> MGMLM:
    model = tiny_model().double() if model is None else model
    return MGMLM(model, tokenizer=tiny_tokenizer(), device="cpu", **arguments)


def scores(lm: MGMLM, *pairs: tuple[str, str]) -> list[tuple[float, bool]]:
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    return lm.loglikelihood(requests, disable_tqdm=True)


@torch.no_grad()
def losses(model, ids: list[int], masks: list[tuple[bool, ...]], time: float = 1.0) -> np.ndarray:
    """Σ over masked positions of −log p(token) for each mask, from the logits of every position."""
    ids, masked = torch.tensor(ids), torch.tensor(masks)
    logits = model(ids.masked_fill(masked, MASK), timesteps=torch.full((len(masked),), time)).logits
    logits[..., MASK] = -torch.inf
    token_losses = -logits.log_softmax(dim=-1).gather(2, ids.expand(len(masked), -1)[..., None])[..., 0]
    return (token_losses * masked).sum(dim=1).numpy()


def exact_score(protocol: str, model, prefix: list[int], target: list[int]) -> float:
    """The expected score: every mask with its probability, the integral over t by Gauss–Legendre quadrature."""
    size = len(target)
    if protocol == "pgm":
        ids = [EOS, *prefix, *target, EOS]
        masks = list(product([False, True], repeat=len(ids)))[1:]
        nodes, shares = np.polynomial.legendre.leggauss(24)
        expected = 0.0
        for node, share in zip(nodes, shares, strict=True):
            t = 1e-3 + (1 - 1e-3) * (node + 1) / 2
            p = (1 - 1e-3) * t
            chances = np.array([p ** sum(mask) * (1 - p) ** (len(ids) - sum(mask)) for mask in masks])
            expected += share / 2 * (chances * losses(model, ids, masks, t)).sum() / t
        return -expected / len(ids)
    masks = list(product([False, True], repeat=size))[1:]
    counts = [sum(mask) for mask in masks]
    if protocol == "llada":  # P(k) = 1/L, weight L/k
        weights = [1 / math.comb(size, k) / k for k in counts]
    else:  # ∫ t^(k−1) (1 − t)^(L−k) dt
        weights = [math.gamma(k) * math.gamma(size - k + 1) / math.gamma(size + 1) for k in counts]
    whole = [(False,) * len(prefix) + mask for mask in masks]
    return -(np.array(weights) * losses(model, prefix + target, whole)).sum()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_mean_over_draws_is_the_enumerated_bound(protocol):
    lm = evaluated(protocol=protocol, mc_num=4000)
    estimates = []
    for lm.seed in range(30):
        estimates.append(scores(lm, ("a b", " c d e"))[0][0])
    error = np.std(estimates, ddof=1) / len(estimates) ** 0.5
    exact = exact_score(protocol, lm.model, [1, 2], [3, 4, 5])
    assert error < 0.005 * abs(exact)
    assert abs(np.mean(estimates) - exact) < 4 * error


def test_a_model_that_is_told_the_time_gets_that_of_each_draw():
    lm = evaluated(tiny_model(time_conditioning=True, scale=0.6).double(), mc_num=64)
    estimates = []
    for lm.seed in range(40):
        estimates.append(scores(lm, ("a", " b"))[0][0])
    error = np.std(estimates, ddof=1) / len(estimates) ** 0.5
    assert abs(np.mean(estimates) - exact_score("pgm", lm.model, [1], [2])) < 4 * error
