# SPDX-License-Identifier: Apache-2.0
"""What a call of a model costs, asked of the model itself: it runs on PyTorch's fake tensors, which have shapes and no
values, while a meter watches its operators. Nothing is computed.

FLOPs are those of PyTorch's counter; bytes are what each operator reads and writes, without caches and fused kernels;
memory is what the tensors alive hold. All of it is a CPU's: its kernels, and its dropout masks.

Shapes: B batch, L length, P positions with logits, Q queries of a sequence in the last block.
"""

import functools
import json
import weakref
from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel, PreTrainedConfig
from transformers.initialization import no_init_weights

from ..models.head import chunk_rows
from .measured import FORMULAS


aten = torch.ops.aten
UNWRITTEN = (aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided)
PARTS = {  # by the first words of a module's name, the first that fits; all else is "pre"
    "post_layers": "post",
    "fixed_point.layers": "grad_iterations",
    "fixed_point.": "injection",
    "final_": "head",
    "lm_head": "head",
}
STORAGES = ("activations", "working", "gradients", "copies")  # copies are weights cast for products
FEW = 3  # layers in a row, or iterations, that run where there are more: the first, one for all others, and the last
NARROW = {"float32": 4, "bfloat16": 2}  # bytes of a number in the products; bfloat16 is autocast


@dataclass(frozen=True)
class Work:
    """Floating-point operations and bytes moved."""

    flops: float = 0
    bytes: float = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> "Work":
        return Work(self.flops * times, self.bytes * times)


@dataclass(frozen=True)
class Trace:
    """`work` by part; `moments`, the bytes alive of each of `STORAGES` whenever that changes."""

    work: dict[str, Work]
    moments: list[tuple[int, ...]]


class Meter(TorchDispatchMode):
    """Watches the operators of a model.

    A module's operators are those after its call, and in the backward pass those after the gradient of its output has
    come, until another module's turn.
    """

    def __init__(self, fake: FakeTensorMode, model: torch.nn.Module | None = None):
        super().__init__()
        self.fake = fake
        self.formulas = FlopCounterMode(display=False, custom_mapping=FORMULAS).flop_registry
        self.training = model is not None and model.training
        self.part, self.place, self.iterations = "pre", "", Counter()
        self.kinds, self.works, self.changes = {}, [], []
        for name, module in () if model is None else model.named_modules():
            module.register_forward_pre_hook(lambda module, args, name=name: self.enter(name))
            module.register_forward_hook(lambda module, args, output, name=name: self.leave(name, output))
        for parameter in () if model is None else model.parameters():
            parameter.register_post_accumulate_grad_hook(self.gradient)

    def enter(self, name: str, place: str | None = None) -> None:
        """A module is called, or the gradient of its output at a `place` has come."""
        self.part = next((part for words, part in PARTS.items() if name.startswith(words)), "pre")
        if self.part == "grad_iterations" and self.training and not (torch.is_grad_enabled() or in_backward()):
            self.part = "no_grad_iterations"
        if name == "fixed_point" and not in_backward():
            self.iterations["grad" if torch.is_grad_enabled() else "no_grad"] += 1
        self.place = self.place_of(name) if place is None else place

    def place_of(self, name: str) -> str:
        """A module of a stack, or the latest iteration, by its number."""
        if name.startswith("fixed_point") and self.iterations:
            if in_backward():  # what runs again is where the gradient of its output came
                return self.place
            kind = next(reversed(self.iterations))
            return f"{kind} {self.iterations[kind]}"
        return ".".join(name.split(".")[:2])

    def leave(self, name: str, output) -> None:
        """A module returns."""
        place = self.place_of(name)
        for x in tree_leaves(output):
            if isinstance(x, torch.Tensor) and x.requires_grad:
                x.register_hook(lambda slope: self.enter(name, place))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.prim.device.default:  # a question, and half of all calls
            return args[0].fake_device
        kwargs = kwargs or {}
        if FakeTensor in types:  # at once: the tensor's own way back to the mode is longer
            output = self.fake.dispatch(function, types, args, kwargs)
        else:
            output = function(*args, **kwargs)
        given = (args, {name: value for name, value in kwargs.items() if name != "out"})
        read, written = ([x for x in tree_leaves(v) if isinstance(x, torch.Tensor)] for v in (given, output))
        known = {x.untyped_storage()._cdata for x in read}
        fresh = [x for x in written if x.untyped_storage()._cdata not in known]
        if (fresh or function._schema.is_mutable) and function._overloadpacket not in UNWRITTEN:  # no view
            formula = self.formulas.get(function._overloadpacket)
            flops = 0 if formula is None else formula(*args, **kwargs, out_val=output)
            moved = sum(x.numel() * x.element_size() for x in read + written)
            self.works.append((self.place, self.part, Work(flops, moved)))
        kind = "working" if in_backward() or self.part == "head" else "activations"
        if function is aten._to_copy.default and isinstance(args[0], torch.nn.Parameter):
            kind = "copies"
        for x in fresh:
            self.keep(x.untyped_storage(), kind)
        return output

    def keep(self, storage: torch.UntypedStorage, kind: str) -> None:
        """Count a storage until it is freed."""
        key, size = storage._cdata, storage.nbytes()
        if key not in self.kinds:
            self.kinds[key] = kind
            self.changes.append((self.place, kind, size))
            weakref.finalize(storage, self.free, key, size, self.place)

    def free(self, key: int, size: int, made_at: str) -> None:
        """A storage is gone. Autocast lets go of all its copies of weights at once: each goes where it was made."""
        kind = self.kinds.pop(key)
        self.changes.append((made_at if kind == "copies" else self.place, kind, -size))

    def gradient(self, parameter: torch.Tensor) -> None:
        """A parameter has its gradient."""
        key, size = parameter.grad.untyped_storage()._cdata, parameter.grad.untyped_storage().nbytes()
        if self.kinds.get(key, "gradients") != "gradients":
            self.changes += [(self.place, self.kinds[key], -size), (self.place, "gradients", size)]
            self.kinds[key] = "gradients"


