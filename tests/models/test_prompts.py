# SPDX-License-Identifier: Apache-2.0
"""Text behind a prompt: masks where users of transformers expect them, ends of text, and text block by block."""

import itertools
import logging

import pytest
import torch
from transformers import BertTokenizerFast

from fpmgm.data import train_tokenizer
from fpmgm.models.blocks import block_windows
from fpmgm.models.generation_inputs import continued
from tests.models.helpers import lively_model, record_calls
from tests.models.test_adaptive_orders import BOUNDS, revealed
from tests.models.test_generation_mgm import KnownDistribution
from tests.testing_utils import tiny_config


M = 10  # the mask of tiny_config
ORDERS = ("ancestral", "halton", "confidence", "entropy", "threshold", "margin")


# --- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "real", "expected", "still_real"),
    [
        ([[1, 2, 3], [4, 0, 0]], [[1, 1, 1], [1, 0, 0]], [[1, 2, 3, M, M], [4, M, M, 0, 0]], ["11111", "11100"]),
        ([[1, 2, 3], [0, 0, 4]], [[1, 1, 1], [0, 0, 1]], [[1, 2, 3, M, M], [0, 0, 4, M, M]], ["11111", "00111"]),
        ([[0, 4, 0], [0, 0, 0]], [[0, 1, 0], [0, 0, 0]], [[0, 4, M, M, 0], [M, M, 0, 0, 0]], ["01110", "11000"]),
        ([[1, M, 3]], [[1, 1, 1]], [[1, M, 3, M, M]], None),
        ([[]], None, [[M, M]], None),
    ],
)  # fmt: skip
def test_masks_stand_behind_the_last_token_that_is_no_padding(ids, real, expected, still_real):
    ids = torch.tensor(ids, dtype=torch.long)
    found, mask = continued(ids, real, 2, tiny_config())
    assert found.tolist() == expected
    assert (
        mask is None if still_real is None else ["".join(map(str, row)) for row in mask.long().tolist()] == still_real
    )


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the cat sat on the mat and the dog lay on the rug"] * 3, 262)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("order", ["ancestral", "threshold"])
def test_a_batch_of_a_tokenizers_prompts_is_each_prompt_alone(tokenizer, side, order):
    model = lively_model(vocab_size=262, mask_token_id=261, max_position_embeddings=24)
    tokenizer.padding_side, tokenizer.pad_token = side, tokenizer.eos_token
    prompts, call = ["the cat sat", "the", "the dog"], {"max_new_tokens": 6, "budget": 24, "order": order}
    tokens = model.generate(**tokenizer(prompts, padding=True, return_tensors="pt"), **call, seed=[1, 2, 3])
    given = tokenizer(prompts, padding=True).attention_mask
    assert tokens.shape[1] == len(given[0]) + 6 and tokens.ne(261).all()
    for k, prompt in enumerate(prompts):
        alone = model.generate(**tokenizer([prompt], return_tensors="pt"), **call, seed=[1 + k])
        assert alone.shape[1] == sum(given[k]) + 6
        start = len(given[k]) - sum(given[k]) if side == "left" else 0
        assert tokens[k, start : start + alone.shape[1]].tolist() == alone[0].tolist()
        assert tokenizer.decode(alone[0]).startswith(prompt)


def test_tokenizers_with_token_types_are_taken_and_their_ends_warned_of(caplog):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat"]
    tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate(words)})
    model = lively_model(vocab_size=7, mask_token_id=4)
    model.generation_config.eos_token_id = tokenizer.sep_token_id
    logging.getLogger("fpmgm").addHandler(caplog.handler)
    try:
        given = tokenizer(["the cat", "cat"], padding=True, return_tensors="pt")
        assert "token_type_ids" in given
        assert model.generate(**given, max_new_tokens=3, budget=12).shape == (2, 7)
        assert "leave that token out: `tokenizer(prompts, add_special_tokens=False" in caplog.text
        caplog.clear()
        given = tokenizer(["the cat", "cat"], padding=True, return_tensors="pt", add_special_tokens=False)
        assert model.generate(**given, max_new_tokens=3, budget=12).shape == (2, 5)
        model.generate(torch.tensor([[3]]), max_new_tokens=3, budget=12)  # only where a text begins
        assert caplog.text == ""
    finally:
        logging.getLogger("fpmgm").removeHandler(caplog.handler)


