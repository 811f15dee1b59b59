# SPDX-License-Identifier: Apache-2.0
"""No argument is accepted and then ignored: each public function's are listed here with what changes when they do.

A change shows in what is returned (`Result`), in how often a model is called (`Calls`), in files (`Files`) or on the
terminal (`Shown`). An argument that has nothing to change beside others is refused: the second list.
"""

import copy
import inspect
from collections.abc import Callable
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from datasets import Dataset

import fpmgm.data
import fpmgm.evaluation
from fpmgm.data import add_mask_token, load_text, pack, train_tokenizer
from fpmgm.evaluation import (
    Judge,
    NGramJudge,
    budget_table,
    clearly_below,
    common_entropies,
    compare_values,
    distinct_n,
    elbo_perplexity,
    energy_distance,
    evaluate_budgets,
    generative_perplexity,
    grid,
    load_judge,
    load_truth,
    mauve_score,
    measure_latency,
    measure_samples,
    over_seeds,
    perplexity_at_entropy,
    plus_minus,
    pool_settings,
    provenance,
    repetition_rate,
    sample_sequences,
    sample_texts,
    sampling_candidates,
    standard_error_at_entropy,
    successive_halving,
    sweep,
    undominated,
    unigram_entropy,
)
from tests.evaluation.helpers import tiny_judge
from tests.testing_utils import refused, tiny_config, tiny_model, word_tokenizer


ELSEWHERE = {  # of pictures, or values without behaviour
    "EfficientNetLiteExtractor", "FeatureExtractor", "ImageStatistics", "InceptionExtractor", "evaluate_images",
    "extract_features", "frechet_distance", "image_statistics", "inception_score", "to_uint8", "load_codes",
    "load_images", "make_image_processor", "prepare_codes", "Judge", "Samples", "Trial", "TruthJudge", "AnyJudge",
}  # fmt: skip


class Result(NamedTuple):
    """Another value of the argument, which changes what is returned."""

    value: Any


class Calls(NamedTuple):
    """Another value, which changes how often the base's `model` or `judge` runs, and nothing that is returned."""

    value: Any


class Files(NamedTuple):
    """A folder where the argument leaves something."""


class Shown(NamedTuple):
    """`True` writes to the terminal."""


class Case(NamedTuple):
    """A function, arguments that it takes, and how each of them matters."""

    function: Callable
    base: dict[str, Any]
    changes: dict[str, Any]


@cache
def judge(seed: int = 0):
    return tiny_judge(seed, length=64)


@cache
def tokenizer():
    return judge().tokenizer


@cache
def words():
    """Another tokenizer with as many tokens."""
    return word_tokenizer([f"w{i}" for i in range(260)], eos_token="w259")


@cache
def model(seed: int = 0):
    return tiny_model(seed, scale=0.5, vocab_size=260, mask_token_id=tokenizer().mask_token_id).double()


def explicit():
    """Without fixed-point layers."""
    return tiny_model(num_fixed_point_layers=0)


def rows(scale: float = 1.0, error: float = 0.1) -> list[dict]:
    return [
        {"generative_perplexity": scale * p, "generative_perplexity_standard_error": error, "unigram_entropy": h,
         "budget": b, "num_steps": 2, "iterations": [2, 1], "milliseconds_per_sequence": 1.0,
         "sampling": {"options": {"budget": b, "reuse": r}}}
        for b, r, p, h in [(24, "none", 9, 5), (24, "3sr", 7, 4.99), (48, "none", 5, 5), (48, "3sr", 4, 4.9)]
    ]  # fmt: skip


TOKENS = [[1, 2, 3, 4, 1, 2, 3, 4], [5, 6, 7, 8, 9, 1, 2, 3], [4, 4, 4, 4, 4, 2, 3, 9]]
OTHER = [[1] * 8, *TOKENS[1:]]
TEXTS = [f"text {'abcde'[i % 5] * i} and more {i}" for i in range(42)]
HUMAN = [f"{i * i} words of {'xyz'[i % 3] * (i % 7)}" for i in range(42)]
POINTS = [{"entropy": h, "perplexity": p} for h, p in ((5, 9), (4, 8), (3, 7))]
CURVE = {"entropies": [5.0, 5.5, 6.0], "perplexities": [20.0, 80.0, 90.0], "entropy": 5.2}
SAMPLING = {"num_samples": 4, "batch_size": 2, "length": 6}

