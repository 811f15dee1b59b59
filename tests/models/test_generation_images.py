# SPDX-License-Identifier: Apache-2.0
"""Images through `generate`: Halton order and counts against golden values, tokens against a naive sampler with
guidance, counted blocks, and every bad input."""

import itertools
import json
import math
from fractions import Fraction

import pytest
import torch
from safetensors.torch import load_file

from fpmgm.models import reveal as reveal_module
from fpmgm.models.block_fpmaskgit import FPMaskGITBlock
from fpmgm.models.draw import draw_uniforms
from fpmgm.models.schedules import arccos_counts, halton_order
from tests.models.helpers import count_calls, lively_image_model, most_confident_first, record_calls
from tests.models.reference_maskgit import reference_forward
from tests.testing_utils import SHARED, needs_shared, stacks, tiny_image_model


MASK, LENGTH, NULL = 7, 9, 3  # of tiny_image_config
REUSES = ("none", "full", "3sr")


def prompts() -> torch.Tensor:
    """Four rows of 9 codes, each with other codes to write."""
    M = MASK
    return torch.tensor(
        [[M] * 9, [1, 2, M, M, M, 6, M, M, M], [M, M, M, M, 0, M, M, 5, M], [M, 3, M, M, M, M, 4, M, 4]]
    )


# --- the order and the counts ----------------------------------------------------------------------------------------


def written_out_halton(side: int) -> list[int]:
    """Cells of the sequence's points in exact fractions, each where it comes first."""
    cells, index = [], 0
    while len(cells) < side**2:
        index += 1
        cell = 0
        for base in (2, 3):
            point, weight, rest = Fraction(0), Fraction(1, base), index
            while rest:
                point, weight, rest = point + rest % base * weight, weight / base, rest // base
            cell = cell * side + math.floor(point * side)
        if cell not in cells:
            cells.append(cell)
    return cells


def written_out_counts(positions: int, num_steps: int) -> list[int]:
    shares = [1 - math.acos(i / num_steps) / (math.pi / 2) for i in range(1, num_steps + 1)]
    totals = [max(i, int(positions * share + 1e-9)) for i, share in enumerate(shares, start=1)]
    return [after - before for before, after in itertools.pairwise([0, *totals])]


@needs_shared
def test_halton_order_and_counts_are_the_originals():
    orders = load_file(SHARED / "parity/halton_orders.safetensors")
    for name, order in orders.items():
        side = int(name.removeprefix("order_"))
        assert (order[:, 0] * side + order[:, 1]).tolist() == halton_order(side).tolist()
    for steps, counts in json.loads((SHARED / "parity/halton_counts_256.json").read_text()).items():
        assert arccos_counts(torch.ones(1, 256, dtype=torch.bool), int(steps)).flatten().tolist() == counts


@pytest.mark.parametrize("side", [1, 2, 3, 5, 6, 12])
def test_halton_order_visits_every_cell_once_by_the_exact_sequence(side):
    assert halton_order(side).tolist() == written_out_halton(side)
    assert sorted(halton_order(side).tolist()) == list(range(side**2))


def test_counts_follow_the_arccos_rule_in_every_row():
    wanted = torch.arange(256) < torch.tensor([[256], [40], [9], [255]])
    for steps in (1, 2, 3, 8, 9):
        expected = [written_out_counts(n, steps) for n in (256, 40, 9, 255)]
        assert arccos_counts(wanted, steps).T.tolist() == expected
        assert min(map(min, expected)) >= 1 and [sum(row) for row in expected] == [256, 40, 9, 255]


# --- tokens ----------------------------------------------------------------------------------------------------------


def shares(reuse, previous, now, registers) -> torch.Tensor:
    """γ position by position, (B, L + R, 1); registers are like positions that are masked still."""
    rows = []
    for before, after in zip(previous.tolist(), now.tolist(), strict=True):
        still = 0.75 + 0.15 * sum(code != MASK for code in after) / len(after)
        row = [0.2 if a != b else still if b == MASK else 1.0 for a, b in zip(before, after, strict=True)]
        rows.append([1.0] * len(row + [0] * registers) if reuse == "full" else row + [still] * registers)
    return torch.tensor(rows, dtype=torch.float64)[..., None]


def naive_generate(model, tokens, classes, ranks, uniforms, iterations, reuse, scales):
    """Every logit at every step, with and without the class one after the other."""
    config, weights, registers = model.config, model.state_dict(), model.config.num_register_tokens
    wanted = tokens == MASK
    counts = [written_out_counts(int(row.sum()), len(iterations)) for row in wanted]
    states, previous = [None, None], None
    for step, count in enumerate(iterations):
        share = 1.0 if previous is None else shares(reuse, previous, tokens, registers)
        outputs = [
            reference_forward(
                config, weights, tokens, labels, iterations=count, previous_state=state, previous_share=share
            )
            for labels, state in zip((classes, torch.full_like(classes, NULL)), states, strict=True)
        ]
        conditional, unconditional = (output.logits[..., :MASK] for output in outputs)
        cumulative = (unconditional + scales[step] * (conditional - unconditional)).softmax(dim=-1).cumsum(dim=-1)
        drawn = (cumulative <= uniforms[..., None] * cumulative[..., -1:]).sum(dim=-1)
        if reuse != "none":
            states, previous = [output.state for output in outputs], tokens
        tokens = tokens.clone()
        for row in range(len(tokens)):
            left = [i for i in ranks[row].argsort().tolist() if tokens[row, i] == MASK]
            revealed = left[: counts[row][step]]
            tokens[row, revealed] = drawn[row, revealed]
    return tokens