# --- ends of text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [order for order in ORDERS if order != "confidence"])
@pytest.mark.parametrize("block_length", [None, 3])
def test_lengths_of_independent_tokens_are_geometric(order, block_length):
    p, rows, length = torch.tensor([0.5, 0.2, 50.0, 0.3]), 3000, 10  # 1 ends a text, 2 is the mask
    model = KnownDistribution(p.log().tolist(), mask_token_id=2, length=length)
    bound = {BOUNDS[order]: 0.5} if order in BOUNDS else {}
    out = model.generate(
        batch_size=rows, num_steps=8, iterations=0, order=order, stop_at_eos=True, eos_token_id=1, pad_token_id=3,
        block_length=block_length, return_dict_in_generate=True, seed=0, **bound,
    )  # fmt: skip
    expected = torch.tensor([0.0] + [0.8**k * 0.2 for k in range(length - 1)] + [0.8 ** (length - 1)])
    found = out.lengths.bincount(minlength=length + 1) / rows
    assert ((found - expected).abs() <= 4.5 * (expected * (1 - expected) / rows).sqrt() + 1e-9).all()
    for row, size in zip(out.sequences[:200].tolist(), out.lengths[:200].tolist(), strict=True):
        assert 1 not in row[: size - 1] and 2 not in row and set(row[size:]) <= {3}
        assert size == length or row[size - 1] == 1
    assert out.tokens_per_step == pytest.approx(int(out.lengths.sum()) / int(out.block_evaluations_per_sequence.sum()))


@pytest.mark.parametrize("reuse", ["none", "3sr"])
@pytest.mark.parametrize("order", ORDERS)
def test_a_row_that_ends_is_the_row_alone_and_not_computed_any_more(order, reuse):
    model = lively_model(vocab_size=4, mask_token_id=3, max_position_embeddings=16)
    calls = record_calls(model)
    bound = {"entropy": 0.9, "threshold": 0.6, "margin": 0.4}.get(order)
    call = {
        "order": order, "max_new_tokens": 12, "num_steps": 6, "iterations": 2, "reuse": reuse, "stop_at_eos": True,
        "eos_token_id": [2], "pad_token_id": 0, "return_dict_in_generate": True,
    } | ({} if bound is None else {BOUNDS[order]: bound})  # fmt: skip
    ids = torch.tensor([[1, 2], [0, 2], [2, 2], [1, 1], [0, 1]])  # an end in the prompt is none of the text
    out = model.generate(ids, seed=[0, 1, 2, 3, 4], **call)
    ran = [len(call["input_ids"]) for call in calls]
    assert ran[0] == 5 and ran == sorted(ran, reverse=True)
    assert out.sequences.shape[1] == 2 + out.lengths.max() and out.lengths.min() < 12
    steps, skips = [], order in ("ancestral", "halton") and reuse == "none"  # a row alone, steps with nothing for it
    for k in range(5):
        calls.clear()
        alone = model.generate(ids[k : k + 1], seed=[k], **call)
        steps.append(len(calls))
        size = 2 + int(alone.lengths[0])
        assert alone.sequences.shape == (1, size) and out.lengths[k] == size - 2
        assert out.sequences[k, :size].tolist() == alone.sequences[0].tolist() and not out.sequences[k, size:].any()
        if not skips:
            assert alone.block_evaluations == out.block_evaluations_per_sequence[k]
    assert sum(ran) == sum(steps) or skips


