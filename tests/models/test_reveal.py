# SPDX-License-Identifier: Apache-2.0
"""The orders of revealing: remasking schedules against their marginals, confidence against a plain loop, idle steps,
shared first steps, and what each step may cost."""

import itertools
from functools import partial

import pytest
import torch

from fpmgm.models.blocks import block_windows, whole_window
from fpmgm.models.certainty import most_confident
from fpmgm.models.draw import draw_uniforms
from fpmgm.models.schedules import equal_counts, halton_counts, halton_line, remasking_schedule, spread_schedule
from tests.models.helpers import lively_model, most_confident_first, record_calls
from tests.testing_utils import stacks, tiny_image_model, tiny_model


MASK = 10


# --- remasking ----------------------------------------------------------------------------------------------------


def test_remasking_keeps_the_marginals_of_the_ancestral_order():
    rows, length, steps, cap = 40, 500, 8, 0.3
    wanted = torch.ones(rows, length, dtype=torch.bool)
    wanted[:, 0] = False
    uniforms = torch.rand(steps, rows, length, dtype=torch.float64)
    schedule = remasking_schedule(uniforms, wanted, steps, cap, whole_window(wanted, steps))
    visible = torch.zeros(rows * length, dtype=torch.bool)
    count = rows * (length - 1)
    for step in range(steps):
        before = int(visible.sum())
        assert not visible[schedule.reveals[step]].any()
        remasked = schedule.remasks[step]
        assert visible[remasked].all()
        now, after = (1 - (1 - 1e-3) * (1 - i * (1 - 1e-5) / steps) for i in (step, step + 1))
        sigma = min(cap, (1 - after) / now)
        if 0 < step < steps - 1:
            assert len(remasked) / before == pytest.approx(sigma, abs=4 * (sigma * (1 - sigma) / before) ** 0.5)
        visible[schedule.reveals[step]] = True
        visible[remasked] = False
        if step < steps - 1:  # everything starts masked, where the schedule allows a share ε to be visible: + 1e-3
            found = int(visible.sum()) / count
            assert found == pytest.approx(after, abs=4 * (after * (1 - after) / count) ** 0.5 + 1e-3)
    assert torch.equal(visible.view(rows, length), wanted)  # all is written in the end, the prompt never touched


def test_a_remasked_token_is_not_reused_like_an_unchanged_one():
    model = lively_model()
    calls = record_calls(model)
    model.generate(batch_size=30, budget=96, remask=0.3, seed=0, gamma_remasked=0.35)
    kinds = set()
    calls = [call for call in calls if len(call["input_ids"]) == 30]  # before the first row is written
    for previous, call in itertools.pairwise(calls):
        before, now, weights = previous["input_ids"], call["input_ids"], call["reuse_weights"]
        assert (weights[(before == now) & (now != MASK)] == 1).all()
        assert torch.allclose(weights[(before != MASK) & (now == MASK)], torch.tensor(0.35))
        assert torch.allclose(weights[(before == MASK) & (now != MASK)], torch.tensor(0.2))
        kinds.add(bool(((before != MASK) & (now == MASK)).any()))
    assert kinds == {True, False} or kinds == {True}


# --- confidence ---------------------------------------------------------------------------------------------------


def test_confidence_order_equals_a_plain_loop():
    model, steps = lively_model(), 3
    ids = torch.tensor([[MASK] * 8, [1, MASK, MASK, 2, MASK, MASK, 3, MASK]])
    uniforms = draw_uniforms(steps, torch.ones(2, 8, dtype=torch.bool), seed=5)
    found = model.generate(ids, num_steps=steps, iterations=3, order="confidence", reuse="none", seed=5)

    @torch.no_grad()
    def predict(ids):
        return model(ids, num_iterations=3).logits[..., :MASK].softmax(dim=-1)

    counts = [[3, 2], [3, 2], [2, 1]]  # equal shares of 8 and of 5, the larger ones first
    assert torch.equal(found, most_confident_first(predict, ids, MASK, uniforms, counts))


def test_confidence_keeps_the_most_probable_draws_of_each_row():
    probabilities = torch.tensor([0.1, 0.9, 0.5, 0.7, 0.2, 0.6])
    rows = torch.tensor([0, 0, 0, 2, 2, 2])
    assert most_confident(probabilities, rows, torch.tensor([2, 0, 1])).tolist() == [1, 2, 3]


