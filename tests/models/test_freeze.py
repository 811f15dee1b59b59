# SPDX-License-Identifier: Apache-2.0
"""Frozen positions: what they give is what a dense computation with old keys and values gives, rows do not see each
other, the budget holds, and what is computed is what is booked."""

import itertools
from unittest.mock import patch

import pytest
import torch

from fpmgm import MGMGenerationConfig, plan_budget
from fpmgm.models import block_mgm
from fpmgm.models.freeze import expected_shares
from fpmgm.models.frozen_states import FrozenStates
from fpmgm.models.layers import eager_attention_forward
from tests.models.helpers import lively_image_model, lively_model
from tests.testing_utils import refused, tiny_model


M = 10
EXPLICIT = {"num_pre_layers": 3, "num_fixed_point_layers": 0, "num_post_layers": 0}
CLASSES = {"class_labels": [0, 2, 1], "guidance_scale": 2.0}


def text(**config):
    return lively_model(**{"max_position_embeddings": 12, **config})


MODELS = {
    "text": (text, {}),
    "deeper": (lambda: text(num_pre_layers=2, num_fixed_point_layers=2, num_post_layers=0), {}),
    "explicit": (lambda: text(**EXPLICIT), {}),
    "timed": (lambda: text(time_conditioning=True), {}),
    "image": (lambda: lively_image_model(grid_size=4, num_register_tokens=2), CLASSES),
    "explicit image": (lambda: lively_image_model(grid_size=4, **EXPLICIT), CLASSES),
}


def prompts() -> dict:
    """Three rows with a prompt: one of 8 tokens, one of 1, one of 3 before padding."""
    input_ids = torch.full((3, 12), M)
    input_ids[0, :8], input_ids[1, 5], input_ids[2, 2:5] = torch.arange(8), 3, torch.tensor([7, 8, 9])
    attention_mask = torch.ones_like(input_ids)
    attention_mask[2, 9:] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def late() -> dict:
    """Three rows, two of them with so few masks that they have nothing to do at the first steps."""
    input_ids = torch.arange(12).clamp(max=9).repeat(3, 1)
    input_ids[0], input_ids[1, ::6], input_ids[2, 1::5] = M, M, M
    return {"input_ids": input_ids}


def row(call: dict, index: int) -> dict:
    """The call for one of its rows."""
    return {
        name: value[index : index + 1] if name in ("input_ids", "attention_mask", "class_labels", "seed") else value
        for name, value in call.items()
    } | {"batch_size": 1}


# --- one call ------------------------------------------------------------------------------------------------------


