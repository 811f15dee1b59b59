# SPDX-License-Identifier: Apache-2.0
"""lm-eval's model against enumeration of every mask, and against plain loops."""

import inspect
import json
import math
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.tasks import TaskManager
from tokenizers import AddedToken, Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from fpmgm.data import train_tokenizer
from fpmgm.evaluation.lm_eval import MGMLM, PROTOCOLS, loading, make_table, scoring
from fpmgm.evaluation.lm_eval.__main__ import main
from fpmgm.models.noise import stream_generator

from ..testing_utils import refused, run_python, tiny_model, word_tokenizer


EOS, MASK = 0, 10
WORDS = "abcdefghi"  # ids 1 … 9


def tiny_tokenizer():
    """One token per letter."""
    return word_tokenizer(["<eos>", *WORDS, "<mask>"], eos_token="<eos>", mask_token="<mask>")


def evaluated(model=None, **arguments) -> MGMLM:
    model = tiny_model().double() if model is None else model
    return MGMLM(model, tokenizer=tiny_tokenizer(), device="cpu", **arguments)


def scores(lm: MGMLM, *pairs: tuple[str, str]) -> list[tuple[float, bool]]:
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    return lm.loglikelihood(requests, disable_tqdm=True)


@torch.no_grad()
def losses(model, ids: list[int], masks: list[tuple[bool, ...]], time: float = 1.0) -> np.ndarray:
    """Σ over masked positions of −log p(token) for each mask, from the logits of every position."""
    ids, masked, blank = torch.tensor(ids), torch.tensor(masks), model.config.mask_token_id
    logits = model(ids.masked_fill(masked, blank), timesteps=torch.full((len(masked),), time)).logits
    logits[..., blank] = -torch.inf
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
            expected += share / 2 * (chances * losses(model, ids, masks)).sum() / t
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
    for lm.seed in range(20):
        estimates.append(scores(lm, ("a b", " c d e"))[0][0])
    error = np.std(estimates, ddof=1) / len(estimates) ** 0.5
    exact = exact_score(protocol, lm.model, [1, 2], [3, 4, 5])
    assert error < 0.01 * abs(exact)
    assert abs(np.mean(estimates) - exact) < 4 * error


def reference_score(lm: MGMLM, prefix: list[int], target: list[int], time: float | None = None) -> float:
    """The same draws without any saving: every draw by itself, logits everywhere, told its own time or `time`."""
    joint = lm.protocol_name == "pgm"
    ids, start = ([EOS, *prefix, *target, EOS], 1 + len(prefix)) if joint else (prefix + target, len(prefix))
    stop = start + max(1, len(target))  # an empty target is EOS
    first, last = (0, len(ids)) if joint else (start, stop)
    noise = stream_generator(lm.seed, lm.protocol_name, tuple(ids), start, stop)
    total = 0.0
    for masked, weight, t in zip(*lm.protocol.draws(last - first, lm.mc_num, noise), strict=True):
        if masked.any():
            mask = (False,) * first + tuple(masked.tolist()) + (False,) * (len(ids) - last)
            total += weight.item() * losses(lm.model, ids, [mask], time or t.item())[0]
    return -total / lm.mc_num / (len(ids) if joint else 1)


PAIRS = [("a", " b"), ("a b c", " d e f"), ("", "g h"), ("i i", " a b c d"), ("a", " b"), ("b", " a")]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("batch_size", [3, 64])
def test_batching_and_merging_change_nothing(protocol, batch_size):
    lm = evaluated(protocol=protocol, mc_num=7, batch_size=batch_size)
    together = scores(lm, *PAIRS)
    for pair, (score, greedy) in zip(PAIRS, together, strict=True):
        [(alone, greedy_alone)] = scores(lm, pair)
        assert (alone, greedy_alone) == (pytest.approx(score, rel=1e-12), greedy)
        assert score == pytest.approx(reference_score(lm, *numbers(pair)), rel=1e-10)