CASES = [
    Case(unigram_entropy, {"sequences": TOKENS}, {"sequences": Result(OTHER)}),
    Case(distinct_n, {"sequences": TOKENS}, {"sequences": Result(OTHER), "n": Result(3)}),
    Case(repetition_rate, {"sequences": TOKENS}, {"sequences": Result(OTHER), "n": Result(2)}),
    Case(
        NGramJudge,
        {"sequences": TOKENS, "vocab_size": 10},
        {"sequences": Result(OTHER), "vocab_size": Result(11), "order": Result(2), "name": Result("mine")},
    ),
    Case(
        elbo_perplexity,
        {"model": model(), "sequences": TOKENS, "num_draws": 2, "batch_size": 3},
        {
            "model": Result(model(1)), "sequences": Result(OTHER), "num_draws": Result(3), "num_iterations": Result(1),
            "batch_size": Calls(1), "seed": Result(1), "cache_dir": Files(), "progress_bar": Shown(),
        },
    ),
    Case(
        generative_perplexity,
        {"texts": TEXTS, "judge": judge(), "max_length": 64},
        {
            "texts": Result(TEXTS[1:]), "judge": Result(judge(1)), "batch_size": Calls(3), "max_length": Result(8),
            "add_start_token": Result(True), "cache_dir": Files(), "progress_bar": Shown(),
        },
    ),
    Case(
        mauve_score,
        {"texts": TEXTS, "references": HUMAN, "featurizer": judge(), "num_samples": 41, "max_length": 64},
        {
            "texts": Result(["b", *TEXTS]), "references": Result(["b", *HUMAN]), "featurizer": Result(judge(1)),
            "num_samples": Result(42), "max_length": Result(3), "batch_size": Calls(2), "scaling_factor": Result(1.0),
            "seed": Result(1), "cache_dir": Files(),
        },
    ),
    Case(
        measure_samples,
        {"sequences": TOKENS, "tokenizer": tokenizer(), "judge": judge(), "max_length": 64},
        {
            "sequences": Result(OTHER), "tokenizer": Result(words()), "judge": Result(judge(1)),
            "references": Result(["a", "b", "c"]), "batch_size": Calls(1), "max_length": Result(3),
            "cache_dir": Files(), "progress_bar": Shown(),
        },
    ),
    Case(
        sample_sequences,
        {"model": model(), "options": {"budget": 12}, **SAMPLING},
        {
            "model": Result(model(1)), "num_samples": Result(3), "batch_size": Calls(4), "length": Result(5),
            "seed": Result(1), "cache_dir": Files(), "progress_bar": Shown(), "options": Result({"budget": 24}),
        },
    ),
    Case(
        measure_latency,
        {"model": model(), "batch_size": 2, "timed_batches": 2, "length": 6, "options": {"budget": 12}},
        {
            "model": Result(model(1)), "batch_size": Result(3), "length": Result(5), "warmup_batches": Result(1),
            "timed_batches": Result(3), "seed": Result(1), "cache_dir": Files(), "progress_bar": Shown(),
            "options": Result({"budget": 24}),
        },
    ),
    Case(
        sweep,
        {"model": model(), "tokenizer": tokenizer(), "judge": judge(), "settings": [{"budget": 12}], "max_length": 64,
         **SAMPLING},
        {
            "model": Result(model(1)), "tokenizer": Result(words()), "judge": Result(judge(1)),
            "settings": Result([{"budget": 24}]), "num_samples": Result(3), "batch_size": Calls(4),
            "judge_batch_size": Calls(1), "length": Result(5), "max_length": Result(2),
            "references": Result(["a", "b", "c", "d"]), "seed": Result(1), "cache_dir": Files(),
            "progress_bar": Shown(),
        },
    ),
    Case(
        evaluate_budgets,
        {"model": model(), "tokenizer": tokenizer(), "judge": judge(), "budgets": [12], "settings": [{}],
         "options": {"max_length": 64, **SAMPLING}},
        {
            "model": Result(model(1)), "tokenizer": Result(words()), "judge": Result(judge(1)),
            "budgets": Result([24]), "settings": Result([{"temperature": 0.5}]),
            "options": Result({"max_length": 2, **SAMPLING}),
        },
    ),
    Case(budget_table, {"rows": rows(), "name": "a"}, {"rows": Result(rows(2)), "name": Result("b")}),
    Case(compare_values, {"rows": rows(), "name": "reuse"}, {"rows": Result(rows(2)), "name": Result("budget")}),
    Case(
        pool_settings,
        {"rows": rows(), "default": {"reuse": "none"}},
        {"rows": Result(rows(2)), "default": Result({"reuse": "3sr"}), "entropy_slack": Result(0.5)},
    ),
    Case(
        clearly_below,
        {"value": 5.0, "error": 1.0, "other": 9.0, "other_error": 1.0},
        {"value": Result(8.0), "error": Result(2.0), "other": Result(6.0), "other_error": Result(2.0)},
    ),
    Case(over_seeds, {"values": [1.0, 2.0]}, {"values": Result([1.0]), "digits": Result(1)}),
    Case(plus_minus, {"value": 1, "error": 1}, {"value": Result(2), "error": Result(2), "digits": Result(1)}),
    Case(
        perplexity_at_entropy,
        CURVE,
        {"entropies": Result([4.0, 5.5, 6.0]), "perplexities": Result([30.0, 80, 90]), "entropy": Result(5.3)},
    ),
    Case(
        standard_error_at_entropy,
        {**CURVE, "standard_errors": [1.0, 2.0, 3.0]},
        {
            "entropies": Result([4.0, 5.5, 6.0]), "perplexities": Result([30.0, 80, 90]), "entropy": Result(5.3),
            "standard_errors": Result([2.0, 2.0, 2.0]),
        },
    ),
    Case(undominated, {"points": POINTS}, {"points": Result(POINTS[:2])}),
    Case(common_entropies, {"curves": [[1, 5], [2, 6]]}, {"curves": Result([[1, 5]]), "count": Result(2)}),
    Case(grid, {"choices": {"a": [1, 2]}}, {"choices": Result({"a": [1, 3]})}),
    Case(provenance, {}, {"device": Result("cuda")}),
    Case(
        successive_halving,
        {"candidates": [3, 1, 2, 5], "score": lambda c, r: c, "resources": [1, 2], "factor": 2.0},
        {
            "candidates": Result([3, 2, 1, 5]), "score": Result(lambda c, r: -c), "resources": Result([1, 3]),
            "factor": Result(4.0), "keep": Result([3]),
        },
    ),
    Case(
        sampling_candidates,
        {"config": tiny_config(), "budget": 48, "count": 4},
        {
            "config": Result(tiny_config(num_pre_layers=3)), "budget": Result(192), "count": Result(5),
            "seed": Result(1),
        },
    ),
    Case(
        energy_distance,
        {"first": np.eye(4), "second": 2 * np.eye(4)},
        {
            "first": Result(np.ones((4, 4))), "second": Result(np.eye(4)), "num_permutations": Result(3),
            "seed": Result(1),
        },
    ),
    Case(
        sample_texts,
        {"truth": judge().model, "keys": [(0, 0), (0, 1)], "length": 5},
        {"truth": Result(judge(1).model), "keys": Result([(0, 0), (0, 2)]), "length": Result(6)},
    ),
    Case(
        load_truth,
        {"truth": "a", "length": 5, "num_texts": 4, "device": "cpu"},
        {
            "truth": Result("b"), "length": Result(6), "num_texts": Result(5), "seed": Result(1),
            "device": Result("cuda"),
        },
    ),
    Case(load_judge, {}, {"judge": Result("b"), "device": Result("meta"), "dtype": Result(torch.float64)}),
    Case(add_mask_token, {"tokenizer": tokenizer()}, {"tokenizer": Result(words())}),
    Case(
        train_tokenizer,
        {"texts": ["the the then"], "vocab_size": 260},
        {"texts": Result(["no no nod"]), "vocab_size": Result(259)},
    ),
    Case(
        pack,
        {"dataset": Dataset.from_dict({"text": TEXTS * 50}), "tokenizer": tokenizer(), "length": 8},
        {
            "dataset": Result(Dataset.from_dict({"text": TEXTS[1:]})), "tokenizer": Result(words()),
            "length": Result(9), "num_proc": Result(2),  # of 1,000 documents each
        },
    ),
    Case(
        load_text,
        {"dataset_name": "a"},
        {
            "text_files": Result("a.txt"), "dataset_name": Result("b"), "dataset_config": Result("c"),
            "split": Result("test"), "column": Result("words"), "streaming": Result(True),
        },
    ),
]  # fmt: skip