class OldKeys:
    """Attention in which the positions that are not `active` (B, W) have the keys and values of the last call in which
    they were, block by block."""

    def __init__(self):
        self.active, self.kept = None, {}

    def __call__(self, module, query, key, value, *args, **kwargs):
        if self.active is not None:
            frozen = ~self.active[:, None, :, None]
            key, value = (
                torch.where(frozen, old, new) for old, new in zip(self.kept[module], (key, value), strict=True)
            )
        self.kept[module] = (key, value)
        return eager_attention_forward(module, query, key, value, *args, **kwargs)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_call_is_a_dense_one_with_old_keys_and_values(name):
    model, _ = MODELS[name][0](), torch.manual_seed(0)
    model.config._attn_implementation = "eager"
    mask, length = model.config.mask_token_id, model.config.max_position_embeddings
    width = length + model.config.num_register_tokens
    ids, active = torch.randint(mask, (3, length)), torch.ones(3, width, dtype=torch.bool)
    states, attention, solution = FrozenStates.empty(model.config), OldKeys(), None
    for step in range(4):
        call = {"input_ids": ids, "logits_positions": active[:, :length].flatten().nonzero().squeeze(1)[step % 2 :: 2]}
        if "image" in name:
            call |= {"class_labels": torch.tensor([0, 1, 3])}
        else:
            call |= {"attention_mask": torch.ones(3, length).tril(length - 2), "timesteps": torch.rand(3)}
        if model.fixed_point is not None:
            call |= {"num_iterations": 3}
        if solution is not None:
            call |= {"fixed_point_state": solution, "reuse_weights": torch.rand(3, width)}
        attention.active = active if step else None
        with patch.object(block_mgm, "eager_attention_forward", attention):
            expected = model(**call)
        positions = {"active_positions": active.flatten().nonzero().squeeze(1)} if step else {}
        found = model(**call, frozen_states=states, **positions)
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-9, atol=1e-9)
        if model.fixed_point is not None:
            new = expected.fixed_point_state
            solution = new if solution is None else torch.where(active[:, :, None], new, solution)
            torch.testing.assert_close(found.fixed_point_state, solution, rtol=1e-9, atol=1e-9)
        active = torch.rand(3, width) < 0.5  # rows of different numbers, once none
        active[0, 0], active[1] = True, active[1] & (step == 1)
        ids = torch.where(active[:, :length], torch.randint(mask + 1, (3, length)), ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"active_positions": torch.tensor([1])}, "give those of a call that computed all positions"),
        ({"frozen_states": "empty", "active_positions": torch.tensor([1])}, "give those of a call that computed all"),
        ({"frozen_states": "full", "active_positions": torch.tensor([1])}, "give `logits_positions` too"),
        (
            {"frozen_states": "full", "active_positions": torch.tensor([1]), "logits_positions": torch.tensor([2])},
            "`logits_positions` must be among `active_positions`",
        ),
        ({"frozen_states": "empty", "training": True}, "`frozen_states` are for sampling"),
    ],
)
def test_a_call_that_cannot_be_honoured_is_refused(options, message):
    model, ids = text(), torch.full((1, 12), M)
    with torch.no_grad():
        states = FrozenStates.empty(model.config)
        if options.get("frozen_states") == "full":
            model(ids, frozen_states=states)
        options = options | ({"frozen_states": states} if "frozen_states" in options else {})
        refused(message, model, ids, **options)
    refused("`frozen_states` are for sampling", model, ids, frozen_states=states)


# --- whole runs ----------------------------------------------------------------------------------------------------

RUNS = [
    {},
    {"reuse": "none"},
    {"refresh_every": 3},
    {"freeze_tolerance": 0.1},
    {"tolerance": 0.1},
    {"solver": "anderson", "refresh_every": 3},
    {"order": "confidence"},
    {"order": "entropy"},
]
OF_TEXT = [
    {"remask": 0.2},
    {"final": "none"},
    {"block_length": 5},
    {"stop_at_eos": True, "eos_token_id": [3, 4]},
    prompts(),
    prompts() | {"tolerance": 0.1, "reuse": "none"},
    prompts() | {"refresh_every": 2, "reuse": "none", "num_steps": 6},
    late() | {"freeze_tolerance": 0.1, "reuse": "none", "num_steps": 5},
]
OF_SOLVER = {"freeze_tolerance", "tolerance", "solver"}


def runs():
    """Every option on a text model and on an image model; on each other model two."""
    for place, (name, (_, call)) in enumerate(MODELS.items()):
        allowed = RUNS + ([] if "image" in name else OF_TEXT)
        allowed = [options for options in allowed if "explicit" not in name or not OF_SOLVER & set(options)]
        for options in allowed if name in ("text", "image") else allowed[place % 3 :: 5]:
            yield name, {"batch_size": 3, "seed": [5, 6, 7], "budget": 27, **call, **options}


@pytest.mark.parametrize(("name", "call"), list(runs()))
def test_rows_do_not_see_each_other_and_keep_to_the_budget(name, call):
    model = MODELS[name][0]()
    call = {**call, "freeze": True, "return_dict_in_generate": True}
    out = model.generate(**call)
    for index in range(3):
        alone = model.generate(**row(call, index))
        length = alone.sequences.shape[1]  # of one that ends early, less
        assert torch.equal(alone.sequences[0], out.sequences[index, :length])
        assert alone.block_evaluations == out.block_evaluations_per_sequence[index] <= call["budget"]
        steps, iterations, _ = alone.residuals.shape
        together = out.residuals[:steps, :iterations, index]
        torch.testing.assert_close(together, alone.residuals[:, :, 0], equal_nan=True)
    plain = model.generate(**{**call, "freeze": False, "refresh_every": None, "freeze_tolerance": None})
    assert out.num_steps >= plain.num_steps and out.full_block_evaluations >= out.block_evaluations
    assert plain.full_block_evaluations == plain.block_evaluations


