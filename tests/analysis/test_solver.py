# SPDX-License-Identifier: Apache-2.0
"""Analyses of the solver against a map whose fixed point is known, what `generate` reports, and plain loops."""

import logging

import pytest
import torch
from datasets import Dataset

from fpmgm.analysis import Trajectory, lagged_divergence, masked_trajectory, measure_solver, sampled_trajectory
from fpmgm.analysis.divergence import divergence, overall
from fpmgm.models.reuse import REUSES

from ..models.helpers import lively_image_model, lively_model
from ..testing_utils import refused, tiny_image_model, tiny_model


MASK = 10
EXACT = {"tolerance": 1e-12, "most_iterations": 500, "solver": "picard"}
MDLM = {"num_pre_layers": 3, "num_fixed_point_layers": 0, "num_post_layers": 0}
BY_HAND = torch.tensor([  # four tokens: 1 is written, then 2 and 3, then 1 is masked again and 4 is written
    [MASK, MASK, MASK, MASK],
    [1, MASK, MASK, MASK],
    [1, 2, 3, MASK],
    [MASK, 2, 3, 4],
    [1, 2, 3, 4],
])[:, None]  # fmt: skip
TRAJECTORY = Trajectory(BY_HAND, torch.tensor([1.0, 0.75, 0.5, 0.25], dtype=torch.float64))


def contractive_image_model():
    return tiny_image_model(scale=0.1, input_injection="diagonal").double()


def affine_model():
    """Blocks that do nothing, so that h_pre = e(z) and F(h) = a⊙h + (1 − a)⊙G(e(z)), whose fixed point is G(e(z))."""
    model = lively_model()
    with torch.no_grad():
        for layer in (*model.pre_layers, *model.fixed_point.layers):
            layer.modulation.weight.zero_()
            layer.modulation.bias.zero_()
    return model


