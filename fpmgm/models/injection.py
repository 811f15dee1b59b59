# SPDX-License-Identifier: Apache-2.0
"""How the shared stack F sees its input u: z = a learned mix of the state h and u, at the start exactly ah + bu.

An injection has `constant(u)`, the part that no iteration changes, and `forward(h, constant)`.

Shapes: B batch, L length, D hidden size.
"""

import math

import torch
from torch import nn
from transformers import initialization as init

from .layers import IdentityLinear, gelu, linear_of


class MLPInjection(nn.Module):
    """z = W₂ GELU(W₁ [h; u] + b₁) + b₂, with W₁ = [Wₕ Wᵤ] held as two matrices: Wᵤu + b₁ is constant over iterations.

    GELU(x) − GELU(−x) = x exactly, so rows in pairs of opposite sign make z = ah + bu exact at the start.
    """

    def __init__(self, size: int, a: float, b: float):
        super().__init__()
        self.state_proj = IdentityLinear(size, [[a], [-a]], bias=False)
        self.input_proj = IdentityLinear(size, [[b], [-b]])
        self.out_proj = IdentityLinear(size, [[1.0, -1.0]])

    def constant(self, u: torch.Tensor) -> torch.Tensor:
        """The part that depends on the input alone: once per call."""
        return self.input_proj(u)

    def forward(self, h: torch.Tensor, constant: torch.Tensor) -> torch.Tensor:
        return linear_of(self.out_proj, gelu, self.state_proj(h) + constant)


class LinearInjection(nn.Module):
    """z = Wₕh + Wᵤu + b, at the start z = ah + bu."""

    def __init__(self, size: int, a: float, b: float):
        super().__init__()
        self.state_proj = IdentityLinear(size, [[a]], bias=False)
        self.input_proj = IdentityLinear(size, [[b]])

    def constant(self, u: torch.Tensor) -> torch.Tensor:
        """The part that depends on the input alone: once per call."""
        return self.input_proj(u)

    def forward(self, h: torch.Tensor, constant: torch.Tensor) -> torch.Tensor:
        return self.state_proj(h) + constant


class DiagonalInjection(nn.Module):
    """z = a⊙h + (1 − a)⊙u with a = sigmoid(α) in (0, 1) per channel: a contraction for any weights."""

    def __init__(self, size: int, a: float, b: float):
        super().__init__()
        self.initial_logit = math.log(a / b)
        self.decay_logit = nn.Parameter(torch.empty(size))

    def initialize(self) -> None:
        """The same share of state and input in every channel."""
        init.constant_(self.decay_logit, self.initial_logit)

    def constant(self, u: torch.Tensor) -> torch.Tensor:
        """The part that depends on the input alone: once per call."""
        return (1 - self.decay_logit.sigmoid()) * u

    def forward(self, h: torch.Tensor, constant: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(constant, self.decay_logit.sigmoid(), h)


class NoInjection(nn.Module):
    """z = h: a looped model, which sees its input through the start alone."""

    def __init__(self, size: int, a: float, b: float):
        super().__init__()

    def constant(self, u: torch.Tensor) -> torch.Tensor:
        """Nothing reads it."""
        return u

    def forward(self, h: torch.Tensor, constant: torch.Tensor) -> torch.Tensor:
        return h


INJECTIONS = {"mlp": MLPInjection, "linear": LinearInjection, "diagonal": DiagonalInjection, "none": NoInjection}
INJECTION_STARTS = {"contraction": (0.5, 0.5), "identity": (1.0, 0.0)}  # (a, b) of z = ah + bu