@pytest.mark.parametrize("reuse", REUSES)
@pytest.mark.parametrize("order", [None, "random"])
@pytest.mark.parametrize(
    ("scale", "schedule", "prompted"),
    [(1.0, "constant", False), (2.5, "constant", True), (4.0, "linear", False)],
)
def test_tokens_equal_those_of_the_naive_sampler(reuse, order, scale, schedule, prompted, monkeypatch):
    model, classes = lively_image_model(num_register_tokens=2), torch.tensor([0, 2, 1, 0, NULL, 2, 1, 0])
    ids = prompts().repeat(2, 1) if prompted else torch.full((8, LENGTH), MASK)
    uniforms = torch.rand(2, 8, LENGTH, dtype=torch.float64)
    ranks = uniforms[0]
    if order is None:
        ranks = torch.tensor(written_out_halton(3)).argsort().expand(8, -1)
    monkeypatch.setattr(reveal_module, "draw_uniforms", lambda count, *args, **kwargs: uniforms[-count:])
    iterations = [3, 1, 2, 1]
    scales = [scale if schedule == "constant" else 1 + (scale - 1) * step / 3 for step in range(4)]
    tokens = model.generate(
        ids if prompted else None, class_labels=classes, iterations=iterations, reuse=reuse, order=order,
        guidance_scale=scale, guidance_schedule=schedule,
    )  # fmt: skip
    expected = naive_generate(model, ids, classes, ranks, uniforms[1], iterations, reuse, scales)
    assert tokens.tolist() == expected.tolist()
    assert torch.equal(tokens[ids != MASK], ids[ids != MASK]) and tokens.ne(MASK).all()


def test_what_the_naive_sampler_is_compared_in_changes_the_tokens():
    model = lively_image_model()
    call = {"class_labels": [0, 1, 2] * 8, "num_steps": 4, "iterations": 1, "seed": 3}
    others = [{"reuse": "none"}, {"reuse": "full"}, {"order": "random"}, {"order": "confidence"}]
    others += [{"guidance_scale": 2.5}, {"guidance_scale": 2.5, "guidance_schedule": "linear"}, {"class_labels": NULL}]
    others += [{"gamma_masked": [0.0, 0.0]}]
    samples = [model.generate(batch_size=24, **{**call, **other}) for other in ({}, *others)]
    for i, sample in enumerate(samples):
        assert not any(torch.equal(sample, other) for other in samples[:i]), i


def test_confidence_order_equals_a_plain_loop():
    model, steps, scale = lively_image_model(), 3, 2.0
    classes, uniforms = torch.tensor([0, 1, 2, 1]), draw_uniforms(3, torch.ones(4, LENGTH, dtype=torch.bool), seed=5)
    found = model.generate(
        prompts(), class_labels=classes, num_steps=steps, iterations=3, order="confidence", reuse="none", seed=5,
        guidance_scale=scale,
    )  # fmt: skip

    @torch.no_grad()
    def predict(ids):
        conditional, null = (model(ids, class_labels=c, num_iterations=3).logits for c in (classes, None))
        return (null + scale * (conditional - null))[..., :MASK].softmax(dim=-1)

    counts = zip(*(written_out_counts(int(n), steps) for n in (prompts() == MASK).sum(dim=1)), strict=True)
    assert torch.equal(found, most_confident_first(predict, prompts(), MASK, uniforms, counts))


def test_guidance_at_its_ends():
    model, call = lively_image_model(), {"batch_size": 6, "budget": 24, "seed": 2}
    null = model.generate(**call)
    assert torch.equal(model.generate(**call, class_labels=NULL), null)
    assert torch.equal(model.generate(**call, class_labels=1, guidance_scale=0), null)
    assert torch.equal(model.generate(**call, class_labels=NULL, guidance_scale=7.5), null)
    own = model.generate(**call, class_labels=1)
    assert not torch.equal(own, null)
    assert torch.equal(model.generate(**call, class_labels=1, guidance_scale=1 + 1e-12), own)  # two halves, no share


@pytest.mark.parametrize(
    "arguments",
    [{}, {"tolerance": 0.05}, {"order": "random"}, {"order": "threshold", "confidence_threshold": 0.5}],
    ids=str,
)
def test_rows_with_seeds_equal_the_rows_run_alone(arguments):
    model, seeds, classes = lively_image_model(), [11, 5, 11, 8], [2, 0, 1, NULL]
    call = {"budget": 30, "guidance_scale": 3.0, **arguments}
    batch = model.generate(seed=seeds, class_labels=classes, **call)
    for row, (seed, label) in enumerate(zip(seeds, classes, strict=True)):
        assert torch.equal(batch[row : row + 1], model.generate(seed=[seed], class_labels=[label], **call))
        prompted = model.generate(torch.full((1, LENGTH), MASK), seed=[seed], class_labels=label, **call)
        assert torch.equal(batch[row : row + 1], prompted)