def embedded(model, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's h_pre and h* in the affine model, (B, L, D)."""
    h_pre = model.embed_tokens.weight.detach()[ids]
    projection = model.fixed_point.input_proj
    return h_pre, h_pre @ projection.weight.detach().T + projection.bias.detach()


def decay(model) -> torch.Tensor:
    """a (D,): what one iteration leaves of the distance to the fixed point, read off F itself."""
    zero = torch.zeros(1, 1, model.config.hidden_size, dtype=torch.float64)
    with torch.no_grad():
        one = model.fixed_point.injection(torch.ones_like(zero), model.fixed_point.injection.constant(zero))
        none = model.fixed_point.injection(zero, model.fixed_point.injection.constant(zero))
    return (one - none).flatten()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def states_of(model, seed: int, **options):
    """The states that a run of `generate` went through, and its report."""
    after = {}
    out = model.generate(
        seed=seed,
        batch_size=3,
        callback=lambda step: after.update({step.step: step.sequences}),
        return_dict_in_generate=True,
        **options,
    )
    assert list(after) == list(range(out.num_steps))  # nothing was idle
    states = torch.stack([torch.full_like(after[0], model.config.mask_token_id), *after.values()])
    times = torch.tensor([1 - i * (1 - 1e-5) / out.num_steps for i in range(out.num_steps)], dtype=torch.float64)
    return Trajectory(states, times), out


# --- movement and starts -----------------------------------------------------------------------------------------


def test_movement_by_what_happened_to_the_token():
    model = affine_model()
    solutions = [embedded(model, ids)[1][0] for ids in BY_HAND]  # (L, D) for each step
    found = measure_solver(model, TRAJECTORY, **EXACT)
    assert found.movement[0].isnan().all() and not found.shares[0].any()
    # shares of changed, unchanged, masked and remasked positions, by hand
    assert found.shares[1:, :, 0].tolist() == [[0.25, 0, 0.75, 0], [0.5, 0.25, 0.25, 0], [0.25, 0.5, 0, 0.25]]
    changed = {1: [0], 2: [1, 2], 3: [3]}
    for step, positions in changed.items():
        new, old = solutions[step], solutions[step - 1]
        moved = sum(relative(old[i], new[i]) for i in positions) / len(positions)
        distance = sum((new[i] - old[i]).norm().item() for i in positions) / len(positions)
        assert found.movement[step, 0, 0].item() == pytest.approx(moved, rel=1e-5)
        assert found.absolute_movement[step, 0, 0].item() == pytest.approx(distance, rel=1e-5)
    assert found.movement[3, 3, 0].item() == pytest.approx(relative(solutions[2][0], solutions[3][0]), rel=1e-5)
    stay = found.movement[[2, 3, 1, 2], [1, 1, 2, 2], 0]  # tokens do not see each other in this model
    assert stay.max() < 1e-11
    assert found.movement[[1, 3, 1, 2], [1, 2, 3, 3]].isnan().all()  # there are none


def test_starts_and_residuals_follow_the_known_contraction():
    model, count = affine_model(), 3
    model.generation_config.gamma_unchanged, model.generation_config.gamma_remasked = 0.9, 0.4
    found, a = measure_solver(model, TRAJECTORY, num_iterations=count, **EXACT), decay(model)
    assert a.min() > 0.1 and a.max() < 0.9
    # γ of 3sr by hand: changed 0.2, unchanged 0.9, remasked 0.4, masked 0.75 + 0.15 · the visible share
    gammas = {1: [0.2, 0.7875, 0.7875, 0.7875], 2: [0.9, 0.2, 0.2, 0.75 + 0.15 * 0.75], 3: [0.4, 0.9, 0.9, 0.2]}
    for u, reuse in enumerate(REUSES):
        previous = None
        for step, ids in enumerate(BY_HAND[:-1]):
            h_pre, solution = embedded(model, ids)
            share = torch.zeros(4, dtype=torch.float64)
            if step > 0 and reuse != "none":
                share += torch.tensor(gammas[step], dtype=torch.float64) if reuse == "3sr" else 1
            start = h_pre if previous is None else share[:, None] * previous + (1 - share[:, None]) * h_pre
            states = [solution + a**n * (start - solution) for n in range(count + 1)]
            residuals = [relative(states[n + 1], states[n]) for n in range(count)]
            assert found.start_distances[u, step, 0].item() == pytest.approx(relative(start, solution), rel=1e-5)
            assert found.residuals[u, step, :, 0].tolist() == pytest.approx(residuals, rel=1e-5)
            if step == 2:
                expected = [relative(start[0, i], solution[0, i]) for i in range(4)]
                expected = [(expected[1] + expected[2]) / 2, expected[0], expected[3]]
                assert found.start_distances_by_state[u, 2, :3, 0].tolist() == pytest.approx(expected, rel=1e-5)
            previous = states[-1]


@pytest.mark.parametrize("make", [lively_model, lively_image_model])
@pytest.mark.parametrize("reuse", ["full", "3sr"])
def test_residuals_are_those_that_generate_reports(make, reuse):
    model = make(num_fixed_point_layers=2, dropout=0.5)
    trajectory, out = states_of(model, seed=1, num_steps=4, iterations=3, reuse=reuse)
    found = measure_solver(model.train(), trajectory, num_iterations=3, most_iterations=3)
    torch.testing.assert_close(found.residuals[REUSES.index(reuse)], out.residuals.float(), rtol=1e-5, atol=0)
    assert model.training and not model.fixed_point._forward_pre_hooks


@pytest.mark.parametrize("make", [lively_model, contractive_image_model])
def test_a_solution_that_is_reused_where_nothing_changed_is_no_distance_away(make):
    model = make()
    states = masked_trajectory(model, torch.randint(0, 7, (2, model.config.max_position_embeddings)), 3).states
    still = Trajectory(states[[1, 1, 1]], torch.full((2,), 0.5, dtype=torch.float64))
    found = measure_solver(model, still, num_iterations=150, tolerance=1e-11)
    none, full, three_state = found.start_distances[:, 1]
    assert full.max() < 1e-9 and (three_state > 1e-3).all() and (three_state < none).all()
    assert found.movement[1].nan_to_num().max() < 1e-9
    assert none.tolist() == found.start_distances[0, 0].tolist() == found.start_distances[1, 0].tolist()


def test_without_a_solution_there_is_no_distance(caplog):
    logger = logging.getLogger("fpmgm")
    logger.addHandler(caplog.handler)
    try:
        found = measure_solver(lively_model(), TRAJECTORY, tolerance=1e-12, most_iterations=2)
    finally:
        logger.removeHandler(caplog.handler)
    assert found.start_distances.isnan().all() and found.movement.isnan().all()
    assert found.residuals.isfinite().all() and (found.solution_residuals > 1e-12).all()
    refused("`num_fixed_point_layers`=0", measure_solver, tiny_model(**MDLM), TRAJECTORY)


# --- trajectories ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "steps"), [(lively_model, 30), (lively_image_model, 6), (lambda: lively_model(**MDLM), 30)]
)
def test_masking_what_a_model_wrote_gives_the_states_in_which_it_wrote_it(make, steps):
    model = make()
    options = {"seed": [5, 6], "batch_size": 2}
    sampled = sampled_trajectory(model, steps, iterations=2, **options)
    masked = masked_trajectory(model, sampled.states[-1], steps, seed=[5, 6])
    blocks = Dataset.from_dict({"input_ids": sampled.states[-1].tolist()})  # as `pack` gives them
    assert masked_trajectory(model, blocks, steps, seed=[5, 6]).states.equal(masked.states)
    refused(r"`input_ids` have \[1, 2\] tokens", masked_trajectory, model, [[1, 2], [3]], steps)
    with pytest.raises(ValueError, match=r"`input_ids`\[1\] holds the mask id"):
        masked_trajectory(model, [[1, 2], [1, model.config.mask_token_id]], steps)
    assert torch.equal(sampled.states, masked.states) and torch.equal(sampled.times, masked.times)
    assert (sampled.states[0] == model.config.mask_token_id).all()
    idle = (sampled.states[1:] == sampled.states[:-1]).flatten(1).all(dim=1)
    assert idle.any() == (steps == 30)
    iterations = 2 if model.config.num_fixed_point_layers else 0
    written = model.generate(num_steps=steps, iterations=iterations, reuse="none", **options)
    assert torch.equal(sampled.states[-1], written)


