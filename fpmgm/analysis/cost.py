# SPDX-License-Identifier: Apache-2.0
"""What a denoiser costs, from its configuration alone: parameters, FLOPs and bytes of a call and of a training step.

FLOPs are those of matrix products and attention, two for each multiply-add, as `torch.utils.flop_counter` counts them.
Bytes are what the operations read and write when each does so once for each of its tensors, without caches and without
fused kernels: exact for products, a fixed number of passes for the rest.

Shapes: B batch, L length, D hidden size, V vocabulary, N iterations, P positions with logits, Q queries of a sequence
in the last block.
"""

import math
from dataclasses import dataclass

from .architecture import Architecture, Block, Linear, architecture


PARTS = ("pre", "injection", "no_grad_iterations", "grad_iterations", "post", "head", "optimizer")
WIDE = 4  # bytes of a float32
ATTENTION_PRODUCTS = (2, 5)  # forward; backward, where the scores are made again
OPTIMIZER_BYTES = 52  # for each weight: clipping's norm and scale, AdamW's seven tensors, the average's three
LOSS_PASSES = 8  # float32 of the logits that cross-entropy and its gradient read and write


@dataclass(frozen=True)
class Work:
    """Floating-point operations and bytes moved."""

    flops: float = 0
    bytes: float = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> "Work":
        return Work(self.flops * times, self.bytes * times)


def count_parameters(config) -> dict[str, int]:
    """Weights by part, and their `"total"`.

    Example:

    ```python
    >>> from fpmgm import FPMDLMConfig
    >>> count_parameters(FPMDLMConfig())["total"]
    104659794

    ```
    """
    a = architecture(config)
    head = a.vocabulary * (1 if a.tied else a.hidden + 1)
    parts = {
        "embeddings": a.vocabulary * a.hidden + a.embeddings + sum(linear.parameters for linear in a.conditioning),
        "pre": a.pre * a.block.parameters,
        "injection": a.injection.parameters if a.injection else 0,
        "fixed_point": a.shared * a.block.parameters,
        "post": a.post * a.block.parameters,
        "head": head + a.final_modulation.parameters + a.final_norm,
    }
    return {**parts, "total": sum(parts.values())}


# --- one call ----------------------------------------------------------------------------------------------------


def denoiser_work(
    config,
    batch_size: int,
    length: int,
    iterations: float | None = None,
    no_grad_iterations: float = 0,
    positions: float | None = None,
    queries: float | None = None,
    training: bool = False,
    checkpointing: bool = False,
    iterations_again: float = 0,
    head: bool = True,
    value_bytes: int = WIDE,
) -> dict[str, Work]:
    """One call of the denoiser by part: `"pre"` (with embedding and conditioning), `"injection"` (G and what every
    iteration adds), `"no_grad_iterations"`, `"grad_iterations"` (the shared blocks), `"post"`, `"head"`.

    Args:
        config: A model configuration.
        batch_size, length (`int`): B and L.
        iterations (`float`, *optional*): Iterations with gradient, or all without; a mean may be a fraction. `None`:
            the configuration's.
        no_grad_iterations (`float`, defaults to 0): Iterations without gradient before them.
        positions (`float`, *optional*): P positions of the batch with logits. `None`: all, and no block is pruned.
        queries (`float`, *optional*): The most of them in one sequence. `None`: P/B, rounded up.
        training (`bool`, defaults to `False`): Whether there is a backward pass.
        checkpointing (`bool`, defaults to `False`): Whether blocks run again in the backward pass.
        iterations_again (`float`, defaults to 0): Without it, how many of the iterations do.
        head (`bool`, defaults to `True`): Whether logits are made.
        value_bytes (`int`, defaults to 4): Bytes of a number in the products: 2 in bfloat16.

    Raises:
        `ValueError`: names the argument that is not allowed.
    """
    a = architecture(config)
    iterations = config.num_fixed_point_iterations if iterations is None else iterations
    check_call(a, batch_size, length, iterations, no_grad_iterations, positions, queries)
    pruned = positions is not None
    positions = batch_size * length if positions is None else positions
    queries = math.ceil(positions / batch_size) if queries is None else queries
    tokens = batch_size * (length + a.registers)
    rows = batch_size if a.per_sequence else 1
    costs = _Costs(value_bytes, training)
    again = 2 if training and checkpointing else 1

    def blocks(count: int, prune: bool) -> Work:
        """Explicit blocks, the last of them with outputs at the positions only."""
        if count == 0:
            return Work()
        whole = costs.block(a.block, batch_size, length + a.registers, again)
        last = costs.block(a.block, batch_size, length + a.registers, again, positions, queries) if prune else whole
        return whole * (count - 1) + last + costs.linear(a.block.modulation, rows) * count

    pre = blocks(a.pre, pruned and not a.shared and not a.post) + costs.conditioning(a, rows)
    parts = {"pre": pre + costs.embedding(a, tokens), "post": blocks(a.post, pruned)}
    parts |= {"injection": Work(), "no_grad_iterations": Work(), "grad_iterations": Work()}
    if a.shared:
        without = _Costs(value_bytes, training=False)
        cold, warm = (c.block(a.block, batch_size, length + a.registers, n) for c, n in ((without, 1), (costs, again)))
        parts["no_grad_iterations"] = cold * (a.shared * no_grad_iterations)
        parts["grad_iterations"] = warm * (a.shared * iterations) + costs.linear(a.block.modulation, rows) * a.shared
        parts["grad_iterations"] += cold * (a.shared * iterations_again)
        parts["injection"] = costs.linears(a.injection.once, tokens)
        parts["injection"] += without.injection(a, tokens, no_grad_iterations + iterations_again)
        parts["injection"] += costs.injection(a, tokens, iterations, again)
    parts["head"] = costs.linear(a.final_modulation, rows) + costs.head(a, positions) * head
    return {name: parts[name] for name in PARTS if name in parts}


