# SPDX-License-Identifier: Apache-2.0
"""From the cost of calls to that of runs: means over what training draws, teachers, ranks that wait for one another,
memory under engines, sampling under a budget, time and traffic between GPUs.

Shapes: B batch, L length, V vocabulary, P positions with logits, Q queries of a sequence in the last block, T steps.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig

from ..models.draw import draw_tokens
from ..models.kinds import Kind
from .cost import STORAGES, Call, Meter, Trace, Work, count_parameters, trace_call


METHODS = ("base", "consistency", "conversion", "sdtt")
TEACHER_STEPS = 2  # of SDTT, for one of the student's
OPTIMIZER_BYTES = 52  # for each weight: clipping's norm and scale, AdamW's seven tensors, the average's three


# --- training -----------------------------------------------------------------------------------------------------


def mixed(works: list[tuple[float, dict[str, Work]]]) -> dict[str, Work]:
    """Their sum part by part, each with its weight."""
    parts = dict.fromkeys(part for _, work in works for part in work)
    return {part: sum((work.get(part, Work()) * weight for weight, work in works), Work()) for part in parts}


def on_line(work: Callable[[float], dict[str, Work]], x: float, low: float, high: float) -> dict[str, Work]:
    """`work(x)` of what is linear in x, by that of two others."""
    share = (x - low) / (high - low)
    return mixed([(1 - share, work(low)), (share, work(high))])


def draws(config: PreTrainedConfig, kept: int | None) -> list[tuple[float, dict[str, int | None]]]:
    """Iterations, and a weight for each, whose mean work is that of all that SJFB draws: the work is linear in either
    number, but for a bend where more iterations run again than `kept`."""
    if not config.num_fixed_point_layers:
        return [(1.0, {})]
    (least, most), (low, high) = config.no_grad_iterations, config.grad_iterations
    halves = ((least + most) // 2, -(-(least + most) // 2))  # with their mean
    pairs = [(0.5, halves[0], low), (0.5, halves[1], high)]
    if kept is not None and low < kept < high:
        drawn = range(low, high + 1)
        at_low, at_high = (
            sum(max(0.0, 1 - (n - low) / (kept - low)) for n in drawn) / len(drawn),
            sum(max(0.0, 1 - (high - n) / (high - kept)) for n in drawn) / len(drawn),
        )
        pairs = [(at_low, least, low), (1 - at_low - at_high, least, kept), (at_high, least, high)]
        pairs += [(0.5, most, low), (-0.5, least, low)]  # half of what the iterations without gradient add
    names = ("num_no_grad_iterations", "num_iterations")
    return [(w, {**dict(zip(names, pair, strict=True)), "num_kept_iterations": kept}) for w, *pair in pairs]


def training_work(
    config: PreTrainedConfig,
    batch_size: int,
    length: int,
    share: float,
    checkpointing: bool = False,
    kept_iterations: int | None = None,
    dtype: str = "float32",
) -> dict[str, Work]:
    """The mean training step on a micro-batch by part, the `"optimizer"` (with clipping and the average) last.

    Args:
        config: A model configuration.
        batch_size, length (`int`): B and L.
        share (`float`): Of the positions, masked; all of one sequence where there are as many.
        checkpointing (`bool`, defaults to `False`): Whether blocks run again in the backward pass.
        kept_iterations (`int`, *optional*): Iterations with gradient that do not, without that. `None`: all.
        dtype (`str`, defaults to `"float32"`): Of the products: `"float32"`, or `"bfloat16"` under autocast.
    """
    call = Call(
        batch_size, length, *masked_positions(share, batch_size, length), training=True, checkpointing=checkpointing,
        dtype=dtype, device="cuda",
    )  # fmt: skip
    drawn = draws(config, None if checkpointing else kept_iterations)
    parts = mixed([(weight, trace_call(config, replace(call, **numbers)).work) for weight, numbers in drawn])
    return {**parts, "optimizer": Work(0, OPTIMIZER_BYTES * count_parameters(config)["total"])}


def masked_positions(share: float, batch_size: int, length: int) -> tuple[int, int]:
    """P and Q of a micro-batch whose times differ, so that nearly all of one sequence is masked."""
    positions = max(1, round(share * batch_size * length))
    return positions, min(length, positions)


def teacher_work(
    config: PreTrainedConfig, method: str, batch_size: int, length: int, share: float, dtype: str = "float32"
) -> Work:
    """What a method's teacher, of `config`, adds to the base one: calls without gradient at the student's masked
    positions, with the trainers' defaults. The divergence's own passes and the few tokens that SDTT's teacher draws
    are left out.

    Args:
        config, batch_size, length, share, dtype: As for [`training_work`].
        method (`str`): One of `METHODS`.

    Raises:
        `ValueError`: if there is no such method.
    """
    if method not in METHODS:
        raise ValueError(f"`method`={method!r} must be one of {METHODS}.")
    if method == "base":
        return Work()
    numbers = [config.num_fixed_point_iterations]
    if method == "consistency":  # as many as the student
        twice = sum(config.grad_iterations) + sum(config.no_grad_iterations)
        numbers = [twice // 2, -(-twice // 2)]
    call = Call(batch_size, length, *masked_positions(share, batch_size, length), dtype=dtype)

    def calls(head: bool) -> Work:
        found = [trace_call(config, replace(call, head=head, num_iterations=n)).work for n in numbers]
        return sum(mixed([(1 / len(numbers), work) for work in found]).values(), Work())

    if method == "sdtt":  # the last of its steps alone has logits that are read everywhere
        return calls(head=False) * (TEACHER_STEPS - 1) + calls(head=True)
    return calls(head=method != "consistency")


def masked_shares(kind: Kind, groups: int, start: float = 0.0) -> torch.Tensor:
    """(groups,) The mean masked share of each of `groups` of sequences with neighbouring times, of those that training
    draws: the first begins at `start` in [0, 1), and beyond 1 they go on from 0."""
    points = groups * max(64, 2**14 // groups)
    times = kind.time((start + (torch.arange(points, dtype=torch.float64) + 0.5) / points) % 1)
    return kind.masked_probability(times).view(groups, -1).mean(dim=1)


def largest_masked_share(kind: Kind, ranks: int, micro_batches: int = 1, shifts: int = 32) -> float:
    """The masked share of the rank that has most to do, a mean over steps; all wait for it.

    The antithetic times of a step follow the order of its sequences, (micro-batch, rank), so that a rank's sequences
    have neighbouring times.

    Args:
        kind ([`Kind`]): Of the model.
        ranks (`int`): Processes.
        micro_batches (`int`, defaults to 1): Micro-batches of each in an optimizer step.
        shifts (`int`, defaults to 32): Shifts of the times that the mean is taken over.

    >>> from fpmgm.models.kinds import KINDS
    >>> [round(largest_masked_share(KINDS["fpmdlm"], ranks), 1) for ranks in (1, 8)]
    [0.5, 0.9]
    """
    steps = (masked_shares(kind, micro_batches * ranks, (i + 0.5) / shifts) for i in range(shifts))
    return sum(shares.view(micro_batches, ranks).mean(dim=0).max().item() for shares in steps) / shifts


# --- memory -------------------------------------------------------------------------------------------------------

ENGINES = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2")
GATHERING = ("zero3", "fsdp2")  # engines that make a block's weights whole while it runs


def bytes_per_weight(engine: str, narrow: int) -> dict[str, tuple[int, int]]:
    """What one GPU holds for each weight, in bytes: whole, and split over the GPUs.

    AdamW has two states. DDP sends gradients in buckets beside them. DeepSpeed trains a copy in the products' type, of
    `narrow` bytes, and keeps a float32 one with the states.

    >>> bytes_per_weight("zero2", narrow=2)["optimizer"]
    (0, 12)
    """
    table = {
        "single": {"weights": (4, 0), "gradients": (4, 0), "optimizer": (8, 0), "ema": (4, 0)},
        "ddp": {"weights": (4, 0), "gradients": (4, 0), "optimizer": (8, 0), "ema": (4, 0), "buckets": (4, 0)},
        "zero1": {"weights": (narrow, 0), "gradients": (narrow, 0), "optimizer": (0, 12), "ema": (4, 0)},
        "zero2": {"weights": (narrow, 0), "gradients": (0, narrow), "optimizer": (0, 12), "ema": (4, 0)},
        "zero3": {"weights": (0, narrow), "gradients": (0, narrow), "optimizer": (0, 12), "ema": (0, 4)},
        "fsdp2": {"weights": (0, 4), "gradients": (0, 4), "optimizer": (0, 8), "ema": (0, 4)},
    }
    return {"buckets": (0, 0), **table[engine]}


def training_memory(
    trace: Trace,
    parameters: dict[str, int],
    blocks: int,
    engine: str = "single",
    gpus: int = 1,
    narrow: int = 4,
    accumulating: bool = False,
    ema: bool = True,
) -> dict[str, float]:
    """Bytes on one GPU at the peak of a micro-batch's step: `"weights"`, `"gradients"`, `"optimizer"` (AdamW's
    states), `"buckets"`, `"ema"`, `"activations"`, `"working"` (logits, temporaries, gathered weights), and the sum,
    `"peak"`.

    Args:
        trace ([`Trace`]): Of the step, with the most iterations that training draws.
        parameters (`dict[str, int]`): From [`count_parameters`].
        blocks (`int`): `num_hidden_layers` of the configuration.
        engine (`str`, defaults to `"single"`): One of `ENGINES`.
        gpus (`int`, defaults to 1): GPUs that an engine splits over.
        narrow (`int`, defaults to 4): Bytes of a number in the products.
        accumulating (`bool`, defaults to `False`): Whether the trace was made beside the gradients of earlier
            micro-batches.
        ema (`bool`, defaults to `True`): Whether there is an average of the weights.
    """
    held, weights = bytes_per_weight(engine, narrow), parameters["total"]
    per_weight = {name: whole + split / gpus for name, (whole, split) in held.items()}
    resident = {name: per_weight[name] * weights for name in ("weights", "optimizer", "buckets")}
    resident["ema"] = per_weight["ema"] * weights * ema
    gathered = 0.0
    if engine in GATHERING:  # all but the blocks', and two blocks, the next being fetched
        in_blocks = sum(parameters[part] for part in ("pre", "fixed_point", "post"))
        gathered = narrow * (weights - in_blocks * max(0, blocks - 2) / blocks)

    def at(moment: tuple[int, ...]) -> dict[str, float]:
        alive = dict(zip(STORAGES, moment, strict=True))
        copies = alive["copies"] if engine in ("single", "ddp") else 0  # the others train a copy
        return {
            **resident,
            "gradients": per_weight["gradients"] * (weights if accumulating else alive["gradients"] / 4),
            "activations": alive["activations"],
            "working": alive["working"] + copies + gathered,
        }

    worst = max(map(at, set(trace.moments)), key=lambda parts: sum(parts.values()))
    return {**worst, "peak": sum(worst.values())}


# --- sampling -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SamplingStep:
    """A step of `generate`: rows that run, P positions with logits, Q queries of a row, tokens drawn, iterations."""

    rows: int
    positions: float
    queries: float
    draws: float
    iterations: int


def sampling_steps(
    iterations: list[int], batch_size: int, length: int, counts: list[float] | None = None
) -> list[SamplingStep]:
    """The steps of a plan, with the positions that they are expected to reveal.

    The first step sees masks alone, so that the rows of a batch are alike and one is run.

    Args:
        iterations (`list[int]`): Of each step.
        batch_size, length (`int`): B and L, all masked.
        counts (`list[float]`, *optional*): Positions of a row that each step reveals. `None`: the ancestral order's
            mean, an equal share, and for Q the mean of the largest of B (normal approximation).
    """
    steps, ancestral = [], counts is None
    counts = [length / len(iterations)] * len(iterations) if ancestral else counts
    for i, (count, n) in enumerate(zip(counts, iterations, strict=True)):
        spread = math.sqrt(2 * math.log(batch_size) * count * (1 - count / length)) if ancestral else 0.0
        queries = min(length, count + spread)
        steps.append(SamplingStep(batch_size, batch_size * count, queries, batch_size * count, n))
        if i == 0 and batch_size > 1:
            columns = length * (1 - (1 - count / length) ** batch_size) if ancestral else count
            steps[0] = SamplingStep(1, columns, columns, batch_size * count, n)
    return steps


def sampling_work(
    config: PreTrainedConfig, steps: list[SamplingStep], length: int, dtype: str = "float32"
) -> dict[str, Work]:
    """Sampling by part, the `"draw"` in float64 last; for the whole batch. Positions are rounded.

    Example:

    ```python
    >>> from fpmgm import FPMDLMConfig, plan_budget
    >>> config = FPMDLMConfig()
    >>> steps = sampling_steps(plan_budget(config, 96).iterations, batch_size=1, length=1024)
    >>> round(sum(work.flops for work in sampling_work(config, steps, 1024).values()) / 1e12, 2)
    1.94

    ```
    """
    calls = Counter()
    for step in steps:
        queries = max(1, round(step.queries))
        positions = min(max(queries, round(step.positions)), step.rows * queries)
        calls[Call(step.rows, length, positions, queries, dtype=dtype, num_iterations=step.iterations)] += 1
    total = mixed([(times, call_work(config, call)) for call, times in calls.items()])
    total["iterations"] = total.pop("grad_iterations", Work())
    total["draw"] = draw_work(config.vocab_size) * sum(step.draws for step in steps)
    return {name: total.get(name, Work()) for name in ("pre", "injection", "iterations", "post", "head", "draw")}


def call_work(config: PreTrainedConfig, call: Call) -> dict[str, Work]:
    """Of a call without gradient. One row's is linear in its positions: the same two traces serve all plans."""

    def of_row(positions: int) -> dict[str, Work]:
        return trace_call(config, replace(call, positions=positions, queries=positions)).work

    if call.batch_size == 1 and 1 < call.positions < call.length:
        return on_line(of_row, call.positions, 1, call.length - 1)
    return trace_call(config, call).work


