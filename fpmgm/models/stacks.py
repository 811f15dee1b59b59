# SPDX-License-Identifier: Apache-2.0
"""The shared stack G and F, what the blocks of a call are given beside states, and one application of F as the solver
takes it: at all positions, or at the active ones alone.

Shapes: B batch, L length, D hidden size, C conditioning size, S some sequences, A active positions, Q the most of one
sequence.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig

from .frozen_states import KeyValues
from .injection import INJECTION_STARTS, INJECTIONS
from .layers import IdentityLinear
from .selection import Selection


class BlockInputs(NamedTuple):
    """What every block of a call is given beside states: `conditioning` (B or 1, C), `rotary` of the positions,
    attention `bias`, whether it is in `training`, and which positions are `active` (`None`: all)."""

    conditioning: torch.Tensor
    rotary: Any
    bias: Any
    training: bool
    active: Selection | None = None

    def at(self, active: Selection) -> "BlockInputs":
        """For the active positions alone.

        Raises:
            `ValueError`: where the attention has a padding mask that queries of some positions cannot be given.
        """
        if not has_rows(self.bias):
            raise ValueError(
                "`active_positions` (`freeze`) with padding needs an attention whose mask is a tensor over positions: "
                "load the model with `attn_implementation='sdpa'`, or give no `attention_mask`."
            )
        rotary = None if self.rotary is None else tuple(table[active.columns] for table in self.rotary)
        return self._replace(rotary=rotary, active=active)

    def modulation(self, layer: nn.Module) -> tuple[torch.Tensor, ...]:
        """The vectors of a block, (B or 1, 1, D), or (A or 1, D) of the active positions."""
        vectors = layer.modulation(self.conditioning)
        return vectors if self.active is None else tuple(self.active.vector(x) for x in vectors)


class FixedPointStack(nn.Module):
    """G and F: `constant` makes u = G(h_pre) once per call, `forward` is one application of F."""

    def __init__(self, config: PreTrainedConfig, block: type[nn.Module]):
        super().__init__()
        a, b = INJECTION_STARTS[config.injection_init]
        self.input_proj = nn.Identity() if config.is_looped else IdentityLinear(config.hidden_size, [[1.0]])
        self.injection = INJECTIONS[config.input_injection](config.hidden_size, a, b)
        self.layers = nn.ModuleList([block(config) for _ in range(config.num_fixed_point_layers)])

    def constant(self, h_pre: torch.Tensor) -> torch.Tensor:
        """What every iteration adds from u = G(h_pre)."""
        return self.injection.constant(self.input_proj(h_pre))

    def forward(self, h, constant, inputs: BlockInputs, modulations, keeps, key_values) -> torch.Tensor:
        """`modulations`, `keeps` (dropout masks) and `key_values` have an item for each layer."""
        h = self.injection(h, constant)  # (B, L, D) or (A, D)
        for layer, modulation, keep, part in zip(self.layers, modulations, keeps, key_values, strict=True):
            h = layer(h, modulation, inputs.rotary, inputs.bias, keep, inputs.active, inputs.training, part)
        return h


def has_rows(bias: Any) -> bool:
    """Whether queries can be left out: of no mask, and of one written out as a tensor. Other kernels' masks have no
    rows."""
    return bias is None or (torch.is_tensor(bias) and bias.dim() == 4)


def whole_step(
    stack: nn.Module, h_pre: torch.Tensor, inputs: BlockInputs, kept: list[KeyValues | None], run: Callable
) -> Callable[..., torch.Tensor]:
    """F at all positions: (B, L, D) → (B, L, D), or with (S,) rows as the second argument (S, L, D) → (S, L, D).

    What no iteration changes (u, modulations, dropout masks) is computed once.

    Args:
        stack ([`FixedPointStack`]): F.
        h_pre (`torch.Tensor`): (B, L, D).
        inputs ([`BlockInputs`]): Of the call.
        kept (`list`): Of each layer the [`KeyValues`] that it writes, or `None`.
        run (`Callable`): Calls the stack, on all sequences, with its arguments.
    """
    constant = stack.constant(h_pre)
    modulations = [inputs.modulation(layer) for layer in stack.layers]
    keeps = [layer.dropout_masks(h_pre) if inputs.training else None for layer in stack.layers]

    def step(h: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        parts = [None if store is None else store.of(rows=rows) for store in kept]
        if rows is None:
            return run(stack, h, constant, inputs, modulations, keeps, parts)
        vectors = [tuple(x[rows] if len(x) > 1 else x for x in modulation) for modulation in modulations]
        masks = [None if keep is None else tuple(mask[rows] for mask in keep) for keep in keeps]
        some = inputs._replace(bias=None if inputs.bias is None else inputs.bias[rows])
        return stack(h, constant[rows], some, vectors, masks, parts)

    return step


def active_step(
    stack: nn.Module, h_pre: torch.Tensor, inputs: BlockInputs, kept: list[KeyValues]
) -> Callable[..., torch.Tensor]:
    """F at the active positions, laid out in rows: (B, Q, D) → (B, Q, D), or with (S,) rows as the second argument
    (S, Q, D) → (S, Q, D). Keys and values of the other positions are constants, those `kept`.

    Args:
        h_pre (`torch.Tensor`): (A, D).
    """
    active, constant = inputs.active, stack.constant(h_pre)
    modulations, keeps = [inputs.modulation(layer) for layer in stack.layers], [None] * len(stack.layers)

    def step(h: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        some, index = (active, slice(None)) if rows is None else active.of_rows(rows)
        vectors = [tuple(x[index] if len(x) > 1 else x for x in modulation) for modulation in modulations]
        its = inputs._replace(
            rotary=None if inputs.rotary is None else tuple(table[index] for table in inputs.rotary),
            bias=inputs.bias if rows is None or inputs.bias is None else inputs.bias[rows],
            training=False,
            active=some._replace(places=None),  # all of it
        )
        parts = [store.of(some, rows) for store in kept]
        return some.pad(stack(some.pack(h), constant[index], its, vectors, keeps, parts))

    return step