@pytest.mark.parametrize("count", [1, 2, 3, 8, 37, 100, 128])
def test_a_line_is_visited_from_coarse_to_fine(count):
    places = halton_line(count).tolist()
    assert sorted(places) == list(range(count))
    for apart in (2, 4, 8, 16, 32):
        assert sorted(places[: -(-count // apart)]) == list(range(0, count, apart))  # evenly, before all others


def test_steps_of_the_halton_order_reveal_few_at_first_and_never_two_kinds_of_neighbours():
    for count, num_steps in itertools.product((1, 2, 5, 33, 100, 128), (1, 2, 3, 4, 7, 16, 100, 128, 200)):
        counts = halton_counts(count, num_steps)
        assert len(counts) == num_steps and sum(counts) == count
        assert all(counts[: min(count, num_steps)]) and not any(counts[count:])
        if 2 < num_steps < count // 2:  # the odd places have steps of their own
            assert count - count // 2 in itertools.accumulate(counts) and max(counts) in counts[-(num_steps // 2) :]
    assert halton_counts(128, 2) == [64, 64] and halton_counts(8, 4) == [1, 1, 2, 4]


def test_the_halton_order_of_text_reveals_what_lies_far_apart():
    wanted, apart = torch.ones(3, 128, dtype=torch.bool), [16, 16, 8, 4, 4, 2, 2, 2]
    schedule = spread_schedule(
        torch.tensor([0.0, 0.3, 0.99])[:, None].expand(3, 128), wanted, 8, whole_window(wanted, 8)
    )
    for positions, distance, count in zip(schedule.reveals, apart, halton_counts(128, 8), strict=True):
        for row, shift in enumerate((0, 38, 126)):
            places = ((positions[positions // 128 == row] % 128 + shift) % 128).sort().values
            assert len(places) == count and places.diff().min() >= distance


def test_the_halton_order_of_text_writes_each_position_once_in_the_window_of_its_block():
    generator = torch.Generator().manual_seed(0)
    wanted = torch.rand(5, 50, generator=generator) < torch.tensor([0.1, 0.4, 0.7, 1.0, 0.02])[:, None]
    wanted[:, 7] = True
    for num_steps, block_length in ((6, 10), (9, 50), (70, 7)):
        windows = block_windows(wanted, num_steps, block_length)
        schedule = spread_schedule(torch.rand(5, 50, generator=generator), wanted, num_steps, windows)
        step = torch.full((250,), -1)
        for i, positions in enumerate(schedule.reveals):
            assert (step[positions] == -1).all()
            step[positions] = i
        step = step.view(5, 50)
        assert torch.equal(step >= 0, wanted)
        assert (step >= windows.first)[wanted].all() and (step <= windows.last)[wanted].all()
        for row in range(5):
            for first in windows.first[row][wanted[row]].unique():
                block = wanted[row] & (windows.first[row] == first)
                counts = step[row][block].bincount(minlength=num_steps)[first : windows.last[row][block][0] + 1]
                assert counts.tolist() == halton_counts(int(block.sum()), len(counts))


def test_more_steps_than_masks_are_an_error_for_the_confidence_order_alone():
    model = tiny_model()
    ids = torch.tensor([[1, MASK, MASK, 2]])
    with pytest.raises(ValueError, match="`num_steps`=3 exceeds the 2 masked positions"):
        model.generate(ids, num_steps=3, iterations=1, order="confidence")
    for order in ("ancestral", "halton"):
        assert model.generate(ids, num_steps=3, iterations=1, order=order).ne(MASK).all()
    assert equal_counts(ids == MASK, 2).tolist() == [[1], [1]]


# --- what a step costs --------------------------------------------------------------------------------------------


def some_text(padded: bool) -> dict:
    mask = torch.ones(3, 8, dtype=torch.long)
    mask[0, 5:], mask[2, :2] = 0, 0
    call = {"input_ids": torch.randint(0, 11, (3, 8)), "timesteps": torch.rand(3)}
    return call | ({"attention_mask": mask} if padded else {})


CALLS = {
    "text": (partial(tiny_model, time_conditioning=True), partial(some_text, False)),
    "padded text": (partial(tiny_model, time_conditioning=True), partial(some_text, True)),
    "images": (
        partial(tiny_image_model, num_register_tokens=2),
        lambda: {"input_ids": torch.randint(0, 8, (3, 9)), "class_labels": torch.arange(3)},
    ),
}


@pytest.mark.parametrize("layers", [(3, 0, 0), (1, 1, 1), (2, 1, 0), (1, 2, 2)])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CALLS)
def test_the_last_block_at_some_positions_equals_the_whole_block(layers, attention, name):
    make, call = CALLS[name][0], CALLS[name][1]()
    model = make(**stacks(*layers)).double()
    model.set_attn_implementation(attention)
    positions = torch.tensor([1, 2, 4, 9, 20, 23, 2])
    full, some = model(**call), model(**call, logits_positions=positions)
    torch.testing.assert_close(some.logits, full.logits.flatten(0, 1)[positions], rtol=0, atol=1e-12)
    hidden = full.last_hidden_state.flatten(0, 1)[positions]
    torch.testing.assert_close(some.last_hidden_state, hidden, rtol=0, atol=1e-12)
    assert full.logits.shape == (*call["input_ids"].shape, model.config.vocab_size)


def test_the_last_block_is_whole_where_a_kernels_mask_has_no_rows(monkeypatch):
    model, ids, outputs = lively_model(), torch.randint(0, 11, (3, 8)), []
    model.post_layers[-1].register_forward_hook(lambda module, args, output: outputs.append(output))
    call = {"input_ids": ids, "logits_positions": torch.tensor([1, 9, 20])}
    pruned = model(**call)
    monkeypatch.setattr("fpmgm.models.modeling_mgm.has_rows", lambda bias: False)
    torch.testing.assert_close(model(**call).logits, pruned.logits, rtol=0, atol=1e-12)
    assert [output.shape for output in outputs] == [(3, 16), (3, 8, 16)]


def test_the_first_step_of_an_unprompted_batch_runs_once_for_all():
    model = lively_model()
    calls = record_calls(model)
    tokens = model.generate(batch_size=5, budget=24, seed=3)
    assert [len(call["input_ids"]) for call in calls] == [1, 5, 5, 4]  # one row is written
    calls.clear()
    ones = torch.ones(5, 8, dtype=torch.long)  # with an attention mask nothing is shared
    assert torch.equal(model.generate(torch.full((5, 8), MASK), attention_mask=ones, budget=24, seed=3), tokens)
    assert [len(call["input_ids"]) for call in calls] == [5, 5, 5, 4]


@pytest.mark.parametrize("layers", [(1, 1, 1), (3, 0, 0)])
def test_idle_steps_are_skipped_where_nothing_is_reused(layers):
    model = lively_model(**stacks(*layers))
    calls = record_calls(model)
    call = {"num_steps": 30, "iterations": 2 if layers[1] else 0, "reuse": "none", "return_dict_in_generate": True}
    out = model.generate(**call, seed=0)
    busy = (out.iterations_taken[:, 0] > 0).sum() if layers[1] else len(calls)
    assert len(calls) == busy <= 8  # no more steps than positions
    assert out.block_evaluations == len(calls) * (sum(layers) + layers[1]) < 30 * sum(layers)
    assert all(len(call["logits_positions"]) for call in calls)


@pytest.mark.parametrize("order", ["ancestral", "halton"])
def test_under_reuse_idle_steps_run_until_a_row_is_written(order):
    model, steps = lively_model(), []
    ids = torch.full((4, 8), MASK).index_fill(1, torch.tensor([3, 5]), 1)
    ids[1, 2:], ids[2, 1:] = 2, 3  # two to write, and one
    call = {"num_steps": 30, "iterations": 2, "order": order, "return_dict_in_generate": True}
    out = model.generate(ids, **call, seed=[5, 6, 7, 8], callback=steps.append)
    assert [step.step for step in steps] == list(range(out.num_steps)) and steps[-1].revealed.any()
    for row in range(4):
        alone = model.generate(ids[row : row + 1], **call, seed=[5 + row])
        wrote = [step.step for step in steps if step.revealed[row].any()]
        assert torch.equal(alone.sequences[0], out.sequences[row])
        assert alone.block_evaluations == out.block_evaluations_per_sequence[row] == 4 * alone.num_steps
        assert alone.num_steps == wrote[-1] + 1
    assert out.block_evaluations_per_sequence.min() < out.block_evaluations <= 30 * 4


@pytest.mark.parametrize("solver", ["picard", "anderson"])
def test_adaptive_depth_stays_inside_the_budget_and_within_the_row(solver):
    model, budget = lively_model(), 60
    call = {"budget": budget, "tolerance": 0.04, "solver": solver}
    out = model.generate(**call, batch_size=6, seed=list(range(6)), return_dict_in_generate=True)
    planned, taken = torch.tensor(out.iterations)[:, None], out.iterations_taken
    assert ((taken > 0) & (taken < planned)).any()
    assert (taken <= planned).all()
    cost = 2 * (taken > 0).sum(dim=0) + taken.sum(dim=0)
    assert out.block_evaluations_per_sequence.tolist() == cost.tolist()
    assert out.block_evaluations == int(cost.max()) <= budget
    for step, row in [(0, 1), (3, 2)]:
        values = out.residuals[step, : taken[step, row], row]
        assert (values[:-1] > 0.04).all() and out.residuals[step, taken[step, row] :, row].isnan().all()
    for row in range(6):
        assert torch.equal(model.generate(**call, seed=[row])[0], out.sequences[row])


@pytest.mark.slow
def test_compiled_blocks_write_the_same_tokens():
    model = lively_model()
    tokens = model.generate(batch_size=3, budget=24, seed=0)
    model.compile_blocks()
    assert torch.equal(model.generate(batch_size=3, budget=24, seed=0), tokens)
    assert model.fixed_point._compiled_call_impl is not None