def test_the_list_holds_every_argument_of_every_public_function():
    public = {*fpmgm.evaluation.__all__, *fpmgm.data.__all__} - ELSEWHERE
    listed = {case.function.__name__: set(case.changes) for case in CASES}
    modules = (fpmgm.evaluation, fpmgm.data)
    taken = {name: getattr(next(m for m in modules if hasattr(m, name)), name) for name in public}
    assert listed == {name: set(inspect.signature(function).parameters) for name, function in taken.items()}


def observed(monkeypatch, tmp_path) -> tuple[list, list]:
    """What `generate` and the hub's loaders are asked for, in place of what they do."""
    asked, generate = [], type(model()).generate
    mapped, plain_map = [], Dataset.map

    def ask(self, **options):
        asked.append((options, self.lm_head.weight.sum().item()))
        return generate(self, **options)

    def ask_map(self, *arguments, num_proc=None, **options):
        mapped.append(num_proc)
        return plain_map(self, *arguments, **options)

    monkeypatch.setattr(type(model()), "generate", ask)
    monkeypatch.setattr(Dataset, "map", ask_map)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    (tmp_path / "a.txt").write_text("file", encoding="utf-8")
    monkeypatch.chdir(tmp_path)

    def load_dataset(*arguments, **options):
        return Dataset.from_dict({"text": [repr((arguments, options))], "words": ["words"]})

    monkeypatch.setattr("fpmgm.data.text.load_dataset", load_dataset)
    truths = {"a": judge().model, "b": judge(1).model}
    monkeypatch.setattr("fpmgm.evaluation.judge.read_tokenizer", loaded)
    monkeypatch.setattr("fpmgm.evaluation.judge.AutoModelForCausalLM", SimpleNamespace(from_pretrained=loaded))
    monkeypatch.setattr("fpmgm.evaluation.judge.check_causal", lambda judge: None)  # it is no language model
    hub = SimpleNamespace(from_pretrained=lambda name: Placed(truths[name]))
    monkeypatch.setattr("fpmgm.evaluation.truth.AutoModelForCausalLM", hub)
    return asked, mapped