@pytest.mark.parametrize("options", [{}, {"reuse": "none"}, {"tolerance": 0.1}, {"order": "confidence"}])
@pytest.mark.parametrize("name", MODELS)
def test_computing_everything_at_every_step_is_not_freezing(name, options):
    model = MODELS[name][0]().float()
    if model.fixed_point is None and "tolerance" in options:
        return
    call = {"batch_size": 3, "seed": 1, "budget": 36, "return_dict_in_generate": True} | MODELS[name][1] | options
    plain, frozen = model.generate(**call), model.generate(**call, freeze=True, refresh_every=1)
    assert torch.equal(plain.sequences, frozen.sequences)
    assert torch.equal(plain.residuals.nan_to_num(-1), frozen.residuals.nan_to_num(-1))
    assert torch.equal(plain.block_evaluations_per_sequence, frozen.block_evaluations_per_sequence)


@pytest.mark.parametrize("name", ["text", "image"])
def test_without_tolerance_to_movement_nothing_is_frozen(name):
    model, call = MODELS[name][0](), {"batch_size": 3, "seed": 1, "num_steps": 6, "iterations": 3} | MODELS[name][1]
    frozen = model.generate(**call, freeze=True, freeze_tolerance=0, return_dict_in_generate=True)
    assert torch.equal(model.generate(**call), frozen.sequences)
    assert frozen.block_evaluations == frozen.full_block_evaluations == 6 * 5
    some = model.generate(**call, freeze=True, freeze_tolerance=0.5, return_dict_in_generate=True)
    least = model.generate(**call, freeze=True, return_dict_in_generate=True)
    assert least.block_evaluations < some.block_evaluations < frozen.block_evaluations


@pytest.mark.parametrize("name", MODELS)
def test_what_is_booked_is_what_the_blocks_are_given(name):
    model, given = MODELS[name][0](), []
    blocks = [module for module in model.modules() if hasattr(module, "dropout_masks")]
    for block in blocks:
        block.register_forward_pre_hook(lambda _, arguments: given.append(arguments[0].shape[:-1].numel()))
    call = {"class_labels": 1} if "image" in name else {}
    out = model.generate(seed=0, budget=36, freeze=True, refresh_every=4, return_dict_in_generate=True, **call)
    width = model.config.max_position_embeddings + model.config.num_register_tokens
    assert out.block_evaluations == -(-sum(given) // width) <= 36
    assert out.positions_computed.max() == width and len(given) == out.full_block_evaluations


def test_a_prompt_is_computed_once():
    call = {**prompts(), "num_steps": 6, "iterations": 3, "seed": 0, "return_dict_in_generate": True}
    out = text().generate(**call, freeze=True)
    written = (call["input_ids"] == M) & call["attention_mask"].bool()
    assert out.positions_computed[0].tolist() == [12] * 3
    assert out.positions_computed[1].tolist() == written.sum(dim=1).tolist() == [4, 11, 6]
    for budget in (6, 36):  # one that buys no step with what is frozen, and one that does
        paid = text().generate(call["input_ids"][:1], budget=budget, seed=0, freeze=True, return_dict_in_generate=True)
        assert paid.positions_computed[0].tolist() == [12] and (paid.positions_computed[1:] <= 4).all()
    later = text().generate(**call, freeze=True, refresh_every=4).positions_computed
    assert later[4].tolist() == [12] * 3 and (later[5] < 12).all()


# --- budgets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "length"), [({}, 3), ({}, 12), (EXPLICIT, 3), ({"num_pre_layers": 4, "num_post_layers": 4}, 12)]
)
def test_no_draw_of_the_reveals_exceeds_the_budget(layers, length):
    # Short sequences, whose numbers of masked positions are far from what a plan expects.
    model = tiny_model(input_injection="diagonal", max_position_embeddings=length, **layers)
    options = itertools.product((20, 40), ("none", "3sr"), (None, 3), ("decreasing", "increasing"))
    for seed, (budget, reuse, every, allocation) in enumerate(options):
        out = model.generate(
            batch_size=16, budget=budget, reuse=reuse, freeze=True, refresh_every=every, allocation=allocation,
            seed=seed, return_dict_in_generate=True,
        )  # fmt: skip
        assert out.block_evaluations <= budget
        assert out.sequences.ne(M).all()