def logits_work(config, positions: float, value_bytes: int = WIDE) -> Work:
    """Logits at P positions, from the head's input; without gradient."""
    return _Costs(value_bytes, training=False).head(architecture(config), positions)


class _Costs:
    """Work of the pieces of a call, with numbers of `value_bytes` in products; forward, and backward in training."""

    def __init__(self, value_bytes: int, training: bool):
        self.value_bytes, self.training = value_bytes, training

    def product(self, rows: float, inner: float, columns: float) -> Work:
        """(rows, inner) times (inner, columns)."""
        numbers = rows * inner + inner * columns + rows * columns
        return Work(2 * rows * inner * columns, self.value_bytes * numbers)

    def linear(self, linear: Linear, rows: float, forwards: int = 1, input_grad: bool = True) -> Work:
        """A linear map of `rows` tokens; its backward pass has a product for the input and one for the weight."""
        product = self.product(rows, linear.inputs, linear.outputs)
        return product * (forwards + (1 + input_grad if self.training else 0))

    def linears(self, linears: tuple[Linear, ...], rows: float, forwards: int = 1) -> Work:
        """Several linear maps of the same tokens."""
        return sum((self.linear(linear, rows, forwards) for linear in linears), Work())

    def attention(self, width: int, batch_size: int, queries: float, length: int, forwards: int) -> Work:
        """Q queries of each sequence over L keys and values; scores stay in the kernel."""
        products = ATTENTION_PRODUCTS[0] * forwards + ATTENTION_PRODUCTS[1] * self.training
        numbers = 2 * (queries + length) * (forwards + 2 * self.training)
        flops = 2 * batch_size * queries * length * width * products
        return Work(flops, self.value_bytes * batch_size * numbers * width)

    def block(
        self,
        block: Block,
        batch_size: int,
        length: int,
        forwards: int,
        positions: float | None = None,
        queries: float | None = None,
    ) -> Work:
        """A block at all positions, or with its output at P of them and Q queries a sequence; no modulation."""
        tokens = batch_size * length
        selected = tokens if positions is None else positions
        work = self.linears(block.everywhere, tokens, forwards) + self.linears(block.selected, selected, forwards)
        work += self.attention(block.width, batch_size, length if queries is None else queries, length, forwards)
        return work + self.passes(block.passes, (tokens + selected) / 2, forwards)

    def passes(self, passes: tuple[int, int], tokens: float, forwards: int) -> Work:
        """What is not a product: in float32, or with casts to it and back that cost as much."""
        return Work(0, WIDE * (passes[0] * forwards + passes[1] * self.training) * tokens)

    def injection(self, a: Architecture, tokens: int, iterations: float, forwards: int = 1) -> Work:
        """The maps of `iterations`; the first with gradient starts from a state that has none."""
        work = self.linears(a.injection.each, tokens, forwards) * iterations
        if self.training and a.injection.each:
            work += self.product(tokens, a.injection.each[0].inputs, a.injection.each[0].outputs) * -1
        return work + self.passes(a.injection.passes, tokens, forwards) * iterations

    def conditioning(self, a: Architecture, rows: int) -> Work:
        """The maps that make the conditioning vector; the first one's input has no gradient."""
        maps = (self.linear(linear, rows, input_grad=i > 0) for i, linear in enumerate(a.conditioning))
        return sum(maps, Work())

    def embedding(self, a: Architecture, tokens: int) -> Work:
        """Rows of a table; backward they are added to a gradient of its size."""
        rows = 2 * tokens * a.hidden
        return Work(0, WIDE * (rows + self.training * (rows + a.vocabulary * a.hidden)))

    def head(self, a: Architecture, positions: float) -> Work:
        """Logits; in training with a loss, in the same pass as its gradient."""
        logits = positions * a.vocabulary
        passes = LOSS_PASSES if self.training else 0
        return self.linear(Linear(a.hidden, a.vocabulary), positions) + Work(0, WIDE * passes * logits)