def numbers(texts: tuple[str, str]) -> list[list[int]]:
    """Token ids by hand."""
    return [[WORDS.index(word) + 1 for word in text.split()] for text in texts]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_model_that_is_told_the_time_gets_that_of_each_draw(protocol):
    lm = evaluated(tiny_model(time_conditioning=True, scale=0.6).double(), protocol=protocol, mc_num=9)
    pairs = PAIRS[1:4]  # llada tells a target of one token 1 always
    for pair, (score, _) in zip(pairs, scores(lm, *pairs), strict=True):
        assert score == pytest.approx(reference_score(lm, *numbers(pair)), rel=1e-6)  # t is float32
        assert score != pytest.approx(reference_score(lm, *numbers(pair), time=1.0), rel=1e-4)


@torch.no_grad()
def decoded(model, prefix: list[int], order: str, begin: list[int], end: list[int]) -> list[int]:
    """The three tokens that greedy decoding writes between prefix and end, `order` of them at a time."""
    ids = torch.tensor([*begin, *prefix, *[MASK] * 3, *end])
    while (ids == MASK).any():
        logits = model(ids[None]).logits[0]
        logits[:, MASK] = -torch.inf
        probability, tokens = logits.softmax(dim=-1).max(dim=-1)
        places = (ids == MASK).nonzero()[:, 0]
        picked = {"all": slice(None), "surest": probability[places].argmax(), "vaguest": probability[places].argmin()}
        ids[places[picked[order]]] = tokens[places[picked[order]]]
    return ids[len(begin) + len(prefix) :][:3].tolist()


@pytest.mark.parametrize("protocol, order", [("pgm", "all"), ("llada", "surest"), ("smdm", "surest")])
def test_one_target_is_greedy_and_it_is_the_decoded_one(protocol, order):
    frame = ([EOS], [EOS]) if protocol == "pgm" else ([], [])
    for seed in range(100):  # a model for which the order matters
        lm = evaluated(tiny_model(seed=seed, scale=0.5).double(), protocol=protocol, mc_num=1)
        texts = {name: decoded(lm.model, [2, 5], name, *frame) for name in ("all", "surest", "vaguest")}
        if len(set(map(tuple, texts.values()))) == 3:
            break
    assert len(set(map(tuple, texts.values()))) == 3
    right = texts.pop(order)
    wrong = [*texts.values(), *([*right[:i], right[i] % 9 + 1, *right[i + 1 :]] for i in range(3))]
    pairs = [(str(target), [2, 5], target) for target in (wrong[0], right, *wrong[1:])]
    answers = lm._loglikelihood_tokens(pairs, disable_tqdm=True)
    assert [greedy for _, greedy in answers] == [False, True, *[False] * 4]


def test_long_inputs_lose_their_beginning_and_are_counted():
    lm = evaluated(mc_num=5)
    cut, whole = scores(lm, (" ".join("abcdefg"), " h i"), ("d e f g", " h i"))
    assert cut == whole
    assert lm.get_model_info()["truncated_requests"] == 1
    lm = evaluated(protocol="llada", mc_num=5, max_length=3)
    cut, whole = scores(lm, ("a", " b c d e f"), ("", "d e f"))
    assert cut == whole


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_rolling_is_the_sum_over_windows_in_nats(protocol):
    lm = evaluated(protocol=protocol, mc_num=4)
    room = 6 if protocol == "pgm" else 8
    text = [WORDS[i % 9] for i in range(2 * room + 1)]
    windows = [" ".join(text[i : i + room]) for i in range(0, len(text), room)]
    expected = 0.0
    for window, (score, _) in zip(windows, scores(lm, *(("", window) for window in windows)), strict=True):
        expected += score * (len(window.split()) + 2 if protocol == "pgm" else 1)
    requests = [Instance("loglikelihood_rolling", {}, (t,), 0) for t in (" ".join(text), "")]
    rolled = lm.loglikelihood_rolling(requests, disable_tqdm=True)
    assert rolled == [pytest.approx(expected, rel=1e-12), 0]


def answered(sequences: torch.Tensor, tokens: int) -> SimpleNamespace:
    """What `generate` gives of rows with so many new tokens, in two steps of six blocks."""
    steps = torch.full((len(sequences),), 2)
    return SimpleNamespace(
        sequences=sequences, lengths=torch.full_like(steps, tokens), num_steps_per_sequence=steps,
        block_evaluations_per_sequence=6 * steps,
    )  # fmt: skip


