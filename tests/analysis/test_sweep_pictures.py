# SPDX-License-Identifier: Apache-2.0
"""What the pictures of sweeps show is what the rows say."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from fpmgm.analysis import (
    plot_allocations,
    plot_checkpoints,
    plot_frontier,
    plot_gammas,
    plot_latency,
    plot_plans,
    plot_similarity,
    running_layers,
)
from tests.testing_utils import tiny_config


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that were saved, instead of files."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **options: figures.append(self))
    return figures


def row(perplexity: float, entropy: float = 3.0, **options) -> dict:
    extra = {name: options.pop(name) for name in ("step", "latency") if name in options}
    return {
        "generative_perplexity": perplexity,
        "generative_perplexity_standard_error": 0.5,
        "unigram_entropy": entropy,
        "sampling": {"options": options},
        **extra,
    }


def framed(axes) -> list[tuple[int, int]]:
    """Cells (x, y) with a frame."""
    return [tuple(round(float(v + 0.46)) for v in patch.get_xy()) for patch in axes.patches]


def points_of(axes, line: int = 0) -> np.ndarray:
    """What a line with error bars goes through."""
    return axes.containers[line].lines[0].get_xydata().astype(float)


def test_cells_of_plans_hold_their_rows_and_budget_lines_cross_what_costs_that(drawn):
    config = SimpleNamespace(num_pre_layers=1, num_fixed_point_layers=2, num_post_layers=1)
    cells = [(4, 1), (4, 3), (8, 1), (16, 1)]  # 16 steps of 3 iterations are blank
    rows = [row(100 * s + n, s / 10, num_steps=s, iterations=n) for s, n in reversed(cells)]
    plot_plans(rows, config, "unused.png", "judge", [32, 64, 5000])
    left, right, *bars = drawn[0].axes
    values = 401 * np.exp(left.images[0].get_array().filled(np.nan))  # relative to the lowest
    np.testing.assert_allclose(values, [[401, 403], [801, np.nan], [1601, np.nan]])
    assert [bar.get_ylabel() for bar in bars] == [
        "× the lowest perplexity (dark: better)",
        "nats (dark: more varied words)",
    ]
    assert framed(left) == [(0, 0)] and framed(right) == []  # 403 is 2.8 standard errors of a difference away
    assert sorted(text.get_text() for text in left.texts) == sorted(["401", "403", "801", "1601", "32", "64"])
    np.testing.assert_array_equal(right.images[0].get_array().filled(np.nan)[:, 0], [0.4, 0.8, 1.6])
    assert len(left.lines) == 2  # 5000 is beyond the map
    # A step of n iterations costs 2 + 2n: 32 pays 8 steps of 1 and 4 of 3, cells (0, 1) and (1, 0).
    line = left.lines[0].get_xydata()
    np.testing.assert_allclose(line[[0, -1]], [[0, 1], [1, 0]], atol=1e-9)
    np.testing.assert_allclose(left.lines[1].get_xydata()[[0, -1]], [[0, 2], [1, 1]], atol=1e-9)


def test_curves_go_through_their_rows(drawn):
    rows = [row(b + len(a) + len(r), budget=b, allocation=a, reuse=r)
            for b in (96, 24) for a in ("fixed", "cosine") for r in ("none", "3sr")]  # fmt: skip
    plot_allocations(rows, "unused.png", "judge")
    top = drawn[0].axes[:2]
    assert [axes.get_title() for axes in top] == ["reuse none", "reuse 3sr"]
    for axes, r in zip(top, ("none", "3sr"), strict=True):
        for i, a in enumerate(("fixed", "cosine")):
            expected = [[b * 1.03 ** (i - 0.5), b + len(a) + len(r)] for b in (24, 96)]
            np.testing.assert_allclose(points_of(axes, i), expected)

    steps = [row(10 - s / 10, 3 + b / 100, budget=b, step=s) for s in (20, 0, 10) for b in (24, 96)]
    plot_checkpoints(steps, "unused.png", "judge", [{"step": 0, "perplexity": 20.0}, {"step": 9, "perplexity": 25.0}])
    perplexity, entropy, validation = drawn[1].axes
    np.testing.assert_allclose(points_of(perplexity), [[0, 10], [10, 9], [20, 8]])
    np.testing.assert_allclose(points_of(entropy, 1), [[0, 3.96], [10, 3.96], [20, 3.96]])
    assert validation.lines[1].get_ydata() == pytest.approx([23, 23])
    plot_checkpoints(steps, "unused.png", "judge")
    assert len(drawn[2].axes) == 2

    lines = {"a": [row(5, budget=b, latency={"seconds_per_sequence": b / 100}) for b in (192, 96)]}
    plot_latency(lines, "unused.png", "judge")
    np.testing.assert_allclose(points_of(drawn[3].axes[0]), [[0.96, 5], [1.92, 5]])
    assert [text.get_text() for text in drawn[3].axes[0].texts] == ["96", "192"]


def test_gammas_have_a_row_for_each_budget_and_one_scale_of_colours(drawn):
    rows = [row(b + 10 * c + m[0], b, budget=b, gamma_masked=m, gamma_changed=c, gamma_unchanged=1.0)
            for b in (96, 24) for c in (0.2, 0.0) for m in ([0.75, 0.9], [0.6, 0.9])]  # fmt: skip
    plot_gammas(rows, "unused.png", "judge")
    first, entropy, second = drawn[0].axes[:3]
    expected = np.array([[24.6, 26.6], [24.75, 26.75]])
    np.testing.assert_allclose(24.6 * np.exp(first.images[0].get_array()), expected)
    assert [text.get_text() for text in first.texts] == ["24.6", "26.6", "24.8", "26.8"]
    assert framed(first) == [(0, 0), (0, 1)]  # 24.75 is within the error of 24.6
    assert [label.get_text() for label in first.get_yticklabels()] == ["[0.6, 0.9]", "[0.75, 0.9]"]
    assert "budget 24" in first.get_title() and "budget 96" in second.get_title() and len(drawn[0].axes) == 4 + 2
    assert first.images[0].get_clim() == second.images[0].get_clim() == pytest.approx((0, 0.2))  # 8 % looks small
    assert entropy.images[0].get_clim() == pytest.approx((24, 96))


def test_points_of_a_frontier_hold_what_was_swept(drawn):
    points = [
        {"label": f"temperature {t}", "entropy": t, "perplexity": 10 * t, "standard_error": 0.5} for t in (2.0, 1.0)
    ]
    plot_frontier(
        {"a": points, "b": [{"label": "top_p 0.9", "entropy": 1.5, "perplexity": 9}]}, "x.png", "judge", [1.5]
    )
    (axes,) = drawn[0].axes
    found = {text.get_text(): text.xy for text in axes.texts}
    assert found == {"1.0": (1.0, 10.0), "2.0": (2.0, 20.0), "0.9": (1.5, 9)}
    assert axes.get_legend().get_title().get_text() == "in the points: temperature, top_p"
    np.testing.assert_allclose(points_of(axes), [[1, 10], [2, 20]])


def test_the_layers_of_a_fixed_point_model_are_named_as_they_run(drawn):
    config = tiny_config(num_pre_layers=1, num_fixed_point_layers=2, num_post_layers=1, num_fixed_point_iterations=2)
    names = running_layers(config)
    kinds = ["pre 1", *(f"iteration {n}, layer {i}" for n in (1, 2) for i in (1, 2)), "post 1"]
    assert names == kinds and running_layers(tiny_config(num_pre_layers=2, num_fixed_point_layers=0)) == [
        "1",
        "2",
        "3",
    ]
    similarity = torch.eye(6) + (1 - torch.eye(6)) * 0.9
    similarity[4, 5] = similarity[5, 4] = 0.1
    plot_similarity(similarity, "unused.png", names)
    heat, line = drawn[0].axes[:2]
    assert [label.get_text() for label in heat.get_yticklabels()] == names
    assert line.get_legend().get_texts()[0].get_text() == "boundary: iteration 2, layer 2 | post 1"
