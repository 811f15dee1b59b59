# SPDX-License-Identifier: Apache-2.0
"""Samples do not depend on how many more are drawn nor on an interruption; the report measures what was drawn."""

import json
import logging

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModel

from fpmgm.evaluation import (
    budget_table,
    distinct_n,
    evaluate_budgets,
    generative_perplexity,
    sample_sequences,
    unigram_entropy,
)
from fpmgm.evaluation.samples import timed_batch
from fpmgm.evaluation.store import ResultStore, fingerprint
from tests.evaluation.helpers import tiny_judge
from tests.models.helpers import lively_model
from tests.testing_utils import refused, tiny_model


def test_fewer_samples_are_the_first_of_more_and_rows_alone_are_the_same():
    model = tiny_model().double()
    many = sample_sequences(model, 7, batch_size=3, seed=2, budget=12, reuse="full")
    few = sample_sequences(model, 4, batch_size=2, seed=2, budget=12, reuse="full")
    assert torch.equal(few.sequences, many.sequences[:4]) and len(set(map(tuple, many.sequences.tolist()))) > 4
    assert (many.num_steps, many.block_evaluations, many.iterations) == (2, 12, [6, 2])
    assert many.milliseconds_per_sequence > 0
    other = sample_sequences(model, 7, seed=3, budget=12, reuse="full").sequences
    assert not set(map(tuple, other.tolist())) & set(map(tuple, many.sequences.tolist()))  # no stream is shared
    assert not torch.equal(sample_sequences(model, 7, seed=2, budget=24, reuse="full").sequences, many.sequences)


def test_what_orders_that_adapt_took_is_counted_over_all_batches():
    model = lively_model()
    call = {"budget": 60, "order": "threshold", "confidence_threshold": 0.43}
    samples = sample_sequences(model, 7, batch_size=3, **call)
    model.generation_config.eos_token_id, model.generation_config.stop_at_eos = 1, True  # not for texts of one length
    again = sample_sequences(model, 7, batch_size=7, **call)
    assert torch.equal(samples.sequences, again.sequences)
    seeds = list(range(7))
    out = model.generate(batch_size=7, seed=seeds, return_dict_in_generate=True, stop_at_eos=False, **call)
    steps, spent = out.num_steps_per_sequence, out.block_evaluations_per_sequence
    assert samples.num_steps == out.num_steps > steps.min() and samples.iterations == out.iterations
    assert samples.tokens_per_step == pytest.approx(7 * 8 / int(steps.sum()))
    assert samples.mean_block_evaluations == pytest.approx(spent.float().mean().item())
    refused("`stop_at_eos`=True cuts texts", sample_sequences, model, 7, stop_at_eos=True)


