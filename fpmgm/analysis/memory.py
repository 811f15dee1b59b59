# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a training step, from the model's configuration alone. Nothing is run.

A step is followed from moment to moment: the forward pass fills activations (nothing is kept of iterations without
gradient), the head makes its loss and gradients in chunks, the backward pass frees a block's activations while
gradients fill, the optimizer steps. The peak is that of the worst moment.

Shapes: B batch, L length, D hidden size, V vocabulary, N iterations, P positions with logits, Q queries of a sequence
in the last block, R positions of a chunk.
"""

import math
from typing import NamedTuple

import torch

from ..models.head import chunk_rows
from .architecture import Architecture, Values, architecture
from .cost import WIDE, check_call, count_parameters


NARROW = {"float32": 4, "bfloat16": 2}  # bytes of a number in the products; bfloat16 is autocast
CHUNK_TENSORS = (4, 5)  # (R, V) float32 of a loss at once: with one chunk; with more, also the last one's gradient

ENGINES = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2")
DEVICES = ("cuda", "cpu")
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


class Unit(NamedTuple):
    """A piece of the forward pass: bytes that it keeps for its backward pass, or of its `inputs` where it runs again
    instead, and the most that its backward pass needs beside that; the weights whose gradients it completes, and those
    that its products use; whether it runs `again` in any case."""

    kept: float
    inputs: float
    temporary: float
    completed: int
    used: int
    again: bool = False


class Moment(NamedTuple):
    """Bytes of activations and of what works on them, weights that have gradients, weights copied into the products'
    type."""

    activations: float
    working: float
    gradients: float
    copied: float


class Call(NamedTuple):
    """A micro-batch: what it is computed with; `narrow` and `mask`, bytes of a number in the products and of a
    dropout's mask."""

    architecture: Architecture
    batch_size: int
    length: int
    iterations: int
    kept_iterations: int
    positions: float
    queries: float
    narrow: int
    mask: int
    device: str

    @property
    def tokens(self) -> int:
        """Positions of the batch, registers included."""
        return self.batch_size * (self.length + self.architecture.registers)

    @property
    def chunk(self) -> float:
        """Bytes of (R, V) float32 logits of the head."""
        vocabulary = self.architecture.vocabulary
        return WIDE * vocabulary * min(self.positions, chunk_rows(vocabulary, torch.device(self.device)))

    def bytes_of(self, values: Values, tokens: float) -> float:
        """Bytes of what is kept for each of `tokens`."""
        widened = WIDE * values.widened * (self.narrow < WIDE)
        masks = self.mask * values.masks + (self.mask > 0) * values.flags
        numbers = WIDE * values.wide + self.narrow * values.narrow + widened
        return tokens * (numbers + masks * self.architecture.dropout)


def training_memory(
    config,
    batch_size: int,
    length: int,
    iterations: int | None = None,
    positions: float | None = None,
    queries: float | None = None,
    checkpointing: bool = False,
    kept_iterations: int | None = None,
    dtype: str = "float32",
    device: str = "cuda",
    ema: bool = True,
    accumulating: bool = False,
    engine: str = "single",
    gpus: int = 1,
) -> dict[str, float]:
    """Bytes on one GPU at the peak of a micro-batch's step: `"weights"`, `"gradients"`, `"optimizer"` (AdamW's
    states), `"buckets"`, `"ema"`, `"activations"`, `"working"` (logits, temporaries, gathered weights), and the sum,
    `"peak"`.

    Args:
        config: A model configuration.
        batch_size, length (`int`): B and L of a micro-batch on this GPU.
        iterations (`int`, *optional*): Iterations with gradient. `None`: the most that training draws.
        positions (`float`, *optional*): P masked positions of the micro-batch. `None`: all.
        queries (`float`, *optional*): The most of them in one sequence. `None`: P/B, rounded up.
        checkpointing (`bool`, defaults to `False`): Whether blocks run again in the backward pass.
        kept_iterations (`int`, *optional*): Iterations with gradient that never do. `None`: all.
        dtype (`str`, defaults to `"float32"`): Of the products: `"float32"`, or `"bfloat16"` under autocast.
        device (`str`, defaults to `"cuda"`): `"cuda"` or `"cpu"`: sizes of the head's chunks and of dropout masks.
        ema (`bool`, defaults to `True`): Whether there is an average of the weights.
        accumulating (`bool`, defaults to `False`): Whether the gradients of earlier micro-batches are there already.
        engine (`str`, defaults to `"single"`): One of `ENGINES`.
        gpus (`int`, defaults to 1): GPUs that an engine splits over.

    Raises:
        `ValueError`: names the argument that is not allowed.
    """
    for name, value, allowed in (("dtype", dtype, NARROW), ("engine", engine, ENGINES), ("device", device, DEVICES)):
        if value not in allowed:
            raise ValueError(f"`{name}`={value!r} must be one of {tuple(allowed)}.")
    if gpus < 1:
        raise ValueError(f"`gpus`={gpus!r} must be at least 1.")
    a, narrow = architecture(config), NARROW[dtype]
    iterations = (config.grad_iterations[1] if iterations is None else iterations) if a.shared else 0
    check_call(a, batch_size, length, iterations, 0, positions, queries)
    positions = batch_size * length if positions is None else positions
    queries = math.ceil(positions / batch_size) if queries is None else queries
    # Dropout on a CPU keeps its mask in the type of its input, on a GPU as bool.
    mask = 1 if device == "cuda" else narrow
    kept_iterations = iterations if kept_iterations is None else min(iterations, kept_iterations)
    call = Call(a, batch_size, length, iterations, kept_iterations, positions, queries, narrow, mask, device)
    weights = count_parameters(config)["total"]
    held = {name: whole + split / gpus for name, (whole, split) in bytes_per_weight(engine, narrow).items()}
    resident = {name: held[name] * weights for name in ("weights", "optimizer", "buckets")}
    resident["ema"] = held["ema"] * weights * ema
    moments = _moments(call, weights, checkpointing, accumulating)
    if ema:  # the average on the model, whose own weights stand beside it
        moments.append(Moment(0, _inference(call) + resident["weights"], 0, weights - a.vocabulary * a.hidden))
    gathered = _gathered(a, weights) * narrow if engine in GATHERING else 0
    copy_bytes = narrow if narrow < WIDE and engine in ("single", "ddp") else 0  # the others train a copy
    found = [
        {
            **resident,
            "gradients": moment.gradients * held["gradients"],
            "activations": moment.activations,
            "working": moment.working + moment.copied * copy_bytes + gathered,
        }
        for moment in moments
    ]
    worst = max(found, key=lambda parts: sum(parts.values()))
    return {**worst, "peak": sum(worst.values())}