def test_a_looped_model_has_a_trajectory_too():
    model = lively_model(input_injection="none")
    sampled = sampled_trajectory(model, 3, iterations=2, batch_size=2, seed=0)
    written = model.generate(batch_size=2, num_steps=3, iterations=2, seed=0)
    assert torch.equal(sampled.states[-1], written) and sampled.states.shape == (4, 2, 8)


def test_a_sampled_trajectory_has_the_times_that_the_model_was_told():
    sampled = sampled_trajectory(lively_model(time_conditioning=True), 3, batch_size=2, seed=0, order="halton")
    torch.testing.assert_close(sampled.times, (sampled.states[:-1] == MASK).double().mean(dim=(1, 2)))


def test_tokens_that_are_masked_again_are_where_the_sampler_has_them():
    model, options = lively_model(), {"seed": [5], "remask": 0.2}
    sampled = sampled_trajectory(model, 30, iterations=2, batch_size=1, **options)
    masked = masked_trajectory(model, torch.randint(0, MASK, (1, 8)), 30, **options)
    hidden = masked.states == MASK
    assert torch.equal(sampled.states == MASK, hidden)
    again, revealed = hidden[1:] & ~hidden[:-1], hidden[:-1] & ~hidden[1:]
    assert (again.any(dim=-1) & ~revealed.any(dim=-1)).any()  # a step that reveals nothing is not left out
    with pytest.raises(ValueError, match="`remask`=0\\.4 needs"):
        masked_trajectory(lively_image_model(), torch.zeros(1, 9, dtype=torch.long), 3, remask=0.4)


def test_images_keep_their_classes():
    model = lively_image_model()
    by_class = sampled_trajectory(model, 3, class_labels=[0, 2], seed=0, guidance_scale=2.0)
    assert by_class.class_labels.tolist() == [0, 2]
    found = measure_solver(model, by_class, most_iterations=2)
    other = measure_solver(model, by_class._replace(class_labels=torch.tensor([1, 2])), most_iterations=2)
    assert (found.residuals[..., 0] - other.residuals[..., 0]).abs().min() > 1e-6
    assert torch.equal(found.residuals[..., 1], other.residuals[..., 1])


# --- divergences -------------------------------------------------------------------------------------------------


def test_divergence_by_hand():
    clean, noisy = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    with_mask = [torch.cat([p.log() + 3, torch.tensor([[99.0]])], dim=1) for p in (noisy, clean)]
    expected = 0.5 * torch.log(torch.tensor(2.0)) + 0.5 * torch.log(torch.tensor(2 / 3))
    assert divergence(*with_mask, mask_token_id=2).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("layers", [{}, MDLM])
def test_lagged_divergence_against_a_plain_loop(layers, monkeypatch):
    model = lively_model(dropout=0.5, **layers)
    monkeypatch.setattr("fpmgm.analysis.divergence.chunk_rows", lambda vocab_size, device: 3)
    trajectory = masked_trajectory(model, torch.randint(0, MASK, (3, 8)), 5, seed=[0, 1, 2], remask=0.3)
    iterations = {"num_iterations": 4} if not layers else {}
    distributions = []
    for ids in trajectory.states[:-1]:
        with torch.no_grad():
            logits = model(ids, **iterations).logits
        distributions.append(logits[..., :MASK].softmax(dim=-1))
    expected = torch.full((2, 5, 3), float("nan"))
    for k, lag in enumerate((1, 3)):
        for step in range(5 - lag):
            for row in range(3):
                values = []
                for i in range(8):
                    if trajectory.states[step, row, i] == trajectory.states[step + lag, row, i] == MASK:
                        q, p = distributions[step][row, i], distributions[step + lag][row, i]
                        values.append(sum(x * (x / y).log() for x, y in zip(p, q, strict=True)))
                if values:
                    expected[k, step, row] = sum(values) / len(values)
    found = lagged_divergence(model.train(), trajectory, (1, 3), 4)
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-5, atol=1e-9)
    assert expected.nansum() > 0 and expected.isnan().any() and model.training
    steps = [expected[0, s][~expected[0, s].isnan()] for s in range(5)]
    steps = [values.mean() for values in steps if len(values)]
    assert overall(found)[0].item() == pytest.approx((sum(steps) / len(steps)).item(), rel=1e-5)
    refused("`lags`=\\(0, 1\\)", lagged_divergence, model, trajectory, (0, 1))