def write(lm: MGMLM, *requests: tuple[str, dict]) -> list[str]:
    return lm.generate_until([Instance("generate_until", {}, r, i) for i, r in enumerate(requests)], disable_tqdm=True)


def test_text_ends_at_stop_strings_and_at_the_end_of_text(monkeypatch):
    lm, calls = evaluated(), []

    def generate(input_ids, attention_mask=None, seed=None, **options):
        calls.append((input_ids.tolist(), attention_mask, options))
        story = torch.tensor([[1, 2, 3, EOS, 5], [1, 2, 3, 4, 5]])[: len(input_ids)]
        assert options.pop("return_dict_in_generate")
        return answered(input_ids.masked_scatter(input_ids == MASK, story.flatten()), 5)

    monkeypatch.setattr(lm.model, "generate", generate)
    until = {"max_gen_toks": 5, "until": ["d e", "c"]}
    assert write(lm, ("h", {"max_gen_toks": 5}), ("i i", {"max_gen_toks": 5, "until": ["x"]})) == [
        "a b c d e",
        "a b c",
    ]
    assert write(lm, ("i", until)) == ["a b "]
    assert calls[0][0] == [[EOS, 9, 9, *[MASK] * 5], [EOS, 8, *[MASK] * 5, 0]]  # the longer one first
    assert calls[0][1].tolist() == [[1] * 8, [1] * 7 + [0]]
    assert calls[1][1] is None
    assert calls[0][2] == {"temperature": 0.0}
    write(lm, ("h", {"do_sample": True, "top_p": 0.9, "max_gen_toks": 5}))
    assert calls[2][2] == {"temperature": 1.0, "top_p": 0.9}
    written = lm.get_model_info()["written"]
    assert written.pop("tokens_per_second") > 0
    assert written == {"texts": 4, "num_steps": 2, "block_evaluations": 12, "tokens_per_step": 2.5}


def test_any_order_and_an_early_end_can_be_asked_for_and_cost_less():
    lm = evaluated(budget=24, num_steps=4, reuse="none")
    assert lm.get_model_info()["written"] == {}
    options = {"max_gen_toks": 4, "order": "threshold", "confidence_threshold": 0.0, "stop_at_eos": True}
    texts = write(lm, ("a b c", options), ("d", options))
    written = lm.get_model_info()["written"]
    assert len(texts) == 2 and written["texts"] == 2 and written["num_steps"] == 1
    assert 0 < written["tokens_per_step"] <= 4 and written["block_evaluations"] < 24


def test_a_text_does_not_depend_on_its_batch_and_repeats_differ():
    lm = evaluated(budget=12, num_steps=4, reuse="none")
    sampled = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 4}
    requests = [
        ("a b c", sampled),
        ("d", sampled),
        ("d", {"max_gen_toks": 4}),
        ("d", sampled),
        ("d e f g h i", sampled),
    ]
    texts = write(lm, *requests)
    assert [write(lm, request)[0] for request in requests[:3]] == texts[:3]
    assert texts[1] != texts[3]  # the same request again
    assert all(len(text.split()) <= 4 for text in texts)
    refused(r"`max_gen_toks`=8 leaves no room", write, lm, ("a", {"max_gen_toks": 8}))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"protocol": "mdlm"}, r"`protocol`='mdlm' must be one of \('pgm', 'llada', 'smdm'\)"),
        ({"mcnum": 3}, r"unknown model argument\(s\) \['mcnum'\]: known are .*'mc_num'"),
        ({"mc_num": 0}, r"`mc_num`=0 must be .* at least 1"),
        ({"batch_size": "many"}, r"`batch_size`='many'"),
        ({"max_length": 9}, r"`max_length`=9 must be at most `max_position_embeddings`=8"),
        ({"dtype": "int8"}, r"`dtype`='int8' must be one of \('auto', "),
        ({"iterations": 0}, r"`iterations`=0 must be .* at least 1"),
        ({"seed": 0.5}, r"`seed`=0.5 must be a whole number"),
        ({"reuse": "some"}, r"`reuse`='some' must be one of"),
        ({"budget": 0}, r"`budget`=0"),
        ({"budget": 1}, r"`budget`=1"),  # pays no step
        ({"budget": 12, "num_steps": 9}, r"`budget`=12"),
        ({"budget": "96"}, r"`budget`='96'"),
        ({"mc_num": "8"}, r"`mc_num`='8'"),
        ({"dtype": "float32"}, r"`dtype`='float32' and `revision`='main' are for a model that is to be loaded"),
        ({"revision": "v2"}, r"`revision`='v2' are for a model that is to be loaded"),
    ],
)
def test_wrong_arguments_say_what_is_allowed(arguments, message):
    refused(message, evaluated, **arguments)


