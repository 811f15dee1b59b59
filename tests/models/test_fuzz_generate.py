# SPDX-License-Identifier: Apache-2.0
"""Whatever `generate` is given, it gives a valid result or a `ValueError`, and soon.

`FPMGM_FUZZ_CALLS=5000 pytest tests/models/test_fuzz_generate.py` tries more calls than the suite does.
"""

import os
import random
from fractions import Fraction

import numpy as np
import pytest
import torch

from fpmgm import MGMGenerationConfig
from tests.models.helpers import lively_image_model, lively_model


CALLS = int(os.environ.get("FPMGM_FUZZ_CALLS", "240"))
BATCH = 40  # calls of a test

# Contractions, so that no state leaves the numbers; the mask is not the last id.
MODELS = {
    "text": lively_model(mask_token_id=4, max_position_embeddings=6),
    "explicit": lively_model(num_pre_layers=2, num_fixed_point_layers=0, num_post_layers=0, max_position_embeddings=6),
    "timed": lively_model(time_conditioning=True, max_position_embeddings=6).float(),
    "image": lively_image_model(grid_size=2).bfloat16(),
}
JUNK = [
    "no", "3", "", b"x", 2.5, -1, 0, 1, -0.0, 1e-310, 1e300, float("nan"), float("inf"), 10**9, 10**30, 10**5000, True,
    False, None, [], [3], [1, 2], ["3"], [[1]], (1, 2), {}, {"a": 1}, 3j, object(), Fraction(1, 3), np.float32(0.5),
    np.int64(3), np.ones((2, 2)), np.array(["a"]), torch.tensor(3), torch.ones(2), torch.zeros(1, 0), slice(3),
]  # fmt: skip
PLAN = {"3": {"num_steps": 2}, "24": {"num_steps": 3, "reuse": "full"}}
GOOD = {
    "batch_size": [1, 2, 3, None, np.int64(2)],
    "length": [1, 3, 4, 6, None],
    "seed": [0, 7, -3, 2**70, [1], [1, 2], (1, 2, 3), None],
    "generator": [torch.Generator(), None],
    "class_labels": [0, 2, 3, [0, 1], torch.tensor([0, 3]), np.array([1, 2])],
    "token_type_ids": [torch.zeros(1, 6)],
    "budget": [6, 12, 20, 30, np.int32(12)],
    "num_steps": [1, 2, 3, 5],
    "iterations": [0, 1, 2, [1, 2], [0, 0], [2, 1, 1]],
    "allocation": ["fixed", "decreasing", "cosine", "front_loaded", [1, 2]],
    "reuse": ["none", "full", "3sr"],
    "gamma_unchanged": [0, 0.5, 1],
    "gamma_masked": [[0, 1], (0.2, 0.3)],
    "gamma_changed": [0.0, 0.7],
    "gamma_remasked": [0.3],
    "tolerance": [0, 0.05, 0.5, 1e9],
    "solver": ["picard", "anderson"],
    "freeze": [True, False],
    "refresh_every": [1, 2, 5],
    "freeze_tolerance": [0, 0.05, 1e9],
    "tuned_plans": [{}, PLAN, {"20": {"solver": "anderson"}}],
    "temperature": [0, 1e-310, 1e-308, 0.5, 1, 2.5, 1e300, Fraction(1, 2)],
    "top_k": [1, 2, 100, 10**30],
    "top_p": [1e-9, 0.5, 1],
    "order": ["ancestral", "confidence", "halton", "random", "entropy", "threshold", "margin"],
    "entropy_bound": [0, 0.5, 1e300],
    "confidence_threshold": [0, 0.5, 1],
    "margin_threshold": [0, 0.5, 1],
    "max_new_tokens": [1, 2, 4],
    "block_length": [1, 2, 100],
    "stop_at_eos": [True],
    "eos_token_id": [0, 3, [1, 2]],
    "pad_token_id": [1],
    "guidance_scale": [0, 1, 2.5, 1e3, 1e300],
    "guidance_schedule": ["constant", "linear"],
    "remask": [0.1, 1],
    "final": ["sample", "argmax", "none"],
    "progress_bar": [False],
    "generation_config": [MGMGenerationConfig(budget=12), MGMGenerationConfig(num_steps=2, iterations=1)],
    "callback": [lambda step: None],
    "streamer": [None],
}


def random_prompt(config, rng: random.Random) -> tuple[object, object]:
    """Ids and a mask or none, of many types."""
    rows, length = rng.choice([1, 1, 2, 3]), rng.choice([config.max_position_embeddings, 2, 4])
    ids = [
        [config.mask_token_id if rng.random() < 0.6 else rng.randrange(config.vocab_size) for _ in range(length)]
        for _ in range(rows)
    ]
    mask = [[int(rng.random() < 0.8) for _ in row] for row in ids]
    kinds = [
        lambda x: x,
        torch.tensor,
        np.array,
        lambda x: torch.tensor(x).float(),
        lambda x: np.array(x).astype(bool),
    ]
    return rng.choice([kinds[0], kinds[1], kinds[2], lambda x: torch.tensor(x, dtype=torch.int32)])(ids), rng.choice(
        [lambda x: None, *kinds]
    )(mask)