def test_texts_are_cut_on_either_side_of_padding(tokenizer):
    model = lively_model(vocab_size=262, mask_token_id=261, max_position_embeddings=30)
    ids, real = torch.tensor([[7, 8, 9], [7, 5, 5]]), torch.tensor([[1, 1, 1], [1, 0, 0]])
    call = {"budget": 24, "stop_at_eos": True, "eos_token_id": list(range(64)), "pad_token_id": 5, "seed": 1}
    call |= {"max_new_tokens": 20, "order": "confidence", "return_dict_in_generate": True}
    right = model.generate(ids, attention_mask=real, **call)
    left = model.generate(torch.tensor([[7, 8, 9], [5, 5, 7]]), attention_mask=real.flip(1), **call)
    for k, size in enumerate((3, 1)):
        text = right.sequences[k, : size + right.lengths[k]].tolist()
        assert left.sequences[k, 3 - size :][: len(text)].tolist() == text
        assert set(right.sequences[k, len(text) :].tolist()) <= {5}
    assert tokenizer.batch_decode(right.sequences)


# --- blocks ----------------------------------------------------------------------------------------------------------


def test_steps_are_shared_over_blocks_by_their_sizes():
    wanted = torch.zeros(3, 12, dtype=torch.bool)
    wanted[0, 2:], wanted[1, 5:8], wanted[2, ::2] = True, True, True
    windows = block_windows(wanted, num_steps=5, block_length=4)
    steps = [(windows.first[row, wanted[row]].tolist(), windows.last[row, wanted[row]].tolist()) for row in range(3)]
    assert steps == [
        ([0] * 4 + [2] * 4 + [4] * 2, [1] * 4 + [3] * 4 + [4] * 2),
        ([0] * 3, [4] * 3),
        ([0] * 4 + [3] * 2, [2] * 4 + [4] * 2),
    ]


@pytest.mark.parametrize("order", ["confidence", "threshold", "entropy"])
def test_blocks_equal_a_plain_loop_over_them(order):
    model, bound = lively_model(), {"threshold": 0.45, "entropy": 2.5}.get(order)
    ids = torch.tensor([[1, M, M, M, M, M, M, M]])
    call = {} if bound is None else {BOUNDS[order]: bound}
    steps = []
    tokens = model.generate(
        ids, order=order, block_length=3, num_steps=5, iterations=3, reuse="none", temperature=0,
        callback=steps.append, **call,
    )  # fmt: skip
    expected, step, deadlines = ids.clone(), 0, {(1, 2, 3): 2, (4, 5, 6): 4, (7,): 5}
    for block, deadline in deadlines.items():  # 7 masks, 5 steps: 2, 2 and 1 by size
        while any(expected[0, i] == M for i in block):
            with torch.no_grad():
                p = model(expected, num_iterations=3).logits[0, :, :M].softmax(dim=-1)
            left = [i for i in block if expected[0, i] == M]
            if order == "confidence":
                count = {0: 2, 1: 1, 2: 2, 3: 1, 4: 1}[step]
                now = sorted(left, key=lambda i: (-round(p[i].max().log().item(), 9), i))[:count]
            else:
                now = revealed(order, bound, {i: p[i].tolist() for i in left}, deadline - step)
            for i in now:
                expected[0, i] = p[i].argmax()
            assert steps[step].revealed[0].nonzero().flatten().tolist() == sorted(now)
            step += 1
    assert torch.equal(tokens, expected) and len(steps) == step


def test_ancestral_blocks_reveal_evenly_in_their_own_steps():
    rows = 4000
    model = KnownDistribution([0.0, 0.0, 9.0], mask_token_id=2, length=6)
    steps = []
    model.generate(batch_size=rows, block_length=3, num_steps=6, iterations=0, callback=steps.append, seed=0)
    found = torch.stack([step.revealed.float().mean(dim=0) for step in steps])  # (T, L)
    expected = torch.zeros(6, 6)
    expected[:3, :3], expected[3:, 3:] = 1 / 3, 1 / 3
    assert (found - expected).abs().max() < 4.5 * (2 / 9 / rows) ** 0.5
    for seen, times, _ in model.calls:  # that of the masks left, as in training
        torch.testing.assert_close(times, (seen == 2).float().mean(dim=1).clamp(min=1e-5))