MATTERS = {  # argument → another value, and where it shows
    "pretrained": (tiny_model(seed=1).double(), "scores"),
    "protocol": ("llada", "scores"),
    "mc_num": (5, "scores"),
    "iterations": (1, "scores"),
    "max_length": (4, "scores"),
    "seed": (1, "scores"),
    "batch_size": (1, "calls"),
    "budget": (24, "options"),
    "num_steps": (2, "options"),
    "reuse": ("none", "options"),
    "tokenizer": ("other", "loading"),
    "peft": ("adapter", "loading"),
    "revision": ("v2", "loading"),
    "trust_remote_code": (True, "loading"),
    "dtype": ("float32", "loading"),
    "device": ("meta", "device"),
}


@pytest.mark.parametrize(("name", "value", "where"), [(name, *change) for name, change in MATTERS.items()])
def test_every_argument_matters(name, value, where, monkeypatch):
    assert {*MATTERS, "unknown"} == set(inspect.signature(MGMLM).parameters)
    loaded = []
    monkeypatch.setattr(loading, "AutoModelForMaskedLM", SimpleNamespace(
        from_pretrained=lambda *a, **k: loaded.append((a, k)) or tiny_model().double()))  # fmt: skip
    monkeypatch.setattr(loading, "read_tokenizer", lambda *a, **k: loaded.append((a, k)) or tiny_tokenizer())
    monkeypatch.setattr("peft.PeftModel.from_pretrained", lambda model, path: loaded.append(path) or merged(model))

    def seen(arguments: dict) -> tuple:
        del loaded[:]
        if where in ("loading", "device"):
            lm = MGMLM(**{"pretrained": "folder", "device": "cpu", **arguments})
            return repr(loaded) if where == "loading" else lm.device
        lm, calls = MGMLM(**{"pretrained": tiny_model().double(), "tokenizer": tiny_tokenizer(), **arguments}), []
        lm.model.register_forward_hook(lambda *_: calls.append(1))
        if where == "options":
            monkeypatch.setattr(
                lm.model, "generate", lambda ids, **options: calls.append(options) or answered(ids.clamp(max=9), 2)
            )
            write(lm, ("a", {"max_gen_toks": 2}))
            return repr(calls)
        found = scores(lm, ("a b c", " d e f"))
        return found if where == "scores" else len(calls)

    mc_num = {} if where in ("loading", "device") else {"mc_num": 9}
    assert seen({**mc_num, name: value}) != seen(mc_num)


def test_whether_blocks_have_a_step_each_is_asked_of_a_text_not_of_the_longest():
    model = tiny_model().double()
    model.generation_config.block_length = 2
    lm = evaluated(model, budget=12, num_steps=2)
    assert write(lm, ("a", {"max_gen_toks": 4})) != [""]
    refused("`block_length`=2", write, lm, ("a", {"max_gen_toks": 6}))


def merged(model):
    return SimpleNamespace(merge_and_unload=lambda: model)


def test_a_tokenizer_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"`tokenizer` has 11 tokens, the model's `vocab_size` is 7"):
        evaluated(tiny_model(vocab_size=7, mask_token_id=6))
    with pytest.raises(ValueError, match="`iterations`=3, but the model has no fixed-point layers"):
        evaluated(tiny_model(num_fixed_point_layers=0), iterations=3)


def test_a_score_that_is_no_number_is_an_error():
    model = tiny_model()
    model.lm_head.weight.data[3] = torch.nan
    refused("a score is not finite", scores, evaluated(model, mc_num=2), ("a", " b"))