def _units(call: Call) -> list[Unit]:
    """The forward pass in order, but for the head."""
    a = call.architecture
    stream = WIDE if a.injection is None or a.injection.kept_each.wide else call.narrow  # of the residual stream
    units = [_block(call, WIDE, prune=not a.shared and not a.post and i == a.pre - 1) for i in range(a.pre)]
    if a.shared:
        hidden = call.tokens * a.hidden
        dropped = a.block.kept_at_selected
        masks = a.shared * call.tokens * (dropped.masks + dropped.flags) * a.dropout  # bool, for all iterations
        kept = call.bytes_of(a.injection.kept_once, call.tokens) + masks
        constant = call.tokens * a.injection.once[-1].outputs * stream
        once = sum(linear.parameters for linear in a.injection.once)
        units.append(Unit(kept, kept + constant, 2 * constant, once, once))
        block = _block(call._replace(mask=0), stream)
        each = a.injection.parameters - once
        widest = max((linear.inputs for linear in a.injection.each), default=0)
        iteration = Unit(
            call.bytes_of(a.injection.kept_each, call.tokens) + a.shared * block.kept,
            hidden * stream,
            max(block.temporary, call.tokens * widest * call.narrow),
            0,
            0,
        )
        used = a.shared * block.used + each
        again = call.iterations - call.kept_iterations
        iterations = [iteration._replace(again=i < again) for i in range(call.iterations)]
        units += [*iterations[:-1], iterations[-1]._replace(completed=used, used=used)]
    return units + [_block(call, stream, prune=i == a.post - 1) for i in range(a.post)]


def _block(call: Call, stream: int, prune: bool = False) -> Unit:
    """A block with its output at all positions or at the selected ones."""
    a, block = call.architecture, call.architecture.block
    selected = call.positions if prune else call.tokens
    queries = call.batch_size * call.queries if prune else call.tokens
    kept = call.bytes_of(block.kept_at_positions, call.tokens) + call.bytes_of(block.kept_at_queries, queries)
    kept += call.bytes_of(block.kept_at_selected, selected)
    temporary = max(selected * (block.widest + a.hidden), call.tokens * 4 * a.hidden) * call.narrow
    return Unit(kept, call.tokens * a.hidden * stream, temporary, block.parameters, block.parameters)


def _moments(call: Call, weights: int, checkpointing: bool, accumulating: bool) -> list[Moment]:
    """The head, its backward pass, each unit's from the last to the first, the embedding's, the optimizer."""
    a, pieces = call.architecture, _units(call)
    held = [unit.inputs if checkpointing or unit.again else unit.kept for unit in pieces]
    used = [unit.used for unit in pieces]
    head = a.vocabulary * (a.hidden + 1)
    normed = call.positions * a.hidden
    final = normed * (WIDE + 2 * call.narrow)  # the norm's input and output, the head's input
    chunk, tensors = call.chunk, CHUNK_TENSORS[call.chunk < WIDE * call.positions * a.vocabulary]
    loss = tensors * chunk
    if call.narrow < WIDE:  # a chunk's gradient of the weight, which a CPU widens before it adds it
        loss = max(loss, 2.5 * chunk + head * (call.narrow + WIDE * (call.device == "cpu")))
    made = WIDE * head + call.narrow * normed  # the head's gradients, not yet those of the weights
    everything = sum(held) + final
    start = weights if accumulating else 0
    moments = [
        Moment(everything, made + loss, start, sum(used) + head),
        Moment(everything, 2 * made, start, 0 if checkpointing else sum(used)),
    ]
    done = head
    for i in reversed(range(len(pieces))):
        unit = pieces[i]
        copied = unit.used if checkpointing else sum(used[: i + 1])
        moments.append(Moment(
            sum(held[:i]) + unit.kept, unit.temporary, weights if accumulating else done + unit.completed, copied
        ))  # fmt: skip
        done += unit.completed
    table = WIDE * a.vocabulary * a.hidden  # the embedding's gradient
    return [*moments, Moment(0, table if accumulating else 0, weights, 0)]


def _inference(call: Call) -> float:
    """Bytes of a call without gradient: a block's MLP before and after its activation, or a chunk at the head."""
    a, chunks = call.architecture, 2 + (call.chunk < WIDE * call.positions * call.architecture.vocabulary)
    block = 2 * a.block.widest * call.narrow + 4 * a.hidden * WIDE
    return max(call.tokens * block, chunks * call.chunk + call.tokens * 2 * a.hidden * WIDE)


def _gathered(a: Architecture, weights: int) -> int:
    """Weights that stand whole beside the parts: all but the blocks', and two blocks, the next being fetched."""
    return weights - (a.pre + a.shared + a.post - 2) * a.block.parameters
