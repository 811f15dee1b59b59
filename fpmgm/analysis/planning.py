# SPDX-License-Identifier: Apache-2.0
"""From the work of calls to the work of runs: teachers, ranks that wait for one another, sampling under a budget, time
and traffic between GPUs. Nothing is run.

Shapes: B batch, L length, V vocabulary, P positions with logits, Q queries of a sequence in the last block, T steps.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedConfig

from .architecture import text_area
from .cost import PARTS, WIDE, Work, denoiser_work, logits_work, training_work


METHODS = ("base", "consistency", "conversion", "sdtt")
TEACHER_STEPS = 2  # of SDTT, for one of the student's
DIVERGENCE_PASSES = 14  # float32 of the logits that two softmaxes, a divergence and its gradient read and write
DRAW_BYTES = 76  # for each logit that a token is drawn from: check, float64, maximum, exponential, sum, search


# --- training -----------------------------------------------------------------------------------------------------


def method_work(
    config: PreTrainedConfig,
    method: str,
    batch_size: int,
    length: int,
    positions: float,
    queries: float | None = None,
    teacher: PreTrainedConfig | None = None,
    checkpointing: bool = False,
    kept_iterations: int | None = None,
    value_bytes: int = WIDE,
) -> dict[str, Work]:
    """[`training_work`] and, for all methods but the base one, the part `"teacher"`: passes without gradient at the
    student's masked positions, with the trainers' defaults. The few tokens that SDTT's teacher draws are left out.

    Args:
        config, batch_size, length, positions, queries, checkpointing, kept_iterations, value_bytes: As for
            [`training_work`].
        method (`str`): One of `METHODS`.
        teacher (*optional*): Configuration of the teacher. `None`: the model's own.

    Raises:
        `ValueError`: names the argument that is not allowed.
    """
    if method not in METHODS:
        raise ValueError(f"`method`={method!r} must be one of {METHODS}.")
    parts = training_work(
        config, batch_size, length, positions=positions, queries=queries,
        checkpointing=checkpointing, kept_iterations=kept_iterations, value_bytes=value_bytes,
    )  # fmt: skip
    if method == "base":
        return parts
    iterations = None
    if method == "consistency" and config.num_fixed_point_layers:  # as many as the student
        iterations = (sum(config.grad_iterations) + sum(config.no_grad_iterations)) / 2
    teacher = config if teacher is None else teacher
    call = denoiser_work(
        teacher, batch_size, length, iterations, 0, positions, queries, head=False, value_bytes=value_bytes
    )
    work = sum(call.values(), Work()) * (TEACHER_STEPS if method == "sdtt" else 1)
    if method != "consistency":  # it compares hidden states, the others distributions
        work += logits_work(teacher, positions, value_bytes)
        work += Work(0, WIDE * DIVERGENCE_PASSES * positions * config.vocab_size)
    return {**parts, "teacher": work}


def masked_share(area: Callable[[float], float], start: float, width: float) -> float:
    """The mean masked share of sequences whose times fill [start, start + width), beyond 1 again from 0.

    Args:
        area (`Callable`): The architecture's `masked_area`.
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
        area (`Callable`, defaults to text models'): The architecture's `masked_area`.

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
    config: PreTrainedConfig, steps: list[SamplingStep], length: int, value_bytes: int = WIDE
) -> dict[str, Work]:
    """Sampling by part, the `"draw"` in float64 last; for the whole batch.

    Example:

    ```python
    >>> from fpmgm import FPMDLMConfig, plan_budget
    >>> config = FPMDLMConfig()
    >>> steps = sampling_steps(plan_budget(config, 96).iterations, batch_size=1, length=1024)
    >>> round(sum(work.flops for work in sampling_work(config, steps, 1024).values()) / 1e12, 2)
    1.94

    ```
    """
    total = {name: Work() for name in PARTS if name != "optimizer"} | {"draw": Work()}
    for step in steps:
        iterations = step.iterations if config.num_fixed_point_layers else 0
        parts = denoiser_work(
            config, step.rows, length, iterations, 0, step.positions, step.queries, value_bytes=value_bytes
        )
        parts["draw"] = Work(0, DRAW_BYTES * config.vocab_size * step.draws)
        total = {name: work + parts[name] for name, work in total.items()}
    total["iterations"] = total.pop("grad_iterations")
    return {name: total[name] for name in ("pre", "injection", "iterations", "post", "head", "draw")}


# --- time ---------------------------------------------------------------------------------------------------------


def seconds(parts: dict[str, Work], flops_per_second: float, bytes_per_second: float) -> float:
    """Time of the parts one after the other, each bound by its products or by its memory traffic."""
    return sum(max(work.flops / flops_per_second, work.bytes / bytes_per_second) for work in parts.values())


def sent_bytes(weights: int, engine: str, gpus: int, value_bytes: int = 2, micro_batches: int = 1) -> float:
    """Bytes that a GPU sends for an optimizer step: a ring's share of the gradients' sums and of gathered weights.

    Args:
        weights (`int`): Of the model.
        engine (`str`): A key of `fpmgm.analysis.memory.ENGINES`.
        gpus (`int`): Of the run.
        value_bytes (`int`, defaults to 2): Bytes of what is sent; DDP's gradients are float32.
        micro_batches (`int`, defaults to 1): Weights that are split are gathered twice for each, and its gradients
            summed.
    """
    transfers = {
        "single": 0,
        "ddp": 2 * WIDE,
        "zero1": 2 * value_bytes,
        "zero2": (1 + micro_batches) * value_bytes,
        "zero3": 3 * micro_batches * value_bytes,
        "fsdp2": 3 * micro_batches * value_bytes,
    }
    return transfers[engine] * weights * (gpus - 1) / gpus