def test_interrupted_sampling_goes_on_to_the_same_samples(tmp_path, monkeypatch):
    model, options = tiny_model(), {"batch_size": 2, "budget": 12, "length": 5}
    straight = sample_sequences(model, 6, **options)
    generate, calls = model.generate, []

    def interrupted(**arguments):
        calls.append(arguments["seed"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(**arguments)

    monkeypatch.setattr(model, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sample_sequences(model, 6, cache_dir=tmp_path, **options)
    found = sample_sequences(model, 6, cache_dir=tmp_path, **options)
    assert torch.equal(found.sequences, straight.sequences) and found.sequences.shape == (6, 5)
    assert calls == [[0, 1], [2, 3], [4, 5], [4, 5]]
    # Changed weights, defaults or rules are another model.
    model.generation_config.temperature = 0.5
    sample_sequences(model, 2, cache_dir=tmp_path, **options)
    with torch.no_grad():
        model.lm_head.bias[0] += 1
    sample_sequences(model, 2, cache_dir=tmp_path, **options)
    model.config.rope_theta = 3.0
    sample_sequences(model, 2, cache_dir=tmp_path, **options)
    assert len(calls) == 7


def test_finished_samples_belong_to_the_adapters_that_act(tmp_path):
    model = tiny_model()
    plain = sample_sequences(model, 4, budget=12).sequences
    for name in ("one", "two"):
        torch.manual_seed(len(name) + ord(name[0]))
        model.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear"), adapter_name=name)
    found = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        found[name] = sample_sequences(model, 4, budget=12, cache_dir=tmp_path).sequences
        assert torch.equal(found[name], sample_sequences(model, 4, budget=12).sequences)
    assert not torch.equal(found["one"], found["two"])
    model.disable_adapters()
    assert torch.equal(sample_sequences(model, 4, budget=12, cache_dir=tmp_path).sequences, plain)
    model.enable_adapters()
    assert torch.equal(sample_sequences(model, 4, budget=12, cache_dir=tmp_path).sequences, found["two"])


def test_weights_that_lie_on_the_disk_are_the_same_weights(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    places = {name: "disk" if name == "fixed_point" else "cpu" for name, _ in model.named_children()}
    offloaded = AutoModel.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "offloaded")
    assert fingerprint(offloaded) == fingerprint(model)
    with torch.no_grad():
        next(model.fixed_point.parameters()).add_(1)
    assert fingerprint(offloaded) != fingerprint(model)
    model = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(sample_sequences(offloaded, 4, budget=12).sequences, model.generate(
        batch_size=4, seed=list(range(4)), budget=12
    ))  # fmt: skip


def test_times_are_of_one_device_which_is_named(tmp_path, monkeypatch):
    model, options = tiny_model(), {"batch_size": 2, "budget": 12, "cache_dir": tmp_path}
    here = sample_sequences(model, 4, **options).timed_on
    monkeypatch.setattr("fpmgm.evaluation.samples.device_name", lambda device: "another")
    kept = sample_sequences(model, 4, **options)
    assert kept.timed_on == here  # all batches are of the other device
    seconds = iter([100.0, 30.0])  # the first batch warms up
    monkeypatch.setattr(
        "fpmgm.evaluation.samples.timed_batch", lambda *given: {**timed_batch(*given), "seconds": next(seconds)}
    )
    more = sample_sequences(model, 8, **options)
    assert (more.timed_on, more.milliseconds_per_sequence) == ("another", 15_000)


def test_a_store_of_another_protocol_or_another_code_is_another_store(tmp_path, monkeypatch):
    ResultStore(tmp_path, {"a": 1}).add({"x": [1, "two"], "y": None})
    ResultStore(tmp_path, {"a": 1}).add({"x": 3})
    assert ResultStore(tmp_path, {"a": 1}).values == {"x": 3, "y": None}
    assert ResultStore(tmp_path, {"a": 2}).values == {}
    for name, other in (("PROCEDURE", 10**6), ("version", lambda package: "10.0")):
        with monkeypatch.context() as patched:
            patched.setattr(f"fpmgm.evaluation.store.{name}", other)
            assert ResultStore(tmp_path, {"a": 1}).values == {}
    assert fingerprint(tiny_model()) == fingerprint(tiny_model()) != fingerprint(tiny_model(seed=1))


def test_damaged_lines_of_a_cache_are_left_out_with_a_warning(tmp_path, caplog, monkeypatch):
    store = ResultStore(tmp_path, {"a": 1})
    store.add({f"k{i}": i for i in range(6)})
    lines = store.path.read_bytes().split(b"\n")
    lines[1], lines[2], lines[3], lines[4] = b'["k1", "\xff"]', b"5", b'{"k3": 3, "x": 4}', b'["k4", '
    store.path.write_bytes(b"\n".join(lines))
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    assert ResultStore(tmp_path, {"a": 1}).values == {"k0": 0, "k5": 5}
    assert f"{store.path}: 4 damaged line(s)" in caplog.text


def test_the_report_measures_each_setting_at_each_budget(tmp_path):
    judge = tiny_judge(length=64)
    model = tiny_model(vocab_size=len(judge.tokenizer), mask_token_id=judge.tokenizer.mask_token_id)
    settings = [{"reuse": "none"}, {"reuse": "3sr", "top_p": 0.9}]
    options = {"num_samples": 4, "max_length": 64, "length": 8, "cache_dir": tmp_path}
    rows = evaluate_budgets(model, judge.tokenizer, judge, [6, 12], settings, **options)
    assert [(row["budget"], row["reuse"], row.get("top_p")) for row in rows] == [
        (6, "none", None), (12, "none", None), (6, "3sr", 0.9), (12, "3sr", 0.9),
    ]  # fmt: skip
    for row, setting in zip(rows, [settings[0]] * 2 + [settings[1]] * 2, strict=True):
        seeds = list(range(4))
        drawn = model.generate(batch_size=4, length=8, seed=seeds, budget=row["budget"], **setting).tolist()
        assert row["unigram_entropy"] == unigram_entropy(drawn) and row["distinct_2"] == distinct_n(drawn, 2)
        texts = judge.tokenizer.batch_decode(drawn)
        expected = generative_perplexity(texts, judge, max_length=64)
        assert row["generative_perplexity"] == pytest.approx(expected["generative_perplexity"])
        assert row["protocol"]["generative_perplexity"]["special_tokens"] == "kept"
        assert row["sample"] == texts[0] and row["sampling"]["options"] == {"budget": row["budget"], **setting}
    assert json.loads(json.dumps(rows)) == rows
    assert evaluate_budgets(model, judge.tokenizer, judge, [6, 12], settings, **options) == rows  # times are kept too

    with pytest.raises(ValueError, match="two rows are 'tiny, reuse none' at budget 6"):  # of another model, say
        budget_table([*rows, *rows], "tiny")
    with pytest.raises(ValueError, match=r"`settings` have .*'reuse': 'none'.* twice"):
        evaluate_budgets(model, judge.tokenizer, judge, [6], [*settings, settings[0]], **options)
    with pytest.raises(ValueError, match=r"`budgets`=\[6, 6\] have one twice"):
        evaluate_budgets(model, judge.tokenizer, judge, [6, 6], settings, **options)
    table = budget_table(rows, "tiny").splitlines()
    assert table[0] == "| Method | Metric | 6 | 12 |"
    measured = [(row["generative_perplexity"], row["generative_perplexity_standard_error"]) for row in rows[2:]]
    perplexities = " | ".join(f"{value:.2f} ± {error:.2f}" for value, error in measured)
    assert f"| tiny, reuse 3sr, top_p 0.9 | Gen. PPL ↓ | {perplexities} |" in table
    assert table[5] == "|  | steps (iterations) | 1 (4) | 2 (6…2) |"
