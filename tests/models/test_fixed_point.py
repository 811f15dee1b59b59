# SPDX-License-Identifier: Apache-2.0
"""The solver on linear contractions, whose solutions, residuals and gradients are known in closed form."""

import numpy as np
import pytest
import torch

from fpmgm.models.fixed_point import SolverOptions, relative_residual, solve, solve_adaptively, solve_fixed_point
from tests.testing_utils import refused


def contraction(size: int = 5, factor: float = 0.4) -> torch.Tensor:
    """A random matrix with every singular value at `factor`."""
    return factor * torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q


def test_iterations_approach_the_solution_of_the_linear_system():
    matrix, b = contraction(), torch.randn(2, 3, 5, dtype=torch.float64)
    start = torch.randn(2, 3, 5, dtype=torch.float64)
    solution = torch.linalg.solve(torch.eye(5, dtype=torch.float64) - matrix, b[..., None]).squeeze(-1)

    def step(h):
        return h @ matrix.T + b

    found = solve_fixed_point(step, start, num_iterations=45)
    torch.testing.assert_close(found.state, solution, rtol=0, atol=1e-12)
    assert found.residuals.shape == (45, 2)
    # ‖hⁿ − h*‖ shrinks by exactly the factor 0.4 at each iteration: a scaled rotation.
    for iterations in (1, 4):
        error = solve_fixed_point(step, start, iterations).state - solution
        torch.testing.assert_close(error.norm(), 0.4**iterations * (start - solution).norm(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("padded", [False, True])
def test_residuals_follow_the_formula(padded):
    matrix, b = contraction(), torch.randn(2, 4, 5, dtype=torch.float64)
    mask = np.array([[1, 1, 1, 1], [0, 1, 1, 0]]) if padded else np.ones((2, 4))
    state = torch.randn(2, 4, 5, dtype=torch.float64)
    found = solve_fixed_point(
        lambda h: h @ matrix.T + b, state, 2, num_no_grad_iterations=2,
        attention_mask=torch.tensor(mask) if padded else None,
    )  # fmt: skip
    h, expected = state.numpy(), []
    for _ in range(4):
        new = h @ matrix.numpy().T + b.numpy()
        change = (((new - h) ** 2).sum(-1) * mask).sum(-1)
        expected.append(np.sqrt(change / ((h**2).sum(-1) * mask).sum(-1)))
        h = new
    np.testing.assert_allclose(found.residuals.numpy(), expected, rtol=1e-5)


def test_residual_of_a_state_at_rest_is_zero_even_at_the_origin():
    zero, ones = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
    assert relative_residual(zero, zero).tolist() == [0.0]
    assert relative_residual(ones, ones).tolist() == [0.0]
    assert relative_residual(ones, zero).tolist() == [float("inf")]
    assert relative_residual(ones.bfloat16(), 2 * ones.bfloat16()).dtype == torch.float32


def test_the_first_iterations_with_gradient_run_again_after_the_last_are_done():
    weight, events = torch.tensor(0.5, requires_grad=True), []

    def step(h):
        events.append(f"F({h.item():g})")
        new = weight * h + 1
        if new.requires_grad:
            new.register_hook(lambda slope: events.append(f"slope of {new.item():g}"))
        return new

    state = solve_fixed_point(step, torch.zeros(()).view(1, 1, 1), 3, num_no_grad_iterations=1, num_kept_iterations=1)
    forward, events = events, []
    assert forward == ["F(0)", "F(1)", "F(1.5)", "F(1.75)"]
    state.state.sum().backward()
    backward = [event for event in events if event.startswith("F")]
    assert backward == ["F(1.5)", "F(1)"] and events[0] == "slope of 1.875"
    # d/dw of w(w(w·1 + 1) + 1) + 1 at 1/2, where 1 is the state after the iteration without gradient
    assert weight.grad.item() == pytest.approx(3 * 0.25 + 2 * 0.5 + 1)


@pytest.mark.parametrize(("no_grad", "grad"), [(0, 1), (0, 4), (3, 1), (2, 3)])
def test_gradient_is_that_of_the_last_iterations(no_grad, grad):
    matrix, b = contraction().requires_grad_(), torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    start = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, 5, dtype=torch.float64)
    solution = solve_fixed_point(lambda h: torch.tanh(h @ matrix.T) + b, start, grad, no_grad)
    found = torch.autograd.grad((solution.state * weight).sum(), (matrix, b, start), allow_unused=True)

    h = start
    for _ in range(no_grad):
        h = (torch.tanh(h @ matrix.T) + b).detach()
    for _ in range(grad):
        h = torch.tanh(h @ matrix.T) + b
    expected = torch.autograd.grad((h * weight).sum(), (matrix, b, start), allow_unused=True)
    torch.testing.assert_close(solution.state, h, rtol=0, atol=1e-14)
    for ours, theirs in zip(found[: 2 if no_grad else 3], expected, strict=False):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert (found[2] is None) == bool(no_grad)  # what comes before is cut off


def test_many_differentiated_iterations_give_the_implicit_gradient():
    matrix, b = contraction(), torch.randn(1, 1, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64)
    # h* = (I − A)⁻¹ b, so d(w·h*)/db = (I − A)⁻ᵀ w.
    implicit = torch.linalg.solve((torch.eye(5, dtype=torch.float64) - matrix).T, weight)
    errors = []
    for grad in (1, 3, 40):
        state = solve_fixed_point(lambda h: h @ matrix.T + b, torch.zeros_like(b), grad, 50 - grad).state
        gradient = torch.autograd.grad((state * weight).sum(), b)[0].flatten()
        errors.append(float((gradient - implicit).norm() / implicit.norm()))
    # The Neumann series after n terms misses exactly (Aᵀ)ⁿ of the whole.
    assert errors == pytest.approx([0.4, 0.4**3, 0], abs=1e-12)


@pytest.mark.parametrize("outer", [True, False])
def test_only_the_differentiated_iterations_build_a_graph(outer):
    weight, grad_modes, built = torch.tensor(0.5, requires_grad=True), [], []

    def step(h):
        new = weight * h + 1
        grad_modes.append(torch.is_grad_enabled())
        built.append(new.requires_grad)
        return new

    with torch.set_grad_enabled(outer):
        solution = solve_fixed_point(step, torch.ones(1, 1, 1, requires_grad=True), 2, num_no_grad_iterations=3)
        assert torch.is_grad_enabled() == outer
    assert grad_modes == built == [False] * 3 + [outer] * 2
    assert solution.state.requires_grad == outer and not solution.residuals.requires_grad


# --- each sequence its own number of iterations -----------------------------------------------------------------


def rotation_steps(factors: list[float]):
    """F for a batch of contractions with these factors, and what it was called with."""
    maps, calls = torch.stack([contraction(factor=factor) for factor in factors]), []
    b = torch.randn(len(factors), 1, 5, dtype=torch.float64)

    def step(h, rows):
        calls.append(rows.tolist())
        return h @ maps[rows].transpose(1, 2) + b[rows]

    return step, calls


def test_sequences_stop_at_their_tolerance_and_cost_nothing_more():
    step, calls = rotation_steps([0.1, 0.4, 0.6])
    start = torch.randn(3, 2, 5, dtype=torch.float64)
    found = solve_adaptively(step, start, num_iterations=20, tolerance=1e-2)
    taken = (~found.residuals.isnan()).sum(dim=0).tolist()
    assert taken[0] < taken[1] < taken[2] < 20
    assert calls[: max(taken)] == [[row for row in range(3) if taken[row] > i] for i in range(max(taken))]
    for row, count in enumerate(taken):
        alone = solve_fixed_point(lambda h, row=row: step(h, torch.tensor([row])), start[row : row + 1], count)
        assert torch.equal(found.state[row], alone.state[0])
        assert torch.equal(found.residuals[:count, row], alone.residuals[:, 0])
        assert (alone.residuals[:-1] > 1e-2).all() and alone.residuals[-1] <= 1e-2


def test_sequences_stop_at_their_own_limits():
    step, calls = rotation_steps([0.9, 0.9, 0.9])
    found = solve_adaptively(step, torch.randn(3, 2, 5, dtype=torch.float64), torch.tensor([1, 4, 2]))
    assert (~found.residuals.isnan()).sum(dim=0).tolist() == [1, 4, 2]
    assert calls == [[0, 1, 2], [1, 2], [1], [1]]


def test_anderson_solves_a_small_linear_system_that_picard_has_hardly_begun():
    # With as many remembered points as dimensions + 1, the best mix of an affine map's images is its fixed point.
    matrix = torch.diag(torch.tensor([0.95, -0.9, 0.5], dtype=torch.float64))
    b, start = torch.ones(3, dtype=torch.float64), torch.zeros(1, 1, 3, dtype=torch.float64)
    solution = torch.linalg.solve(torch.eye(3, dtype=torch.float64) - matrix, b)
    error = {
        solver: (solve_adaptively(lambda h, rows: h @ matrix + b, start, 7, solver=solver).state - solution).norm()
        for solver in ("picard", "anderson")
    }
    assert error["picard"] > 5 and error["anderson"] < 0.05


# --- options --------------------------------------------------------------------------------------------------------

PER_SEQUENCE = torch.tensor([2, 3])


@pytest.mark.parametrize("adaptive", [{"tolerance": 0.1}, {"solver": "anderson"}, {"num_iterations": PER_SEQUENCE}])
@pytest.mark.parametrize("about_gradients", [{"num_no_grad_iterations": 2}, {"num_kept_iterations": 0}])
def test_what_needs_a_gradient_is_refused_where_there_is_none(adaptive, about_gradients):
    name = next(iter(about_gradients))
    with torch.no_grad():
        SolverOptions(**adaptive)
        SolverOptions(**about_gradients)
        message = f"`{name}`=. is about a gradient, which `{next(iter(adaptive))}`.* none of"
        refused(message, SolverOptions, **adaptive, **about_gradients)
    refused(r"has no gradient: call the model under `torch.no_grad\(\)`", SolverOptions, **adaptive)
    SolverOptions(**about_gradients)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_iterations": -1}, "`num_iterations`=-1 must be a whole number"),
        ({"num_iterations": 2.0}, "`num_iterations`=2.0 must be a whole number"),
        ({"num_iterations": torch.ones(2)}, r"`num_iterations` of shape \(2,\) and type torch.float32"),
        ({"num_iterations": torch.ones(2, 2).long()}, r"`num_iterations` of shape \(2, 2\)"),
        ({"num_no_grad_iterations": None}, "`num_no_grad_iterations`=None must be"),
        ({"num_kept_iterations": -1}, "`num_kept_iterations`=-1 must be"),
        ({"tolerance": float("nan")}, "`tolerance`=nan must be at least 0"),
        ({"tolerance": "0.1"}, "`tolerance`='0.1' must be at least 0"),
        ({"solver": "newton"}, "`solver`='newton' must be one of"),
        ({"reuse_weights": torch.ones(2, 3)}, "`reuse_weights` weigh `fixed_point_state`, which is None"),
    ],
)
@torch.no_grad()
def test_options_that_are_none_are_named(options, message):
    refused(message, SolverOptions, **options)


@torch.no_grad()
def test_options_choose_the_solver():
    step, _ = rotation_steps([0.3, 0.8])
    start = torch.randn(2, 2, 5, dtype=torch.float64)

    def on_all(h, rows=None):
        return step(h, torch.arange(2) if rows is None else rows)

    plain = solve(on_all, start, SolverOptions(num_iterations=2, num_no_grad_iterations=3))
    assert torch.equal(plain.state, solve_fixed_point(on_all, start, 5).state)
    for options in ({"tolerance": 0.05}, {"solver": "anderson"}, {"num_iterations": PER_SEQUENCE}):
        options = {"num_iterations": 4, **options}
        assert torch.equal(
            solve(on_all, start, SolverOptions(**options)).state, solve_adaptively(on_all, start, **options).state
        )
    for count in (0, torch.tensor([1, 0]), torch.tensor([1, 2, 3])):
        refused("`num_iterations`", solve, on_all, start, SolverOptions(num_iterations=count))