# --- what a text holds -----------------------------------------------------------------------------------------------


def spelling(protocol: str = "llada", length: int = 64, **arguments) -> MGMLM:
    """A model of letters, whose tokenizer can spell the name of its mask."""
    tokenizer = train_tokenizer(["no pair of letters twice"], 258)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    model = tiny_model(
        vocab_size=len(tokenizer), mask_token_id=tokenizer.mask_token_id, max_position_embeddings=length
    )
    return MGMLM(model.double(), tokenizer=tokenizer, protocol=protocol, mc_num=4, device="cpu", **arguments)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_masks_name_in_a_task_is_text(protocol, monkeypatch):
    lm = spelling(protocol)
    mask, seen = lm.tokenizer.mask_token, []
    plain = lm.tokenizer(f"a {mask} b", split_special_tokens=True)["input_ids"]
    end = lm.tokenizer("<|endoftext|>", split_special_tokens=True)["input_ids"]
    assert lm.tok_encode(f"a {mask} b") == plain and lm.tok_encode("<|endoftext|>") == end
    for pair in ((f"a {mask} b", " c"), ("c", f" {mask}"), ("", mask)):
        [(score, _)] = scores(lm, pair)
        prefix, target = (lm.tokenizer(text, split_special_tokens=True)["input_ids"] for text in pair)
        assert score == pytest.approx(reference_score(lm, prefix, target), rel=1e-9)
    rolled = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (f"a {mask} b",), 0)], disable_tqdm=True)
    assert math.isfinite(rolled[0])

    def generate(input_ids, **options):
        seen.append(input_ids.tolist()[0])
        return answered(input_ids.clamp(max=257), 3)

    monkeypatch.setattr(lm.model, "generate", generate)
    write(lm, (f"a {mask} b", {"max_gen_toks": 3}))
    begin = [lm.tokenizer.eos_token_id] if protocol == "pgm" else []
    assert seen == [[*begin, *plain, *[lm.tokenizer.mask_token_id] * 3]]
    with pytest.raises(ValueError, match=f"a request holds the mask id {lm.tokenizer.mask_token_id}"):
        lm._loglikelihood_tokens([(("", ""), [lm.tokenizer.mask_token_id], [1])], disable_tqdm=True)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_empty_continuation_is_the_end_of_the_text(protocol):
    lm = evaluated(protocol=protocol, mc_num=6)
    empty, blank, other, longer = scores(lm, ("a b", ""), ("a b", " "), ("a b", " c"), ("a b", " c d e"))
    assert empty == blank and not empty[1]
    if protocol == "pgm":  # EOS is there for every option, and the score a mean over all tokens
        assert empty[0] == pytest.approx(reference_score(lm, [1, 2], []), rel=1e-9)
    else:
        assert empty[0] == pytest.approx(reference_score(lm, [1, 2], [EOS]), rel=1e-9)
        assert empty[0] < -0.1 and longer[0] < other[0] < -0.1
    lm = MGMLM(tiny_model(), tokenizer=tiny_tokenizer(), protocol="llada", device="cpu")
    lm.end = None
    refused("a continuation has no token", scores, lm, ("a", ""))


def test_a_continuation_that_melts_into_the_context_is_tokenized_apart():
    lm = spelling()
    lm.tokenizer = train_tokenizer(["abab"] * 9, 259)
    assert lm.tok_encode("ab") == [257] and lm._encode("a", "b") == (lm.tok_encode("a"), lm.tok_encode("b"))


def test_a_continuation_gets_no_space_of_its_own_from_tokenizers_that_begin_texts_with_one():
    names = ["<eos>", "\u2581", *"abcdefg", "<unk>", "<mask>"]
    plain = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<unk>"))
    plain.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>", mask_token="<mask>")
    lm = MGMLM(tiny_model().double(), tokenizer=tokenizer, mc_num=3, device="cpu")
    for context, continuation, prefix, target in (
        ("b c", " d", [1, 3, 1, 4], [1, 5]),
        ("b c ", "d", [1, 3, 1, 4, 1], [5]),
        ("b c", "", [1, 3, 1, 4], []),
        ("", "d", [], [1, 5]),
    ):
        [(score, _)] = scores(lm, (context, continuation))
        assert score == pytest.approx(reference_score(lm, prefix, target), rel=1e-9)
    lm = spelling("pgm")  # others have the ids that they had
    for text in (" d", "d", "\nd", "  d", " ", "", "\n\n", "d\n"):
        assert lm._encode_behind("a", text) == lm.tok_encode(text)


