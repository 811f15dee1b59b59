# SPDX-License-Identifier: Apache-2.0
"""Similarity of layers against its definition by kernel matrices, on layers that are run one after another."""

import math
from collections.abc import Callable

import pytest
import torch

from fpmgm.conversion import auto_layer_map, layer_similarity, linear_cka, strongest_boundary
from fpmgm.models.noise import stream_generator

from ..testing_utils import refused, tiny_model


DEPTH, MASK, LENGTH = 6, 10, 8


def cka_by_kernels(x: torch.Tensor, y: torch.Tensor) -> float:
    """HSIC(K, L)/√(HSIC(K, K) HSIC(L, L)) with K = XXᵀ, L = YYᵀ, HSIC(K, L) = tr(KHLH), H = 1 − 11ᵀ/N."""
    n = len(x)
    centre = torch.eye(n, dtype=torch.float64) - torch.full((n, n), 1 / n, dtype=torch.float64)
    k, other = (z.double() @ z.double().T for z in (x, y))

    def hsic(a, b):
        return torch.trace(a @ centre @ b @ centre).item()

    return hsic(k, other) / math.sqrt(hsic(k, k) * hsic(other, other))


def explicit_model(pre: int = DEPTH, **overrides):
    sizes = {"num_pre_layers": pre, "num_fixed_point_layers": 0, "num_post_layers": DEPTH - pre}
    return tiny_model(**{**sizes, **overrides})


def batches(count: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, MASK, (4, LENGTH), generator=generator) for _ in range(count)]


@torch.no_grad()
def table_of(model, t: float, seed: int, run: Callable) -> torch.Tensor:
    """CKA of all pairs of layers, whose outputs `run(h, conditioning)` yields for one sequence, masked at time t."""
    rows = []
    for i, batch in enumerate(batches()):
        for row, ids in enumerate(batch):
            uniforms = torch.rand(LENGTH, generator=stream_generator(seed, i, row))
            h = model.embed_tokens(ids.masked_fill(uniforms < 0.999 * t, MASK)[None])
            rows.append([h[0] for h in run(h, model.conditioning(torch.tensor([t]), h.device))])
    features = [torch.cat(layer) for layer in zip(*rows, strict=True)]
    return torch.tensor([[cka_by_kernels(x, y) for y in features] for x in features], dtype=torch.float64)


def test_cka_is_that_of_the_kernels():
    x, y = torch.randn(30, 7) + 3, torch.randn(30, 4) - 1
    y[:, :2] += 2 * x[:, :2]
    assert linear_cka(x, y) == pytest.approx(cka_by_kernels(x, y), rel=1e-9)
    assert 0.1 < linear_cka(x, y) < 0.9
    rotation = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64))[0]
    assert linear_cka(x, 5 * x.double() @ rotation + 2) == pytest.approx(1, abs=1e-6)
    refused("features of 5 tokens do not vary", linear_cka, x[:5], torch.ones(5, 3))
    assert linear_cka(torch.tensor([[1.0], [-1], [0], [0]]), torch.tensor([[0.0], [0], [1], [-1]])) == 0


@pytest.mark.parametrize("pre", [DEPTH, 2])
def test_similarities_are_means_over_times_of_layers_run_one_by_one(pre):
    model = explicit_model(pre, time_conditioning=True)
    times = (0.2, 0.7, 0.9)

    def run(h, conditioning):
        for layer in (*model.pre_layers, *model.post_layers):
            h = layer(h, layer.modulation(conditioning), model.rotary(h))
            yield h

    expected = sum(table_of(model, t, 5, run) for t in times) / len(times)
    found = layer_similarity(model, batches(), times, seed=5)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)
    assert found.diagonal(offset=1).std() > 0.01


def test_of_a_fixed_point_model_every_iteration_is_a_layer():
    model = tiny_model(input_injection="linear", num_fixed_point_iterations=3)
    (before,), (shared,), (behind,) = model.pre_layers, model.fixed_point.layers, model.post_layers

    def run(h, conditioning):
        yield (h := before(h, before.modulation(conditioning), model.rotary(h)))
        constant = model.fixed_point.constant(h)
        for layer in (shared, shared, shared, behind):
            h = model.fixed_point.injection(h, constant) if layer is shared else h
            yield (h := layer(h, layer.modulation(conditioning), model.rotary(h)))

    found = layer_similarity(model, batches(), times=(0.5,))
    torch.testing.assert_close(found.double(), table_of(model, 0.5, 0, run), rtol=0, atol=1e-4)


def test_a_generator_of_batches_is_read_once_and_the_model_left_as_it_is():
    model = explicit_model(dropout=0.5).train()
    hooks = [len(layer._forward_hooks) for layer in model.pre_layers]
    found = layer_similarity(model, (batch for batch in batches()))
    assert torch.equal(found, layer_similarity(model.eval(), batches(), (0.1, 0.3, 0.5, 0.7, 0.9), seed=0))
    model.train()
    layer_similarity(model, batches(1))
    assert model.training
    assert [len(layer._forward_hooks) for layer in model.pre_layers] == hooks


def planted_model(boundary: int, pre: int = DEPTH):
    """Layers that hardly change their input, but for the one after `boundary`, which overwrites it."""
    model = explicit_model(pre)
    with torch.no_grad():
        for i, layer in enumerate([*model.pre_layers, *model.post_layers], start=1):
            layer.modulation.weight.zero_()
            layer.modulation.bias.zero_()
            layer.modulation.bias.chunk(6)[5].fill_(30.0 if i == boundary + 1 else 0.05)  # the MLP's gate
    return model


@pytest.mark.parametrize("boundary", [1, 3, 5])
def test_a_planted_boundary_is_found(boundary):
    model = planted_model(boundary, pre=4)
    layer_map, similarity = auto_layer_map(model, batches(), {"pre": 1, "fixed_point": 1, "post": 1})
    neighbours = similarity.diagonal(offset=1)
    assert strongest_boundary(similarity) == boundary
    assert neighbours[boundary - 1] < 0.9 and all(x > 0.95 for i, x in enumerate(neighbours, 1) if i != boundary)
    # The last layer is the post-stack's, whatever the boundary.
    assert layer_map == {"pre": [1], "fixed_point": [min(boundary + 1, DEPTH - 1)], "post": [DEPTH]}


def test_larger_stacks_share_no_layer():
    sizes = {"pre": 2, "fixed_point": 2, "post": 1}
    maps = [auto_layer_map(planted_model(boundary), batches(), sizes)[0] for boundary in (1, 2, 3, 5)]
    assert [m["fixed_point"] for m in maps] == [[3, 4], [3, 4], [4, 5], [4, 5]]
    assert all(m["pre"] == [1, 2] and m["post"] == [6] for m in maps)


def test_what_has_no_layers_to_compare_is_refused():
    with pytest.raises(ValueError, match="`num_fixed_point_layers`=1"):
        auto_layer_map(tiny_model(), batches(), {"pre": 1, "fixed_point": 1, "post": 1})
    refused("`batches` is empty", layer_similarity, explicit_model(), [])
    rows = torch.cat(list(batches()))
    refused(rf"ids of shape \({rows.shape[1]},\): give \(batch, length\)", layer_similarity, explicit_model(), rows)
