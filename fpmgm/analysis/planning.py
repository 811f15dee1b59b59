# SPDX-License-Identifier: Apache-2.0
"""From the cost of calls to that of runs: means over what training draws, teachers, ranks that wait for one another,
memory under engines, sampling under a budget, time and traffic between GPUs.

Shapes: B batch, L length, V vocabulary, P positions with logits, Q queries of a sequence in the last block, T steps.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig

from ..models.draw import draw_tokens
from .cost import KINDS, Meter, Trace, Work, count_parameters, traced


METHODS = ("base", "consistency", "conversion", "sdtt")
TEACHER_STEPS = 2  # of SDTT, for one of the student's
OPTIMIZER_BYTES = 52  # for each weight: clipping's norm and scale, AdamW's seven tensors, the average's three


def text_area(t: float) -> float:
    """∫₀ᵗ s ds: the integral of the masked share over training's times, which are uniform in [0, 1)."""
    return t * t / 2


def image_area(t: float) -> float:
    """∫₀ᵗ arccos(s)/(π/2) ds."""
    return (t * math.acos(t) - math.sqrt(1 - t * t) + 1) / (math.pi / 2)


AREAS = {"fpmdlm": text_area, "fpmaskgit": image_area}  # by `model_type`


# --- training -----------------------------------------------------------------------------------------------------


def mixed(works: list[tuple[float, dict[str, Work]]]) -> dict[str, Work]:
    """Their sum part by part, each with its weight."""
    parts = dict.fromkeys(part for _, work in works for part in work)
    return {part: sum((work.get(part, Work()) * weight for weight, work in works), Work()) for part in parts}


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
    positions = masked_positions(share, batch_size, length)
    parts = mixed([
        (weight, traced(config, batch_size, length, *positions, training=True, checkpointing=checkpointing,
                        dtype=dtype, device="cuda", **drawn).work)
        for weight, drawn in draws(config, None if checkpointing else kept_iterations)
    ])  # fmt: skip
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
    positions = masked_positions(share, batch_size, length)

    def calls(head: bool) -> Work:
        found = [
            (
                1 / len(numbers),
                traced(config, batch_size, length, *positions, head=head, dtype=dtype, num_iterations=n).work,
            )
            for n in numbers
        ]
        return sum(mixed(found).values(), Work())

    if method == "sdtt":  # the last of its steps alone has logits that are read everywhere
        return calls(head=False) * (TEACHER_STEPS - 1) + calls(head=True)
    return calls(head=method != "consistency")


def masked_share(area: Callable[[float], float], start: float, width: float) -> float:
    """The mean masked share of sequences whose times fill [start, start + width), beyond 1 again from 0.

    Args:
        area (`Callable`): One of `AREAS`.
        start, width (`float`): In [0, 1) and (0, 1].
    """
    beyond = max(0.0, start + width - 1)
    return (area(min(1.0, start + width)) - area(start) + area(beyond)) / width


def largest_masked_share(
    ranks: int, micro_batches: int = 1, shifts: int = 32, area: Callable[[float], float] = text_area
) -> float:
    """The masked share of the rank that has most to do, a mean over steps; all wait for it.

    The antithetic times of a step follow the order of its sequences, (micro-batch, rank), so that a rank's sequences
    have neighbouring times.

    Args:
        ranks (`int`): Processes.
        micro_batches (`int`, defaults to 1): Micro-batches of each in an optimizer step.
        shifts (`int`, defaults to 32): Shifts of the times that the mean is taken over.
        area (`Callable`, defaults to text models'): One of `AREAS`.

    >>> largest_masked_share(1), round(largest_masked_share(8), 2)
    (0.5, 0.88)
    """
    width = 1 / (ranks * micro_batches)
    means = []
    for shift in ((i + 0.5) / shifts for i in range(shifts)):
        places = [[(m * ranks + r) * width for m in range(micro_batches)] for r in range(ranks)]
        shares = [[masked_share(area, (shift + p) % 1, width) for p in rank] for rank in places]
        means.append(max(sum(rank) / micro_batches for rank in shares))
    return sum(means) / shifts


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
        alive = dict(zip(KINDS, moment, strict=True))
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
    total: dict[str, Work] = {}
    for shape, numbers in alike(steps).items():
        ends = [min(numbers), max(numbers)]  # the work is linear in the iterations
        low, high = (call_work(config, *shape, length, n, dtype) for n in ends)
        share = (sum(numbers) / len(numbers) - ends[0]) / max(1, ends[1] - ends[0])
        for part in high:
            work = low[part] * (1 - share) + high[part] * share
            total[part] = total.get(part, Work()) + work * len(numbers)
    total["iterations"] = total.pop("grad_iterations", Work())
    total["draw"] = draw_work(config.vocab_size) * sum(step.draws for step in steps)
    return {name: total.get(name, Work()) for name in ("pre", "injection", "iterations", "post", "head", "draw")}


def alike(steps: list[SamplingStep]) -> dict[tuple[int, int, int], list[int]]:
    """The iterations of the steps of each shape: rows, whole numbers of positions and queries."""
    found: dict[tuple[int, int, int], list[int]] = {}
    for step in steps:
        queries = max(1, round(step.queries))
        positions = min(max(queries, round(step.positions)), step.rows * queries)
        found.setdefault((step.rows, positions, queries), []).append(step.iterations)
    return found


def call_work(
    config: PreTrainedConfig, rows: int, positions: int, queries: int, length: int, iterations: int, dtype: str
) -> dict[str, Work]:
    """A call without gradient."""
    return traced(config, rows, length, positions, queries, dtype=dtype, num_iterations=iterations).work


def draw_work(vocabulary: int) -> Work:
    """The draw of one token."""
    meter, mode = Meter(), FakeTensorMode()
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