def test_stop_strings_may_be_none(monkeypatch):
    lm = evaluated()
    monkeypatch.setattr(lm.model, "generate", lambda ids, **_: answered(ids.masked_fill(ids == MASK, 4), 2))
    texts = write(lm, *(("a", {"max_gen_toks": 2, "until": until}) for until in (None, [], [None, "x"], "", ["d"])))
    assert texts == ["d d"] * 4 + [""]


def test_stop_strings_may_be_names_of_special_tokens(monkeypatch):
    lm = spelling()
    lm.tokenizer.add_tokens([AddedToken("<|eot_id|>", special=True)])  # as Llama 3 has them: in no part of its own
    turn, end = (lm.tokenizer.convert_tokens_to_ids(name) for name in ("<|turn|>", "<|eot_id|>"))
    (a,), (b,), (line,) = (lm.tokenizer(text)["input_ids"] for text in ("a", "b", "\n"))
    new = [a, turn, b, end, line, a]
    monkeypatch.setattr(lm.model, "generate", lambda ids, **_: answered(torch.tensor([[*ids[0, :1], *new]]), 6))
    stops = (["<|turn|>"], ["<|eot_id|>"], ["<|eot_id|>\n"], ["<|turn|>b", "a"], ["x", "<|turn|>a"], [])
    texts = [write(lm, ("b", {"max_gen_toks": 6, "until": until}))[0] for until in stops]
    assert texts == ["a", "ab", "ab", "", "ab\na", "ab\na"]


def test_what_tasks_say_beside_greedy_decoding_is_no_error():
    lm = evaluated(num_steps=2)
    plain = write(lm, ("a b", {"max_gen_toks": 4}))
    for beside in ({"top_p": 0.95}, {"top_k": 2, "do_sample": False}, {"num_beams": 1}):
        assert write(lm, ("a b", {"max_gen_toks": 4, **beside})) == plain
    refused("`seed`=3 is no `--gen_kwargs` but one of `--model_args`", write, lm, ("a b", {"seed": 3}))
    refused("`num_beams`", write, lm, ("a b", {"max_gen_toks": 4, "num_beams": 2}))
    lm.seed = 3
    free, narrow = (write(lm, ("a b", {"max_gen_toks": 4, "temperature": 9.0, **top})) for top in ({}, {"top_k": 1}))
    assert narrow != free


CHAT = (
    "{% for message in messages %}{% if message.role == 'system' and loop.length > 2 %}"
    "{{ raise_exception('no system') }}{% endif %}<|turn|>{{ message.role }}:{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant:{% endif %}"
)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_chat_template_writes_tokens_and_a_question_text(protocol):
    lm = spelling(protocol)
    messages = [{"role": "user", "content": "a <|mask|>?"}]
    refused("needs a tokenizer with a `chat_template`", lm.apply_chat_template, messages)
    turn = lm.tokenizer.convert_tokens_to_ids("<|turn|>")
    assert turn not in spelling(protocol).tok_encode("<|turn|>user")  # without a chat it is text
    lm.tokenizer.chat_template = CHAT
    text = lm.apply_chat_template(messages)
    assert text == "<|turn|>user:a <|mask|>?<|turn|>assistant:"
    assert text == lm.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = lm.tok_encode(text)
    assert ids.count(turn) == 2 and lm.tokenizer.mask_token_id not in ids and lm.tokenizer.decode(ids) == text
    prefilled = lm.apply_chat_template([*messages, {"role": "assistant", "content": "b"}], add_generation_prompt=False)
    assert prefilled.endswith("<|turn|>assistant:b")
    system = {"role": "system", "content": "s"}
    assert "system" not in lm.apply_chat_template([system, *messages, messages[0]])
    assert lm.chat_template(True) == CHAT
    lm.tokenizer.chat_template = "<|endoftext|>" + CHAT
    (prefix, target) = lm._encode(lm.apply_chat_template(messages), "b")
    assert (prefix[0] == lm.begin) == (protocol != "pgm") and target == lm.tok_encode("b")