@pytest.mark.parametrize("order", ["halton", "random", "confidence"])
@pytest.mark.parametrize("guidance_scale", [1.0, 0.0, 5.0])
def test_the_mask_is_never_drawn(order, guidance_scale):
    model = tiny_image_model()
    with torch.no_grad():
        model.lm_head.bias[MASK] += 50
    for extra in ({}, {"temperature": 0}, {"top_k": 1}):
        call = {"class_labels": 1, "order": order, "guidance_scale": guidance_scale, **extra}
        assert model.generate(batch_size=8, budget=24, **call).lt(MASK).all()


# --- what a step costs -----------------------------------------------------------------------------------------------


def test_the_first_step_runs_once_for_each_class():
    model = lively_image_model()
    calls = record_calls(model)
    call = {"class_labels": [2, 0, 2, 2, 0], "budget": 24, "seed": 3}
    for scale, sizes in ((1.0, [2, 5, 5, 5]), (2.0, [3, 10, 10, 10])):  # with guidance, the null class too
        calls.clear()
        tokens = model.generate(**call, guidance_scale=scale)
        assert [len(call["input_ids"]) for call in calls] == sizes
        assert [len(call["logits_positions"]) for call in calls] == [n * k for n, k in zip(
            sizes, written_out_counts(LENGTH, 4), strict=True)]  # fmt: skip
        calls.clear()
        prompted = model.generate(torch.full((5, LENGTH), MASK), **call, guidance_scale=scale)
        assert torch.equal(prompted, tokens)
    calls.clear()
    model.generate(batch_size=5, budget=24)
    assert [len(call["input_ids"]) for call in calls] == [1, 5, 5, 5]


@pytest.mark.parametrize("layers", [(1, 1, 1), (2, 3, 1), (3, 0, 0)])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_block_evaluations_are_the_blocks_that_ran_and_guidance_is_beside(layers, scale):
    model, sizes = tiny_image_model(**stacks(*layers)), []
    calls = count_calls(model, FPMaskGITBlock)
    model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    out = model.generate(class_labels=[0, 1], budget=27, guidance_scale=scale, return_dict_in_generate=True)
    assert out.block_evaluations == len(calls) <= 27
    assert out.block_evaluations_per_sequence.tolist() == [len(calls)] * 2
    assert out.guidance_evaluations == (len(calls) if scale != 1 else 0)
    assert set(sizes) == ({2} if scale == 1 else {3, 4} if out.num_steps > 1 else {3})
    assert out.residuals.shape == (out.num_steps, max(out.iterations), 2)


def test_adaptive_depth_counts_the_rows_without_class_apart():
    model, budget, outputs = lively_image_model(), 48, []
    model.register_forward_hook(lambda module, args, output: outputs.append(output))
    call = {"budget": budget, "tolerance": 0.08, "class_labels": [0, 1, 2], "seed": [1, 2, 3], "guidance_scale": 3.0}
    out = model.generate(**call, return_dict_in_generate=True)
    ran = [(~output.residuals.isnan()).sum(dim=0) for output in outputs]  # T of (R,)
    ran[0] = ran[0][[0, 1, 2, 3, 3, 3]]  # one row for each class and one for the null class
    ran = torch.stack(ran)
    assert torch.equal(out.iterations_taken, ran[:, :3]) and (ran < torch.tensor(out.iterations)[:, None]).any()
    cost = 2 * len(ran) + ran.sum(dim=0)
    assert cost[:3].max() != cost[3:].max()
    assert out.block_evaluations_per_sequence.tolist() == cost[:3].tolist()
    assert (out.block_evaluations, out.guidance_evaluations) == (cost[:3].max(), cost[3:].max())
    assert (cost < budget).any() and cost.max() <= budget


def test_callback_sees_the_rows_with_their_class():
    model, steps = lively_image_model(num_register_tokens=2), []
    out = model.generate(
        class_labels=[0, 1, 1], guidance_scale=2.0, budget=30, seed=0, callback=steps.append,
        return_dict_in_generate=True,
    )  # fmt: skip
    revealed = torch.stack([step.revealed for step in steps]).long()
    assert revealed.sum(dim=2).T.tolist() == [written_out_counts(LENGTH, len(steps))] * 3
    order = torch.stack([step.revealed[0] for step in steps]).long().argmax(dim=0)  # step of each cell
    assert order[halton_order(3)].tolist() == sorted(order.tolist())
    for i, step in enumerate(steps):
        assert step.fixed_point_state.shape == (3, LENGTH + 2, 16)
        assert torch.equal(out.residuals[i, : len(step.residuals)], step.residuals.float())
    state = model(torch.full((1, LENGTH), MASK), class_labels=torch.tensor([1]), num_iterations=out.iterations[0])
    torch.testing.assert_close(steps[0].fixed_point_state[1:2], state.fixed_point_state)