# Arguments that some model does not take, or that exclude others: left out of most calls, so that these are good.
FOREIGN = {
    "text": {"class_labels", "guidance_scale"},
    "timed": {"class_labels", "guidance_scale"},
    "explicit": {"class_labels", "guidance_scale", "iterations", "tolerance", "solver", "freeze_tolerance"},
    "image": {"token_type_ids", "length", "remask", "final", "max_new_tokens", "block_length", "stop_at_eos"},
}
BOUNDS = {"entropy_bound": "entropy", "confidence_threshold": "threshold", "margin_threshold": "margin"}
EXCLUSIVE = {
    "seed": {"generator"},
    "iterations": {"budget", "allocation", "num_steps"},
    "order": {"remask", "final"},
    "stop_at_eos": {"remask"},
    **{name: {"remask", *BOUNDS} - {name} for name in BOUNDS},
}


def random_call(kind: str, rng: random.Random) -> dict:
    """A few arguments: most of them good, some of another kind, some misspelt."""
    call = {name: rng.choice(GOOD[name]) for name in rng.sample(sorted(GOOD), rng.randrange(8))}
    config, careful = MODELS[kind].config, rng.random() < 0.7
    if rng.random() < 0.5 and not (careful and kind == "image"):
        call["input_ids"], call["attention_mask"] = random_prompt(config, rng)
    if careful:
        call |= {"eos_token_id": 3} if "stop_at_eos" in call else {}
        unwanted = set(FOREIGN[kind]).union(*(EXCLUSIVE.get(name, ()) for name in call))
        unwanted |= {"batch_size", "length"} if "input_ids" in call else {"max_new_tokens"}
        if isinstance(call.get("seed"), (list, tuple)):
            call["seed"] = 1
        call = {name: value for name, value in call.items() if name not in unwanted}
        call |= next(({"order": order} for name, order in BOUNDS.items() if name in call), {})
        call |= {"freeze": True} if {"refresh_every", "freeze_tolerance"} & set(call) else {}
        call |= {"num_steps": 2} if "iterations" not in call and "allocation" not in call else {}
    if rng.random() < 0.3:
        name = rng.choice([*sorted(GOOD), "input_ids", "attention_mask", "return_dict_in_generate"])
        call[name] = rng.choice([x for x in JUNK if name != "callback" or not callable(x)])  # a callback may raise
    if rng.random() < 0.03:
        call[rng.choice(["max_length", "bugdet", "do_sample", "x"])] = 3
    return call


def check(model, call: dict, out) -> None:
    """What holds of every result."""
    config, tokens = model.config, out if torch.is_tensor(out) else out.sequences
    assert tokens.dtype == torch.long and tokens.dim() == 2
    assert ((tokens >= 0) & (tokens < config.vocab_size)).all()
    ids, mask = call.get("input_ids"), call.get("attention_mask")
    if call.get("stop_at_eos") or call.get("max_new_tokens") is not None:
        ids = mask = None  # moved and cut: tested with prompts
        written = torch.zeros_like(tokens, dtype=torch.bool)
        assert call.get("final") == "none" or tokens.ne(config.mask_token_id).sum() >= 1
    elif ids is None:
        written = torch.ones_like(tokens, dtype=torch.bool)
        assert tokens.shape[1] == (call.get("length") or config.max_position_embeddings)
    else:
        ids = torch.as_tensor(ids).long().expand(tokens.shape)
        written = ids == config.mask_token_id
    if mask is not None:
        written = written & torch.as_tensor(mask).bool().expand(tokens.shape)
    if ids is not None:
        assert torch.equal(tokens[~written], ids[~written])
    if call.get("final") != "none":
        assert tokens[written].ne(config.mask_token_id).all()
    if not torch.is_tensor(out):
        planned = len(out.iterations) * (config.num_pre_layers + config.num_post_layers)
        planned += sum(out.iterations) * config.num_fixed_point_layers
        assert out.block_evaluations <= planned and out.block_evaluations_per_sequence.shape == tokens.shape[:1]
        if call.get("budget") is not None:
            assert out.block_evaluations <= call["budget"]


@pytest.mark.parametrize("place", range(0, CALLS, BATCH))
def test_a_valid_result_or_a_value_error(place):
    results = 0  # that are no error
    for number in range(place, min(place + BATCH, CALLS)):
        rng = random.Random(number)
        kind = rng.choice(sorted(MODELS))
        model, call = MODELS[kind], {"return_dict_in_generate": True, **random_call(kind, rng)}
        try:
            out = model.generate(**call)
        except ValueError as error:
            assert str(error)
            continue
        except Exception as error:
            raise AssertionError(f"call {number}, {call}: {type(error).__name__}: {error}") from error
        try:
            check(model, call, out)
        except AssertionError as error:
            raise AssertionError(f"call {number}, {call} gave {out}") from error
        results += 1
    assert results >= 0.25 * min(BATCH, CALLS - place)  # not all are refused


@pytest.mark.parametrize("name", [*GOOD, "input_ids", "attention_mask", "return_dict_in_generate"])
def test_a_value_of_another_kind_is_named(name):
    beside = {} if name in ("iterations", "generation_config") else {"budget": 12}  # few steps, also for an image
    for value in ("no", b"x", 2.5, 3j, object(), {"a": 1}, 10**30, float("nan"), [["a"]], slice(3)):
        for model in (MODELS["text"], MODELS["image"]):
            try:
                check(model, {name: value}, model.generate(**{**beside, name: value}))
            except ValueError as error:
                assert f"`{name}`" in str(error), (name, value)