def check_call(
    a: Architecture,
    batch_size: int,
    length: int,
    iterations: float,
    no_grad: float,
    positions: float | None,
    queries: float | None,
) -> None:
    """Raise a `ValueError` for a call that no model of this architecture could make."""
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("length", length, 1),
        ("iterations", iterations, 1 if a.shared else 0),
        ("no_grad_iterations", no_grad, 0),
        ("positions", 0 if positions is None else positions, 0),
    ):
        if not value >= least:
            raise ValueError(f"`{name}`={value!r} must be at least {least}.")
    if positions is not None and positions > batch_size * length:
        raise ValueError(f"`positions`={positions} must be at most the {batch_size * length} positions of the batch.")
    if queries is not None and (positions is None or not positions / batch_size <= queries <= length):
        raise ValueError(
            f"`queries`={queries} must be the most of the `positions`={positions} in one sequence, at most "
            f"`length`={length}."
        )


# --- a training step ----------------------------------------------------------------------------------------------


def training_work(
    config,
    batch_size: int,
    length: int,
    iterations: float | None = None,
    no_grad_iterations: float | None = None,
    positions: float | None = None,
    queries: float | None = None,
    checkpointing: bool = False,
    kept_iterations: int | None = None,
    value_bytes: int = WIDE,
) -> dict[str, Work]:
    """A training step on one micro-batch by part, the `"optimizer"` (with clipping and the average) last.

    Args:
        config, batch_size, length, queries, checkpointing, value_bytes: As for [`denoiser_work`].
        iterations, no_grad_iterations (`float`, *optional*): With and without gradient. `None`: the mean that SJFB
            draws; the work is linear in both, so that it is the mean work.
        positions (`float`, *optional*): P masked positions. `None`: the mean over times, half of all for text, 2/π
            for images.
        kept_iterations (`int`, *optional*): Iterations with gradient that do not run again in the backward pass; the
            others' mean number is that of what SJFB draws. `None`: all.

    Example:

    ```python
    >>> from fpmgm import FPMDLMConfig
    >>> parts = training_work(FPMDLMConfig(), batch_size=8, length=1024)
    >>> round(sum(work.flops for work in parts.values()) / 1e12, 2)
    4.57

    ```
    """
    iterations = sum(config.grad_iterations) / 2 if iterations is None else iterations
    no_grad_iterations = sum(config.no_grad_iterations) / 2 if no_grad_iterations is None else no_grad_iterations
    positions = batch_size * length * architecture(config).masked_area(1) if positions is None else positions
    again = 0.0
    if kept_iterations is not None and not checkpointing:
        low, high = config.grad_iterations
        again = sum(max(0, drawn - kept_iterations) for drawn in range(low, high + 1)) / (high + 1 - low)
    parts = denoiser_work(
        config, batch_size, length, iterations, no_grad_iterations, positions, queries,
        training=True, checkpointing=checkpointing, iterations_again=again, value_bytes=value_bytes,
    )  # fmt: skip
    return {**parts, "optimizer": Work(0, OPTIMIZER_BYTES * count_parameters(config)["total"])}