class Placed:
    """A model that says where it was asked to be."""

    def __init__(self, model):
        self.model = model

    def to(self, device):
        moved = copy.copy(self.model)
        moved.asked_device = str(device)
        return moved


def loaded(source: str, dtype=None, **options):
    return torch.nn.Linear(2, 2, dtype=dtype)


def run(function: Callable, arguments: dict[str, Any]) -> Any:
    """What it returns, as a text that tells other results apart, without what only repeats the arguments."""
    arguments = dict(arguments)
    named = arguments.pop("options", arguments.pop("choices", {}))
    found = function(**arguments, **named)
    if function is NGramJudge:
        return found.name, found.perplexity(TOKENS)
    if function is load_judge:
        return found.name, found.model.weight.device, found.model.weight.dtype
    if function is load_truth:
        return found.name, found.model.asked_device, found.references.tolist()
    if function in (train_tokenizer, add_mask_token):
        return sorted(found.get_vocab())
    if function in (pack, load_text):
        return found[:]
    if function is sample_sequences:
        return found.sequences.tolist()
    return without_protocols(found)


def without_protocols(value: Any) -> Any:
    """No protocols, and no times."""
    dropped = ("protocol", "sampling", "milliseconds_per_sequence", "seconds")
    if isinstance(value, dict):
        return {k: without_protocols(v) for k, v in value.items() if not k.startswith(dropped)}
    if isinstance(value, float):
        return float(f"{value:.9g}")  # products round by the size of their batch
    return [without_protocols(v) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    ("case", "name"),
    [pytest.param(case, name, id=f"{case.function.__name__}-{name}") for case in CASES for name in case.changes],
)
def test_an_argument_matters(case, name, monkeypatch, tmp_path, capfd):
    if case.function is mauve_score or name == "references":
        pytest.importorskip("mauve")
    asked, mapped = observed(monkeypatch, tmp_path)
    change, calls = case.changes[name], []
    watched = [case.base[part] for part in ("model", "judge", "featurizer") if part in case.base]
    watched = [part.model.base_model if isinstance(part, Judge) else part for part in watched]
    hooks = [module.register_forward_hook(lambda *_: calls.append(1)) for module in watched]
    value = {Files: tmp_path / "kept", Shown: True}.get(type(change), getattr(change, "value", None))
    if case.function is load_text and name == "text_files":
        case = case._replace(base={})
    if case.function is load_text and name == "dataset_config":
        assert "'c'" in run(load_text, {**case.base, name: value})["text"][0]

    def outcome(arguments: dict[str, Any]) -> tuple[str, int]:
        del calls[:], asked[:], mapped[:]
        found = run(case.function, arguments)
        if case.function is measure_latency:  # its result is times: see what was timed
            found = [repr(call) for call in asked]
        return repr((found, mapped)), len(calls)

    try:
        before = outcome(case.base) if case.base or case.function is load_judge else ("", 0)
        capfd.readouterr()
        after = outcome({**case.base, name: value})
    finally:
        for hook in hooks:
            hook.remove()
    if isinstance(change, Result):
        assert after[0] != before[0]
    elif isinstance(change, Calls):
        assert after[0] == before[0] and after[1] != before[1]
    elif isinstance(change, Files):
        assert after[0] == before[0] and list(value.glob("*.jsonl"))
    else:
        assert after[0] == before[0] and "%|" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (partial(unigram_entropy, ["text"]), r"`sequences`\[0\] is the text 'text'"),
        (partial(distinct_n, "text"), "`sequences` is of type str"),
        (partial(repetition_rate, ["some text"]), r"`sequences`\[0\] is the text"),
        (partial(distinct_n, TOKENS, n="2"), "`n`='2' must be a whole number"),
        (partial(distinct_n, [[1, 2]], n=3), "no n-gram of `n`=3"),
        (partial(repetition_rate, [[1] * 4, [1] * 3]), "`sequences` are 2, the shortest of 3 tokens: .* each of 4"),
        (partial(unigram_entropy, [[1], []]), "the shortest of 0 tokens"),
        (partial(NGramJudge, np.zeros((1, 5), int), 60000), "`vocab_size`=60000 to the power `order`=4"),
        (partial(NGramJudge, ["text"], 10), r"`sequences`\[0\] is the text"),
        (partial(NGramJudge, [[1, 2], [3]], 10), r"have \[1, 2\] tokens: give rows of one length"),
        (partial(NGramJudge, TOKENS, "10"), "`vocab_size`='10'"),
        (partial(NGramJudge, TOKENS, 10, order=9), "`order`=9 is longer than the rows of 8 tokens"),
        (partial(elbo_perplexity, model(), ["text"]), r"`sequences`\[0\] is the text"),
        (partial(elbo_perplexity, model(), [[1, 2], [3, 257]]), r"`sequences`\[1\] holds the mask id 257 at"),
        (partial(elbo_perplexity, model(), [[1, 999]]), r"`sequences`\[0\] has 2 tokens, ids from 1 to 999"),
        (partial(elbo_perplexity, model(), [[1] * 9]), r"`sequences`\[0\] has 9 tokens"),
        (partial(elbo_perplexity, model(), TOKENS, num_draws="4"), "`num_draws`='4'"),
        (partial(elbo_perplexity, model(), TOKENS, batch_size=0), "`batch_size`=0"),
        (partial(elbo_perplexity, explicit(), TOKENS, num_iterations=3), "`num_iterations`=3, but .* no fixed-point"),
        (partial(elbo_perplexity, model(), []), "at least one sequence"),
        (partial(elbo_perplexity, model(), [[1], []]), "at least one sequence"),
        (partial(generative_perplexity, "text", judge()), "`texts` is of type str"),
        (partial(generative_perplexity, TEXTS, judge(), max_length="64"), "`max_length`='64'"),
        (partial(generative_perplexity, TEXTS, judge()), "`max_length`=1024 must be at most 64, the positions of the"),
        (partial(generative_perplexity, ["", "x"], judge(), max_length=64), "no text of two tokens or more"),
        (partial(load_judge, "gone.gguf"), r"gone\.gguf' does not exist"),
        (partial(load_judge, judge(), device="cpu"), "`device`=cpu and `dtype`=None are for a judge that"),
        (partial(mauve_score, TEXTS, TEXTS, len, num_samples=2, max_length=4), "{'max_length': 4} is for a language"),
        (partial(mauve_score, ["a"] * 5000, ["a"], len), "`references` are 1, fewer than `num_samples`=5000"),
        (partial(mauve_score, TEXTS, TEXTS, judge(), num_samples=2), "`max_length`=1024 must be at most 64, the pos"),
        (partial(measure_samples, TOKENS, words(), NGramJudge(TOKENS, 10), max_length=4), "{'max_length': 4} does no"),
        (partial(sample_sequences, model(), 2, return_dict_in_generate=True), "`return_dict_in_generate` is set here"),
        (partial(sample_sequences, model(), 2, callback=print), "`callback` is of type builtin_function_or_method"),
        (partial(sample_sequences, model(), "2"), "`num_samples`='2'"),
        (partial(sample_sequences, model(), 2, seed=None), "`seed`=None must be a whole number"),
        (partial(sample_sequences, model(), 2, length="8"), "`length`='8'"),
        (partial(measure_latency, model(), seed=1.5), "`seed`=1.5 must be a whole number"),
        (partial(elbo_perplexity, model(), TOKENS, seed=1.5), "`seed`=1.5 must be a whole number"),
        (partial(sweep, model(), tokenizer(), NGramJudge(TOKENS, 260), [{"progress_bar": True}]), "`progress_bar` is"),
        (partial(NGramJudge(TOKENS, 260).perplexity, [[1], [2]]), "no text of two tokens or more"),
        (partial(evaluate_budgets, model(), tokenizer(), judge(), ["96"], [{}]), "`budgets`='96'"),
        (partial(evaluate_budgets, model(), tokenizer(), judge(), [96], [{"budget": 4}]), "leave its own out"),
        (partial(evaluate_budgets, model(), tokenizer(), judge(), [96], {"reuse": "3sr"}), "`settings`=.* several"),
        (partial(grid, reuse="none"), r"`reuse`='none': give the values to try, such as \['none'\]"),
        (partial(successive_halving, [1, 2], len, [1], keep=[2]), r"`keep`=\[2\] must be places among"),
        (partial(successive_halving, [1], len, [1], factor="3"), "`factor`=3 must be above 1"),
        (partial(successive_halving, [1], len, [1], 1.0), "`factor`=1.0 must be above 1"),
        (partial(successive_halving, [], len, [1]), "`candidates` is empty"),
        (partial(successive_halving, [1], len, [4, 4]), r"`resources`=\[4, 4\] must be one or more numbers that rise"),
        (partial(sampling_candidates, tiny_config(), 48, "4"), "`count`='4'"),
    ],
)  # fmt: skip
def test_what_an_argument_cannot_do_is_refused(call, message):
    refused(message, call)