@pytest.mark.parametrize("order", ["ancestral", "text halton", "confidence", "halton", "random", "image confidence"])
@pytest.mark.parametrize("every", [None, 4])
def test_a_plan_expects_what_runs(order, every):
    image = order in ("halton", "random", "image confidence")
    model = lively_image_model(grid_size=6) if image else text(max_position_embeddings=36)
    options = {"order": order.removeprefix("image ").removeprefix("text "), "freeze": True, "refresh_every": every}
    shares = expected_shares(MGMGenerationConfig(**options), model.orders, 36, model.config.num_register_tokens)
    out = model.generate(
        batch_size=64 if order == "ancestral" else 2, num_steps=9, iterations=1, seed=0,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    computed = out.positions_computed.double() / (36 + model.config.num_register_tokens)  # (T, B)
    if order == "ancestral":
        torch.testing.assert_close(computed.mean(dim=1), torch.tensor(shares(9)).double(), rtol=0, atol=0.05)
    else:
        torch.testing.assert_close(computed[:, 0], torch.tensor(shares(9)).double())
    plan, full = (plan_budget(model.config, 96, shares=x) for x in (shares, None))
    assert plan.num_steps > full.num_steps and plan.block_evaluations <= 96
    cost = sum(s * (2 + n) for s, n in zip(plan.shares, plan.iterations, strict=True))
    assert 96 - 1 <= cost <= 96


def test_a_budget_is_spent():
    model = text(max_position_embeddings=64)
    out = model.generate(batch_size=16, budget=96, freeze=True, seed=0, return_dict_in_generate=True)
    assert out.num_steps > 24 and out.block_evaluations_per_sequence.double().mean() > 90


@pytest.mark.parametrize("budget", [36, 60])  # without frozen positions 6 steps and 10
def test_a_budget_does_not_go_to_steps_that_reveal_nothing(budget):
    shares = expected_shares(MGMGenerationConfig(freeze=True, order="halton"), type(text()).orders, length=8)
    assert plan_budget(text().config, budget, shares=shares).num_steps == max(8, budget // 6)


@pytest.mark.parametrize("layers", [EXPLICIT, {"num_pre_layers": 4, "num_post_layers": 4}])
def test_nothing_is_frozen_where_that_buys_nothing(layers):
    model = text(**layers, max_position_embeddings=64)
    for steps in (2, 6):
        call = {"batch_size": 2, "order": "halton", "seed": 0, "return_dict_in_generate": True}
        call |= {"budget": steps * model.config.num_hidden_layers, "iterations_per_step": 1}
        plain, frozen = (model.generate(**call, freeze=freeze, refresh_every=None) for freeze in (False, True))
        assert torch.equal(plain.sequences, frozen.sequences) == (steps < 6)  # two steps buy no third
        assert (frozen.full_block_evaluations == call["budget"]) == (steps < 6)


@pytest.mark.parametrize(("layers", "budget"), [({}, 12), (EXPLICIT, 6)])
def test_what_buys_nothing_depends_on_the_row_alone(layers, budget):
    model, call = text(**layers), {"budget": budget, "freeze": True, "return_dict_in_generate": True}
    ids, real = torch.full((3, 12), M), torch.ones(3, 12, dtype=torch.bool)
    ids[1, :5] = 2  # a prompt
    ids[2, 9:], real[2, 9:] = 0, False  # a shorter text from nothing
    out = model.generate(ids, attention_mask=real, seed=[3, 4, 5], **call)
    for row, end in enumerate((12, 12, 9)):
        alone = model.generate(ids[row : row + 1, :end], seed=[3 + row], **call)
        assert torch.equal(out.sequences[row, :end], alone.sequences[0])
        plain = model.generate(ids[row : row + 1, :end], seed=[3 + row], **{**call, "freeze": False})
        assert (row == 1) or torch.equal(alone.sequences, plain.sequences)
    assert (out.positions_computed[:, [0, 2]] == 12).all() and (out.positions_computed[1:, 1] < 12).all()


def test_switching_off_takes_the_details_along():
    model = text()
    model.generation_config = model.generation_config.updated(freeze=True, refresh_every=3, freeze_tolerance=0.1)
    assert torch.equal(model.generate(seed=0, freeze=False), text().generate(seed=0))