def test_tokens_masked_again_stay_within_their_block():
    steps = []
    tokens = lively_model(max_position_embeddings=24).generate(
        batch_size=20, block_length=8, num_steps=24, iterations=1, remask=1.0, seed=0, callback=steps.append
    )
    again = torch.stack([b.sequences.eq(M) & a.sequences.ne(M) for a, b in itertools.pairwise(steps)])
    assert again.any() and tokens.ne(M).all()
    for step, masked in enumerate(again, start=1):
        assert not masked[:, : step // 8 * 8].any() and not masked[:, (step // 8 + 1) * 8 :].any()


def test_each_block_has_the_allocation_for_itself_and_all_stay_within_the_budget():
    model = lively_model()
    out = model.generate(budget=60, num_steps=8, block_length=4, return_dict_in_generate=True)
    half = model.generate(budget=30, num_steps=4, length=4, return_dict_in_generate=True)
    assert out.iterations == half.iterations * 2 and out.block_evaluations == 60
    assert (
        model.generate(num_steps=8, iterations=3, block_length=4, return_dict_in_generate=True).iterations == [3] * 8
    )


@pytest.mark.parametrize("order", ORDERS)
def test_rows_in_blocks_are_the_rows_alone(order):
    model = lively_model()
    ids, real = torch.tensor([[1, 2, 3], [4, 0, 0]]), torch.tensor([[1, 1, 1], [1, 0, 0]])
    call = {"max_new_tokens": 5, "block_length": 2, "budget": 30, "order": order}
    together = model.generate(ids, attention_mask=real, seed=[1, 2], **call)
    assert torch.equal(model.generate(ids[:1], seed=[1], **call)[0], together[0])
    assert torch.equal(model.generate(ids[1:, :1], seed=[2], **call)[0], together[1, :6])


# --- frozen positions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_frozen_blocks_cost_themselves_and_not_the_length_of_the_text(order):
    model, B = lively_model(max_position_embeddings=48), 4
    call = {"block_length": B, "iterations": 2, "order": order, "freeze": True, "return_dict_in_generate": True}
    calls = record_calls(model)
    for length in (16, 48):
        calls.clear()
        out = model.generate(batch_size=2, length=length, num_steps=length // 2, seed=[1, 2], **call)
        assert out.sequences.ne(M).all() and out.positions_computed[0].eq(length).all()
        # what is masked of a block, and what the step before has written
        assert out.positions_computed[1:].max() <= 2 * B
        asked = [call["active_positions"] for call in calls[1:]]
        assert max(len(positions) for positions in asked) <= 2 * 2 * B
        assert out.block_evaluations <= 4 * (1 + -(-2 * B * (length // 2) // length)) < out.full_block_evaluations
    every = model.generate(length=16, num_steps=8, seed=[1], refresh_every=1, **call)
    unfrozen = model.generate(length=16, num_steps=8, seed=[1], **{**call, "freeze": False})
    assert torch.equal(every.sequences, unfrozen.sequences)


@pytest.mark.parametrize("order", ["ancestral", "threshold"])
def test_what_is_behind_an_end_of_text_is_frozen(order):
    model = lively_model(vocab_size=4, mask_token_id=3, max_position_embeddings=24)
    after = {}  # a step that was idle is not there
    out = model.generate(
        batch_size=6, num_steps=12, iterations=1, order=order, freeze=True, stop_at_eos=True, eos_token_id=2,
        pad_token_id=0, seed=0, return_dict_in_generate=True,
        callback=lambda step: after.update({step.step: step.sequences}),
    )  # fmt: skip
    seen = [torch.full((6, 24), 3)]  # before each step
    for step in range(len(out.iterations)):
        seen.append(after.get(step, seen[-1]))
    for row, length in enumerate(out.lengths.tolist()):
        for step in range(1, len(seen) - 1):
            tokens = seen[step][row]
            end = next((i for i, token in enumerate(tokens.tolist()) if token == 2), 24)
            most = int(tokens[:end].eq(3).sum()) + int(tokens.ne(seen[step - 1][row]).sum())
            assert out.positions_computed[step, row] <= most
        assert out.sequences[row, length:].eq(0).all()
    assert len(set(out.lengths.tolist())) > 1 and out.lengths.min() < 12
