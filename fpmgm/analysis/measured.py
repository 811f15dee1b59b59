# SPDX-License-Identifier: Apache-2.0
"""FLOPs and peak memory of a call, as PyTorch's own counters see them."""

import itertools
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils import flop_counter


aten = torch.ops.aten

# What the counter does not know: attention on a CPU, and the head's weight gradient, added in place in float32.
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
    >>> x = torch.ones(1, 2, 8, 4)  # two heads, each of two products of 8 · 8 · 4 multiply-adds
    >>> counted_flops(lambda: torch.nn.functional.scaled_dot_product_attention(x, x, x))
    2048

    ```
    """
    with flop_counter.FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        run()
    return counter.get_total_flops()


def allocated_peak(run: Callable[[], Any]) -> int:
    """The most bytes that tensors on the CPU hold at once while `run()` runs, beside those that were there before.

    Example:

    ```python
    >>> import torch
    >>> allocated_peak(lambda: torch.ones(1000) + 1) >= 2 * 4 * 1000
    True

    ```
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate((change for _, change in changes), initial=0))


def peak_in_subprocess(make: Callable[[], Callable[[], Any]], device: str = "cpu") -> int:
    """The most bytes that tensors hold at once while `make()()` runs, beside those that `make()` leaves.

    It happens in a process of its own, where no other model is freed meanwhile.

    Args:
        make (`Callable`): Prepares, and returns what is measured; it can be pickled, such as a `partial` of functions.
        device (`str`, defaults to `"cpu"`): Whose memory: `"cpu"` or `"cuda"`.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(_peak, make, device).result()


def _peak(make: Callable[[], Callable[[], Any]], device: str) -> int:
    run = make()
    if device == "cpu":
        return allocated_peak(run)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before