def test_numbers_of_numpy_are_kept_on_disk_as_others_are(tmp_path):
    def measured(number, **kept) -> list:
        size = {"batch_size": number(3), "seed": number(2), **kept}
        samples = sample_sequences(model(), number(4), length=number(6), budget=12, **size)
        judged = generative_perplexity(TEXTS, judge(), max_length=number(64), batch_size=number(3), **kept)
        bound = elbo_perplexity(model(), TOKENS, num_draws=number(2), num_iterations=number(2), **size)
        latency = measure_latency(model(), timed_batches=number(2), warmup_batches=number(0), budget=12, **size)
        return [samples.sequences.tolist(), samples.protocol, judged, bound, latency["protocol"]]

    assert measured(int) == measured(np.int64, cache_dir=tmp_path) == measured(int, cache_dir=tmp_path)
    assert len(list(tmp_path.glob("*.jsonl"))) == 4


def test_blocks_and_generators_are_taken_wherever_rows_or_texts_are():
    blocks = pack(Dataset.from_dict({"text": TEXTS[:5]}), tokenizer(), 8)
    ids = blocks["input_ids"][:]
    judged = {"tokenizer": tokenizer(), "judge": judge(), "max_length": 64}
    for measure in (
        unigram_entropy,
        distinct_n,
        repetition_rate,
        partial(elbo_perplexity, model(), num_draws=2),
        lambda rows: NGramJudge(rows, 260).perplexity(ids),
        NGramJudge(ids, 260).perplexity,
        NGramJudge(ids, 260).generative_perplexity,
        lambda rows: measure_samples(rows, **judged),
    ):
        expected = measure(ids)
        assert measure(blocks) == expected
        assert measure(row for row in ids) == measure(np.array(ids)) == measure(torch.tensor(ids)) == expected
    assert generative_perplexity(iter(TEXTS), judge(), max_length=64) == generative_perplexity(
        TEXTS, judge(), max_length=64
    )
    settings, sampling = [{"budget": 12}, {"budget": 24}], {"max_length": 64, **SAMPLING}
    found = sweep(model(), tokenizer(), judge(), iter(settings), **sampling)
    other = evaluate_budgets(model(), tokenizer(), judge(), iter([12, 24]), iter([{}]), **sampling)
    assert without_protocols(found) == without_protocols(other)
    assert budget_table(iter(rows()), "a") == budget_table(rows(), "a")
