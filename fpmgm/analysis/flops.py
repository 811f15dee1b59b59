# SPDX-License-Identifier: Apache-2.0
"""FLOPs of a call as PyTorch counts them, with the operators that its counter does not know."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import flop_counter


aten = torch.ops.aten

# Attention on a CPU, and the head's weight gradient, which is added in place in float32.
FORMULAS = {
    aten.addmm_: lambda total, a, b, out_shape=None, **kwargs: flop_counter.mm_flop(a, b),
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *rest, out_shape=None, **kwargs: (
        flop_counter.sdpa_flop_count(q, k, v)
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *rest, out_shape=None, **kwargs: (
        flop_counter.sdpa_backward_flop_count(g, q, k, v)
    ),
}


def counted_flops(run: Callable[[], Any], formulas: dict = FORMULAS) -> int:
    """FLOPs of the matrix products and attentions of `run()`, two for each multiply-add.

    Args:
        run (`Callable`): Anything that PyTorch executes.
        formulas (`dict`): Operators that the counter does not know, with their FLOPs from the arguments' shapes.

    Example:

    ```python
    >>> import torch
    >>> x = torch.ones(1, 2, 8, 4)  # two heads; the backward pass takes five products, the forward pass two
    >>> counted_flops(lambda: torch.nn.functional.scaled_dot_product_attention(x, x, x)) == 2 * 2 * 2 * 8 * 8 * 4
    True

    ```
    """
    with flop_counter.FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        run()
    return counter.get_total_flops()
