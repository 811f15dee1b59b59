# SPDX-License-Identifier: Apache-2.0
"""Sweeps against plain loops, comparisons against plain counts, latency by a clock that is known."""

import itertools
import statistics

import numpy as np
import pytest
import torch

from fpmgm.evaluation import (
    NGramJudge,
    TruthJudge,
    clearly_below,
    compare_values,
    grid,
    latency,
    measure_latency,
    pool_settings,
    sweep,
    unigram_entropy,
)
from tests.evaluation.helpers import tiny_judge
from tests.testing_utils import refused, tiny_model


TEXT = np.random.default_rng(0).integers(0, 12, (30, 8))


def model_and_judge(**options):
    judge = tiny_judge()
    sizes = {"vocab_size": len(judge.tokenizer), "mask_token_id": judge.tokenizer.mask_token_id}
    return tiny_model(**sizes, **options), judge.tokenizer, NGramJudge(TEXT, len(judge.tokenizer))


def test_a_sweep_is_a_loop_over_its_settings():
    model, tokenizer, judge = model_and_judge()
    settings = grid(num_steps=[2, 3], iterations=[1, 2], reuse=["none", "full"])
    expected = [
        {"num_steps": s, "iterations": n, "reuse": r} for s in (2, 3) for n in (1, 2) for r in ("none", "full")
    ]
    assert settings == expected
    rows = sweep(model, tokenizer, judge, settings, num_samples=5, batch_size=2)
    for row, setting in zip(rows, settings, strict=True):
        drawn = model.generate(batch_size=5, seed=list(range(5)), **setting).numpy()
        log_p = judge.log_probabilities(drawn)[:, 1:]
        losses = [-np.mean(text) for text in log_p]
        assert row["generative_perplexity"] == pytest.approx(np.exp(np.mean(losses)))
        error = np.exp(np.mean(losses)) * statistics.stdev(losses) / 5**0.5
        assert row["generative_perplexity_standard_error"] == pytest.approx(error)
        assert row["unigram_entropy"] == pytest.approx(unigram_entropy(drawn))
        assert (
            row["sampling"]["options"] == setting and row["iterations"] == [setting["iterations"]] * row["num_steps"]
        )
        protocol = row["protocol"]["generative_perplexity"]
        assert (protocol["judge"], protocol["judge_weights"]) == ("4-gram model", judge.weights)
    assert judge.weights != NGramJudge(TEXT[:-1], judge.vocab_size).weights


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], "`settings` is empty"),
        ([{"budget": 12}, {"budget": 2}], "`budget`=2 cannot pay"),
        ([{"budget": 12}, {"reuse": "half"}], "`reuse`='half' must be one of"),
        ([{"budget": 12}, {"num_steps": 3, "iterations": [1, 1]}], "`num_steps`=3 must be the length 2"),
        ([{"budget": 12}, {"budgets": 12}], "unknown generation argument"),
        ([{"budget": 12}, {"remask": 0.1, "order": "halton"}], "`remask`=0.1 needs `order`='ancestral'"),
        ([{"budget": 12}, {"iterations_per_step": 2, "num_steps": 3}], "`iterations_per_step`=2 chooses the number"),
        ([{"budget": 12}, {"order": "random"}], "`order`='random' must be one of"),
        ([{"budget": 12}, {"guidance_scale": 2.0}], "`guidance_scale`=2.0 needs `class_labels`"),
        ([{"budget": 12}, {"stop_at_eos": True}], "`stop_at_eos`=True cuts texts"),
        ([{"budget": 12}, {"seed": 1}], "seed"),
    ],
)
def test_a_setting_without_sense_is_refused_before_the_first_is_run(settings, message, monkeypatch):
    model, tokenizer, judge = model_and_judge()
    monkeypatch.setattr(model, "generate", lambda **options: pytest.fail("sampled"))
    refused(message, sweep, model, tokenizer, judge, settings, num_samples=2)


def test_what_cannot_be_judged_is_refused_before_the_first_is_run(monkeypatch):
    model, tokenizer, _ = model_and_judge()
    monkeypatch.setattr(model, "generate", lambda **options: pytest.fail("sampled"))
    judge = tiny_judge()
    for options, message in (
        ({}, "`max_length`=1024 must be at most 24"),
        ({"max_length": 24, "references": ["a text"]}, "`references` are 1, fewer than `num_samples`=2"),
    ):
        refused(message, sweep, model, tokenizer, judge, [{"budget": 12}], num_samples=2, **options)
    judge = TruthJudge("truth", judge.model, torch.zeros(2, 5).long(), torch.ones(2))
    with pytest.raises(ValueError, match="`length`=8, but the entropy rate of 'truth' is known for texts of 5"):
        sweep(model, tokenizer, judge, [{"budget": 12}], num_samples=2)


