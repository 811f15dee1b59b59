# SPDX-License-Identifier: Apache-2.0
"""MAUVE on features whose distributions are known, and a judge's features against a loop over texts."""

import numpy as np
import pytest
import torch

from fpmgm.evaluation import mauve_score
from fpmgm.evaluation.mauve import _batch_features, last_token_features
from tests.evaluation.helpers import TEXTS, tiny_judge
from tests.testing_utils import refused


def numbered(prefix: str, count: int) -> list[str]:
    return [f"{prefix} {i}" for i in range(count)]


def shifted_normal(texts: list[str]) -> np.ndarray:
    """A point of a normal distribution for each text, around a centre that its first word chooses."""
    centre = {"human": 0.0, "alike": 0.0, "near": 0.7, "far": 5.0}
    rows = []
    for text in texts:
        kind, number = text.split()
        rng = np.random.default_rng([int(number), kind == "human"])
        rows.append(rng.normal(size=6) + np.array([centre[kind], 3, 0, 0, 0, 0]))
    return np.array(rows)


def test_mauve_falls_as_the_distributions_part():
    pytest.importorskip("mauve")
    human = numbered("human", 200)
    scores = {
        kind: mauve_score(numbered(kind, 200), human, shifted_normal, num_samples=200)
        for kind in ("alike", "near", "far")
    }
    assert scores["alike"]["mauve"] > 0.93 and scores["near"]["mauve"] < 0.9
    assert scores["far"]["mauve"] < 0.1 < scores["near"]["mauve"]
    protocol = scores["far"]["protocol"]
    assert protocol["featurizer"] == "shifted_normal" and protocol["max_length"] is None
    assert (protocol["num_samples"], protocol["num_buckets"], protocol["scaling_factor"]) == (200, 20, 5.0)
    # Only the first `num_samples` of each side count.
    more = mauve_score(numbered("far", 250), [*human, "far 0"], shifted_normal, num_samples=200)
    assert more["mauve"] == scores["far"]["mauve"]


@torch.no_grad()
def test_features_are_the_last_hidden_state_at_the_last_token(tmp_path, monkeypatch):
    judge = tiny_judge()
    found = last_token_features(judge, TEXTS, max_length=24, batch_size=4)
    for text, feature in zip(TEXTS, found, strict=True):
        ids = judge.tokenizer(text, split_special_tokens=True)["input_ids"][:24] or [judge.tokenizer.eos_token_id]
        state = judge.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, -1]
        np.testing.assert_allclose(feature, state.numpy(), rtol=1e-5, atol=1e-6)
    judge.tokenizer.eos_token = None
    refused("`texts` has one without a token", last_token_features, judge, TEXTS, max_length=24)
    judge = tiny_judge()
    last_token_features(judge, TEXTS[:4], max_length=24, batch_size=4, cache_dir=tmp_path)
    calls = []
    monkeypatch.setattr("fpmgm.evaluation.mauve._batch_features", lambda *a: calls.append(1) or _batch_features(*a))
    again = last_token_features(judge, TEXTS, max_length=24, batch_size=4, cache_dir=tmp_path)
    assert len(calls) == 1 and np.array_equal(again, found)