def add_up(works: list, changes: list, times: dict[str, int]) -> Trace:
    """What a meter saw, some places counted a number of `times`."""
    work: dict[str, Work] = {}
    for place, part, done in works:
        work[part] = work.get(part, Work()) + done * times.get(place, 1)
    alive, moments, turn = dict.fromkeys(STORAGES, 0), [], []
    for change in [*changes, ("", "working", 0)]:
        if turn and turn[-1][0] != change[0]:
            for _, kind, size in turn * times.get(turn[0][0], 1):
                alive[kind] += size
                moments.append(tuple(alive.values()))
            turn = []
        turn.append(change)
    return Trace(work, moments)


def in_backward() -> bool:
    """Whether a backward pass is running."""
    return torch._C._current_graph_task_id() != -1


def fake_model(config: PreTrainedConfig) -> tuple[torch.nn.Module, FakeTensorMode]:
    """The model of a configuration, without values, and the mode that makes tensors like its."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, no_init_weights():
        model = AutoModel.from_config(config)
    model.tie_weights()
    return model, mode


def count_parameters(config: PreTrainedConfig) -> dict[str, int]:
    """Weights by part, and their `"total"`.

    Example:

    ```python
    >>> from fpmgm import FPMDLMConfig
    >>> count_parameters(FPMDLMConfig())["total"]
    104659794

    ```
    """
    names = {**PARTS, "fixed_point.layers": "fixed_point", "pre_layers": "pre"}
    parts = dict.fromkeys(("embeddings", "pre", "injection", "fixed_point", "post", "head"), 0)
    for name, parameter in fake_model(config)[0].named_parameters():
        part = next((part for words, part in names.items() if name.startswith(words)), "embeddings")
        parts[part] += parameter.numel()
    return {**parts, "total": sum(parts.values())}


@dataclass(frozen=True)
class Call:
    """A call of a model, with its loss and backward pass in `training`.

    Args:
        batch_size, length (`int`): B and L.
        positions (`int`, *optional*): P positions of the batch with logits. `None`: all, and no block is pruned.
        queries (`int`, *optional*): The most of them in one sequence. `None`: as few as can be.
        training, checkpointing (`bool`, default to `False`): Whether there is a backward pass, and blocks run again.
        accumulating (`bool`, defaults to `False`): Whether gradients are there already; they are not counted then.
        dtype (`str`, defaults to `"float32"`): Of the products: a key of `NARROW`.
        device (`str`, defaults to `"cpu"`): Whose chunks the head's loss takes: `"cpu"` or `"cuda"`.
        head (`bool`, defaults to `True`): Whether there are logits without a loss.
        num_iterations, num_no_grad_iterations, num_kept_iterations: As in the model's call.
    """

    batch_size: int
    length: int
    positions: int | None = None
    queries: int | None = None
    training: bool = False
    checkpointing: bool = False
    accumulating: bool = False
    dtype: str = "float32"
    device: str = "cpu"
    head: bool = True
    num_iterations: int | None = None
    num_no_grad_iterations: int = 0
    num_kept_iterations: int | None = None


def trace_call(config: PreTrainedConfig, call: Call) -> Trace:
    """What a call of the model of a configuration does.

    Example:

    ```python
    >>> from fpmgm import FPMDLMConfig
    >>> trace = trace_call(FPMDLMConfig(), Call(1, 1024, positions=512, training=True, num_iterations=4))
    >>> round(sum(work.flops for work in trace.work.values()) / 1e12, 2), max(map(sum, trace.moments)) // 10**6
    (0.49, 733)

    ```
    """
    short_config, short_call, times = shortened(config, call)
    return add_up(*run_under_meter(short_config.to_json_string(use_diff=False), short_call), times)


def shortened(config: PreTrainedConfig, call: Call) -> tuple[PreTrainedConfig, Call, dict[str, int]]:
    """A configuration and a call with at most `FEW` layers in each stack and iterations of each kind, and how many
    times what the meter sees at a place counts for all.

    The second layer or iteration counts for those left out: the first and the last hold other things. Where a gradient
    does not come, or other layers follow, the last is like the second.
    """
    no_grad, grad, kept = call.num_no_grad_iterations, call.num_iterations, call.num_kept_iterations
    grad = config.num_fixed_point_iterations if grad is None else grad
    if not config.num_fixed_point_layers:
        no_grad, grad = 0, 0
    elif not call.training:
        no_grad, grad = no_grad + grad, 0
    pre, post = config.num_pre_layers, config.num_post_layers
    follow = post + config.num_fixed_point_layers > 0
    run_pre, run_post = min(pre, FEW - follow), min(post, FEW)
    run_no_grad, run_grad = min(no_grad, FEW - 1), min(grad, FEW)
    if call.checkpointing or kept is None or kept >= grad:
        kept = None
    else:
        run_grad = grad  # they are not alike
    left_out = {
        "pre_layers.1": pre - run_pre,
        "post_layers.1": post - run_post,
        "no_grad 2": no_grad - run_no_grad,
        "grad 2": grad - run_grad,
    }
    short = type(config)(**{**config.to_dict(), "num_pre_layers": run_pre, "num_post_layers": run_post})
    iterations = (run_no_grad, run_grad) if run_grad else (0, run_no_grad)
    numbers = dict(zip(("num_no_grad_iterations", "num_iterations"), iterations, strict=True))
    times = {place: 1 + count for place, count in left_out.items()}
    return short, replace(call, **numbers, num_kept_iterations=kept), times


@functools.lru_cache(maxsize=32)
def run_under_meter(described: str, call: Call) -> tuple[list, list]:
    """What a meter saw of a call of the model that a configuration in JSON describes."""
    config = AutoConfig.for_model(**json.loads(described))
    model, mode = fake_model(config)
    model.train(call.training)
    with mode:
        arguments = {
            "input_ids": torch.zeros(call.batch_size, call.length, dtype=torch.long),
            "timesteps": torch.ones(call.batch_size),
        }
        if config.num_classes:
            arguments["class_labels"] = torch.zeros(call.batch_size, dtype=torch.long)
        if call.training:
            arguments["labels"] = arguments["input_ids"]
        for parameter in model.parameters() if call.accumulating else ():
            parameter.grad = torch.zeros_like(parameter)
    if call.checkpointing:
        name = "activation_checkpointing_enable"  # transformers 5.17 has the older name alone
        getattr(model, name, model.gradient_checkpointing_enable)()
    if config.num_fixed_point_layers:
        names = ("num_iterations", "num_no_grad_iterations", "num_kept_iterations")
        arguments |= {name: getattr(call, name) for name in names}
    if call.positions is not None:
        arguments["logits_positions"] = places(call)
    model.lm_head.chunk_rows = chunk_rows(config.vocab_size, torch.device(call.device))
    with Meter(mode, model) as meter, torch.set_grad_enabled(call.training):
        with torch.autocast("cpu", torch.bfloat16, enabled=call.dtype == "bfloat16"):
            output = model(**arguments, output_logits=call.head and not call.training)
        if call.training:
            output.loss.backward()
    return meter.works, list(meter.changes)  # before what is still alive is freed


def places(call: Call) -> torch.Tensor:
    """P indices into B·L, Q of them in the first sequence and the others in equal numbers. `None`: P/B, rounded up.

    >>> places(Call(3, 8, positions=7, queries=5)).tolist()
    [0, 1, 2, 3, 4, 8, 16]
    """
    batch_size, length, positions = call.batch_size, call.length, call.positions
    queries = -(-positions // batch_size) if call.queries is None else call.queries
    if not 0 <= positions <= batch_size * length or not positions <= batch_size * queries <= batch_size * length:
        raise ValueError(
            f"`positions`={positions} and `queries`={queries} must be positions of the batch, at most "
            f"{batch_size * length}, and the most of them in one sequence, at most {length}."
        )
    others = max(1, batch_size - 1)
    rest = positions - queries
    counts = [queries, *(rest // others + (i < rest % others) for i in range(batch_size - 1))]
    return torch.cat([row * length + torch.arange(count) for row, count in enumerate(counts)])
