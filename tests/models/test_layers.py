# SPDX-License-Identifier: Apache-2.0
"""Activations that the backward pass makes again: the gradients of keeping them, in any order, without the memory."""

import weakref
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fpmgm.models.layers import gelu, linear_of


def swiglu(gate, up):
    return F.silu(gate) * up


class LowRank(nn.Module):
    """A linear map with an adapter: two readers of one input, as under LoRA."""

    def __init__(self):
        super().__init__()
        self.base, self.down, self.up = nn.Linear(6, 3), nn.Linear(6, 2, bias=False), nn.Linear(2, 3, bias=False)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.base(x) + self.up(self.down(self.dropout(x)))


@contextmanager
def watched(kept: list[torch.Tensor]):
    """Collects what is kept for the backward pass, by hooks inside too."""
    hooks = saved_tensors_hooks

    def keep(x):
        kept.extend([x] if isinstance(x, torch.Tensor) else [])
        return x

    with (
        patch("torch.autograd.graph.saved_tensors_hooks", lambda pack, unpack: hooks(lambda x: keep(pack(x)), unpack)),
        hooks(keep, lambda x: x),
    ):
        yield


def test_gradients_are_those_of_the_kept_activation():
    torch.manual_seed(0)
    module = LowRank().double()
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    gradients = []
    for function in (linear_of, lambda linear, activation, *inputs: linear(activation(*inputs))):
        torch.manual_seed(1)
        y = function(module, gelu, x) + function(module, swiglu, x, x.flip(-1) * 2)
        gradients.append(torch.autograd.grad(y.pow(2).sum(), [x, *module.parameters()]))
    for ours, expected in zip(*gradients, strict=True):
        assert torch.equal(ours, expected)


def test_second_derivatives():
    linear, x = nn.Linear(4, 2).double(), torch.randn(2, 3, 4, dtype=torch.float64).requires_grad_()
    for function in (lambda x: linear_of(linear, gelu, x[0]), lambda x: linear_of(linear, swiglu, x[0], x[1])):
        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_activation_is_not_kept(checkpointed):
    linear, x = nn.Linear(64, 8), torch.randn(100, 64, requires_grad=True)
    outputs = []
    linear.register_forward_pre_hook(lambda module, args: outputs.append(args[0].data_ptr()))
    plain, kept = [], []
    with watched(plain):
        linear(F.gelu(x, approximate="tanh"))
    with watched(kept):
        if checkpointed:  # then its own hooks keep the input alone
            checkpoint(linear_of, linear, gelu, x, use_reentrant=False).sum().backward()
        else:
            linear_of(linear, gelu, x)
    assert outputs[0] in {y.data_ptr() for y in plain}
    assert not set(outputs[1:]) & {y.data_ptr() for y in kept}


def test_pre_activations_are_not_kept_under_checkpointing():
    linear, before = nn.Linear(64, 8), nn.Linear(16, 64)
    alive = []
    before.register_forward_hook(lambda module, args, y: alive.append(weakref.ref(y.untyped_storage())))
    x = torch.randn(100, 16, requires_grad=True)
    y = checkpoint(lambda x: linear_of(linear, gelu, before(x)), x, use_reentrant=False)
    assert [storage() for storage in alive] == [None]
    (gradient,) = torch.autograd.grad(y.sum(), x)
    (expected,) = torch.autograd.grad(linear(F.gelu(before(x), approximate="tanh")).sum(), x)
    assert torch.equal(gradient, expected)