# --- through lm-eval -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A saved model with its tokenizer, and three tasks on local files."""
    root = tmp_path_factory.mktemp("lm_eval")
    tiny_model(input_injection="diagonal").save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")
    rows = [{"q": f"a {w}", "options": [" b", " c d"], "answer": i % 2} for i, w in enumerate("efghi")]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kinds = {
        "choice": 'output_type: multiple_choice\ndoc_to_choice: "{{options}}"\ndoc_to_target: answer\n'
        "metric_list: [{metric: acc}]",
        "rolling": 'output_type: loglikelihood_rolling\ndoc_to_target: "{{q}}"\n'
        "metric_list: [{metric: word_perplexity}]",
        "writing": 'output_type: generate_until\ndoc_to_target: "{{options[answer]}}"\n'
        "generation_kwargs: {max_gen_toks: 3, until: [f]}\nmetric_list: [{metric: exact_match}]",
    }
    for name, kind in kinds.items():
        text = "" if name == "rolling" else "{{q}}"
        (root / f"{name}.yaml").write_text(
            f"task: tiny_{name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {root}/rows.jsonl}}}}\n"
            f'test_split: test\ndoc_to_text: "{text}"\ntarget_delimiter: ""\nmetadata: {{version: 1.0}}\n{kind}\n'
        )
    return root


TASKS = ["tiny_choice", "tiny_rolling", "tiny_writing"]


def run(folder: Path, tasks=TASKS, model: dict | None = None, **options) -> dict:
    arguments = {"pretrained": str(folder / "model"), "mc_num": 8, **(model or {})}
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return simple_evaluate(
        "fpmgm", arguments, tasks=tasks, task_manager=manager, device="cpu", bootstrap_iters=0, **options
    )


def test_results_and_table_name_the_protocol(folder):
    results = run(folder)
    assert set(results["results"]) == set(TASKS)
    assert 0 <= results["results"]["tiny_choice"]["acc,none"] <= 1
    config = results["config"]
    assert (config["protocol"], config["mc_num"], config["truncated_requests"]) == ("pgm", 8, 0)
    assert config["model_args"]["protocol"] == "pgm"
    rows = [line for line in make_table(results).splitlines() if "tiny_" in line]
    assert len(rows) == 3
    assert all("(pgm, 8 draws)" in row for row in rows)
    # an answer is the option with the higher score
    lm = MGMLM(str(folder / "model"), mc_num=8, device="cpu")
    for sample in results["samples"]["tiny_choice"]:
        options = scores(lm, *((sample["doc"]["q"], option) for option in (" b", " c d")))
        best = int(options[1][0] > options[0][0])
        assert sample["acc"] == (best == sample["doc"]["answer"])