def draw_work(vocabulary: int) -> Work:
    """The draw of one token."""
    mode = FakeTensorMode()
    meter = Meter(mode)
    with mode, meter:
        draw_tokens(torch.zeros(1, vocabulary), torch.zeros(1, dtype=torch.float64), 0)
    return sum((work for _, _, work in meter.works), Work())


# --- time ---------------------------------------------------------------------------------------------------------


def seconds(parts: dict[str, Work], flops_per_second: float, bytes_per_second: float) -> float:
    """Time of the parts one after the other, each bound by its products or by its memory traffic."""
    return sum(max(work.flops / flops_per_second, work.bytes / bytes_per_second) for work in parts.values())


def sent_bytes(weights: int, engine: str, gpus: int, value_bytes: int = 2, micro_batches: int = 1) -> float:
    """Bytes that a GPU sends for an optimizer step: a ring's share of the gradients' sums and of gathered weights.

    Args:
        weights (`int`): Of the model.
        engine (`str`): A key of `ENGINES`.
        gpus (`int`): Of the run.
        value_bytes (`int`, defaults to 2): Bytes of what is sent; DDP's gradients are float32.
        micro_batches (`int`, defaults to 1): Weights that are split are gathered twice for each, and its gradients
            summed.
    """
    transfers = {
        "single": 0,
        "ddp": 8,
        "zero1": 2 * value_bytes,
        "zero2": (1 + micro_batches) * value_bytes,
        "zero3": 3 * micro_batches * value_bytes,
        "fsdp2": 3 * micro_batches * value_bytes,
    }
    return transfers[engine] * weights * (gpus - 1) / gpus