def test_an_interrupted_sweep_repeats_nothing_even_if_defaults_that_it_sets_changed(tmp_path, monkeypatch):
    model, tokenizer, judge = model_and_judge()
    settings, options = grid(budget=[6, 12], gamma_changed=[0.1, 0.5]), {"num_samples": 4, "batch_size": 2}
    straight = sweep(model, tokenizer, judge, settings, **options)
    generate, calls = model.generate, []

    def interrupted(**arguments):
        calls.append((arguments["budget"], arguments["gamma_changed"], *arguments["seed"]))
        if len(calls) == 6:
            raise KeyboardInterrupt
        return generate(**arguments)

    monkeypatch.setattr(model, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep(model, tokenizer, judge, settings, cache_dir=tmp_path, **options)
    model.generation_config.gamma_changed = 0.5  # as after its best value was written
    again = sweep(model, tokenizer, judge, settings, cache_dir=tmp_path, **options)
    assert [row["sample"] for row in again] == [row["sample"] for row in straight]
    assert [row["generative_perplexity"] for row in again] == [row["generative_perplexity"] for row in straight]
    assert len(calls) == 9 and len(set(calls)) == 8  # of eight batches one was begun twice
    model.generation_config.gamma_masked = [0.0, 0.0]  # what it does not set matters
    sweep(model, tokenizer, judge, settings, cache_dir=tmp_path, **options)
    assert len(calls) == 17


def test_an_ngram_judge_refuses_what_it_cannot_judge():
    model, tokenizer, judge = model_and_judge()
    with pytest.raises(ValueError, match="texts for MAUVE under a language model"):
        sweep(model, tokenizer, judge, [{}], num_samples=2, references=["a", "b"])
    with pytest.raises(ValueError, match="ids from 11 to 12, the vocabulary 12: judge and model must have one"):
        NGramJudge(TEXT, 12).perplexity(np.array([[11, 12]]))


def table(perplexity: dict, entropy: dict | None = None, error: float = 0.01) -> list[dict]:
    """Rows of a sweep over allocation, budget and reuse."""
    names = ("allocation", "budget", "reuse")
    return [
        {
            "generative_perplexity": value,
            "generative_perplexity_standard_error": value * error,
            "unigram_entropy": (entropy or {}).get(key, 5.0),
            "sampling": {"options": dict(zip(names, key, strict=True))},
        }
        for key, value in perplexity.items()
    ]


def test_values_are_compared_by_mean_and_rank_over_everything_else():
    rng = np.random.default_rng(1)
    allocations, rest = ("fixed", "cosine", "decreasing"), list(itertools.product((96, 192), ("none", "full", "3sr")))
    perplexity = {(a, *r): float(rng.integers(3, 7)) for a in allocations for r in rest}  # with ties
    found = {value["allocation"]: value for value in compare_values(table(perplexity), "allocation")}
    for a in allocations:
        mine = [perplexity[(a, *r)] for r in rest]
        ranks = [
            sorted(perplexity[(b, *r)] for b in allocations).index(p) + 1 for p, r in zip(mine, rest, strict=True)
        ]
        assert found[a]["mean_generative_perplexity"] == pytest.approx(np.mean(mine))
        assert found[a]["average_rank"] == pytest.approx(np.mean(ranks))
        assert (found[a]["unbeaten"], found[a]["settings"]) == (ranks.count(1), 6)
        error = 0.01 * np.linalg.norm(mine) / 6
        assert found[a]["mean_generative_perplexity_standard_error"] == pytest.approx(error)
    assert sum(value["unbeaten"] for value in found.values()) > 6  # ties are unbeaten
    noisy = compare_values(iter(table(perplexity, error=0.5)), "allocation")
    assert [value["unbeaten"] for value in noisy] == [6, 6, 6]  # and so is what noise explains
    means = [value["mean_generative_perplexity"] for value in compare_values(table(perplexity), "allocation")]
    assert means == sorted(means)
    del perplexity["fixed", 96, "full"]
    with pytest.raises(ValueError, match="two rows have the setting"):  # of another model, say: which one counts?
        compare_values([*table(perplexity), *table(perplexity)], "allocation")
    with pytest.raises(ValueError, match=r"the rows lack \[\{'allocation': 'fixed'\}\]: compare over a full grid"):
        compare_values(table(perplexity), "allocation")
    refused(r"does not set \['num_steps'\]", compare_values, table(perplexity), "num_steps")


def test_pooled_settings_keep_their_entropy_at_every_budget():
    perplexity = {("fixed", 96, "none"): 8.0, ("fixed", 192, "none"): 2.0, ("fixed", 96, "full"): 6.0,
                  ("fixed", 192, "full"): 1.5, ("fixed", 96, "3sr"): 9.0, ("fixed", 192, "3sr"): 1.0}  # fmt: skip
    entropy = {("fixed", 192, "full"): 4.9}
    found = pool_settings(table(perplexity, entropy), {"reuse": "none"})
    assert [value["setting"]["reuse"] for value in found] == ["3sr", "none", "full"]
    assert [value["generative_perplexity"] for value in found] == pytest.approx([3.0, 4.0, 3.0])
    errors = [value["generative_perplexity_standard_error"] for value in found]
    assert errors == pytest.approx([0.03 / 2**0.5, 0.04 / 2**0.5, 0.03 / 2**0.5])  # of two independent means
    assert [value["allowed"] for value in found] == [True, True, False]
    assert [value["better"] for value in found] == [True, False, True]
    noisy = pool_settings(table(perplexity, entropy, error=0.5), {"reuse": "none"})
    assert [value["better"] for value in noisy] == [False] * 3  # within their errors
    assert [value["entropy_loss"] for value in found] == pytest.approx([0.0, 0.0, 0.1])
    looser = pool_settings(table(perplexity, entropy), {"reuse": "none"}, entropy_slack=0.2)
    assert [value["allowed"] for value in looser] == [True] * 3
    refused("is not among the rows", pool_settings, table(perplexity), {"reuse": "half"})


def test_a_difference_counts_beyond_two_standard_errors():
    assert not clearly_below(758, 54, 790, 90) and not clearly_below(492.5, 49, 499.6, 42)
    assert clearly_below(80, 3, 90.1, 4) and not clearly_below(80, 3, 89.9, 4) and not clearly_below(90.1, 4, 80, 3)
    assert not clearly_below(1, None, 9, 0.1) and not clearly_below(1, 0.1, 9, None)


def test_latency_leaves_out_the_warm_up_and_an_interruption_repeats_no_timed_batch(tmp_path, monkeypatch):
    model, clock, runs = tiny_model(), iter(range(1, 99)), []

    def timed(model, seed, rows, length, options):
        if len(runs) == 6 and not stopped:
            stopped.append(True)
            raise KeyboardInterrupt
        runs.append(rows)
        return {"seconds": float(next(clock))}

    stopped = [True]
    monkeypatch.setattr(latency, "timed_batch", timed)
    found = measure_latency(model, batch_size=4, timed_batches=5, budget=12)
    assert found["seconds_per_batch"] == np.mean([3, 4, 5, 6, 7])  # 1 and 2 warmed up
    assert found["seconds_per_sequence"] == found["seconds_per_batch"] / 4
    assert found["seconds_per_batch_standard_error"] == pytest.approx(np.std([3, 4, 5, 6, 7], ddof=1) / 5**0.5)
    assert found["protocol"]["options"] == {"budget": 12} and found["protocol"]["warmup_batches"] == 2
    assert len(set(runs)) == 7 and all(len(rows) == 4 for rows in runs)

    straight = runs[2:]
    del runs[:], stopped[:]
    with pytest.raises(KeyboardInterrupt):
        measure_latency(model, batch_size=4, timed_batches=5, budget=12, cache_dir=tmp_path)
    measure_latency(model, batch_size=4, timed_batches=5, budget=12, cache_dir=tmp_path)
    assert runs[2:6] + runs[8:] == straight  # warmed up again, and on with the fifth
    del runs[:]
    measure_latency(model, batch_size=4, timed_batches=5, budget=12, cache_dir=tmp_path)
    assert not runs
    model.set_attn_implementation("eager")
    measure_latency(model, batch_size=4, timed_batches=5, budget=12, cache_dir=tmp_path)
    assert len(runs) == 7  # another model to the clock
    model.compile_blocks(backend="eager")
    measure_latency(model, batch_size=4, timed_batches=5, budget=12, cache_dir=tmp_path)
    assert len(runs) == 14
    refused(r"`timed_batches`=1 .* at least 2", measure_latency, model, timed_batches=1)