def test_a_chat_template_is_applied(folder, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}i {{ message.content }} {% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    results = run(folder, ["tiny_choice"], {"tokenizer": str(tmp_path)}, apply_chat_template=True)
    plain = run(folder, tasks=["tiny_choice"])
    for sample, other in zip(results["samples"]["tiny_choice"], plain["samples"]["tiny_choice"], strict=True):
        assert sample["arguments"][0][0].startswith("i a ")
        assert sample["resps"] != other["resps"]


def test_a_cache_of_another_protocol_is_refused(folder, tmp_path):
    cache = str(tmp_path / "answers")
    first = run(folder, tasks=["tiny_choice"], use_cache=cache)
    again = run(folder, tasks=["tiny_choice"], use_cache=cache)
    assert again["results"] == first["results"]
    refused(r"`use_cache` holds answers of .*'pgm'", CachingLM, evaluated(protocol="llada"), f"{cache}_rank0.db")
    trained_on = MGMLM(str(folder / "model"), mc_num=8, device="cpu")
    CachingLM(trained_on, f"{cache}_rank0.db")
    trained_on.model.lm_head.bias.data.add_(1)  # under the same name
    refused("`use_cache` holds answers of", CachingLM, trained_on, f"{cache}_rank0.db")


def test_adapters_are_merged(folder, tmp_path):
    peft = pytest.importorskip("peft")
    base = str(folder / "model")
    plain = scores(MGMLM(base, mc_num=4, device="cpu"), *PAIRS)
    lora = peft.LoraConfig(target_modules=["qkv_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(MGMLM(base, mc_num=4, device="cpu").model, lora)
    adapted.save_pretrained(tmp_path)
    expected = scores(evaluated(adapted, mc_num=4), *PAIRS)
    assert expected != plain
    merged = MGMLM(base, peft=str(tmp_path), mc_num=4, device="cpu")
    by_name = MGMLM(str(tmp_path), tokenizer=base, mc_num=4, device="cpu")
    for lm in (merged, by_name):
        assert [s for s, _ in scores(lm, *PAIRS)] == pytest.approx([s for s, _ in expected], rel=1e-4)


DOCUMENTED_COMMAND = next(
    line for line in (Path(__file__).parents[2] / "docs/lm_eval.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("fpmgm-eval ")
)  # fmt: skip


def test_the_readmes_command_runs_on_any_machine(folder, tmp_path, monkeypatch, capsys):
    command = DOCUMENTED_COMMAND.replace("quickstart/fp_mdlm", str(folder / "model"))
    command = command.replace("openbookqa,arc_easy", "tiny_choice,tiny_rolling").replace("outputs/", f"{tmp_path}/")
    assert "--device" not in command and "tiny_choice" in command and f"{tmp_path}/" in command
    monkeypatch.setattr("sys.argv", [*command.split(), "--include_path", str(folder)])
    monkeypatch.setattr("lm_eval.utils.make_table", make_table)  # put back afterwards
    tasks = partial(TaskManager, include_defaults=False)  # to read lm-eval's own takes long
    monkeypatch.setattr("lm_eval.tasks.TaskManager", tasks)
    main()
    assert "tiny_choice (pgm, 1024 draws)" in capsys.readouterr().out
    [saved] = (tmp_path / "eval").rglob("results_*.json")
    assert json.loads(saved.read_text(encoding="utf-8"))["config"]["protocol"] == "pgm"


def test_a_gpu_that_is_not_there_is_named(folder):
    refused(r"`device`='cuda:0', but PyTorch sees no GPU here", MGMLM, folder / "model", device="cuda:0")
    default = MGMLM.create_from_arg_obj({"pretrained": folder / "model"}, {"device": "cuda:0"})  # lm-eval's
    assert default.device == torch.device("cpu")


@pytest.mark.slow
def test_the_command_line_alone_and_in_two_processes(folder, tmp_path):
    expected = run(folder)["results"]
    command = ["-m", "fpmgm.evaluation.lm_eval", "--model_args", f"pretrained={folder / 'model'},mc_num=8"]
    command += ["--include_path", str(folder), "--tasks", ",".join(TASKS), "--device", "cpu", "--output_path"]
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")
    for name, launcher in (("alone", ()), ("two", torchrun)):
        table = run_python(*launcher, *command, str(tmp_path / name)).stdout
        assert table.count("(pgm, 8 draws)") == 3
        assert "'protocol': 'pgm'" in table  # in the line above it
        [saved] = (tmp_path / name).rglob("results_*.json")
        saved = json.loads(saved.read_text())
        assert saved["config"]["protocol"] == "pgm"
        for task, row in expected.items():
            metric = next(key for key in row if key.endswith(",none"))
            assert saved["results"][task][metric] == pytest.approx(row[metric], rel=1e-6)


def test_of_positions_that_rounding_alone_tells_apart_the_first_is_the_most_confident():
    logits = torch.tensor([[0.0, 2.0], [0.0, 2.0 + 1e-6], [0.0, 1.0]], dtype=torch.float32)
    masked = torch.tensor([[False, True, True, True]])
    for order in ([0, 1, 2], [1, 0, 2]):
        chosen = scoring.most_confident(logits[order], torch.ones(3, dtype=torch.long), masked)
        assert chosen.tolist() == [[False, True, False, False]]
