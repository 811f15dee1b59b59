# SPDX-License-Identifier: Apache-2.0
"""State dicts of others: their names without wrappers, their layers counted, and whether they fit a model of ours."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from .checkpoint import MOST_NAMED, NO_MODEL, few, reading


# What a wrapper puts into the names of what it wraps: `torch.compile`, DDP, DeepSpeed, FSDP, activation checkpointing.
WRAPPERS = {"_orig_mod", "module", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
MOST_LAYERS = 1000


def unwrapped(state: dict[str, torch.Tensor], source: str | Path) -> dict[str, torch.Tensor]:
    """`state` under the names that its model has without wrappers.

    Raises:
        `ValueError`: if two names become one.

    >>> list(unwrapped({"_orig_mod.backbone.module.bias": torch.zeros(1)}, "last.ckpt"))
    ['backbone.bias']
    """
    names = {name: ".".join(part for part in name.split(".") if part not in WRAPPERS) for name in state}
    kept = {plain: name for name, plain in names.items()}
    twice = [name for name, plain in names.items() if kept[plain] != name]
    if twice:
        raise ValueError(f"`{source}` holds the weights of one model twice, under other wrappers: {few(twice)}.")
    return {plain: state[name] for plain, name in kept.items()}


def renamed(name: str, rules: list[tuple[str, str]]) -> str:
    """Our name of a weight: all of `rules`, (pattern, replacement), in their order."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def check_there(state: dict[str, torch.Tensor], names: Iterable[str], source: str | Path, what: str) -> None:
    """Raise a `ValueError` unless `state` has weights of these `names`, by which `what` it should be is known."""
    missing = [name for name in names if name not in state]
    if missing:
        raise ValueError(f"`{source}` is not {what}: it has no {missing}; it has {few(list(state))}.")


def count_layers(names: Iterable[str], prefix: str, source: str | Path) -> int:
    """How many layers have weights, `prefix` followed by their number.

    Raises:
        `ValueError`: if they are not numbered from 0 without a gap, or more than `MOST_LAYERS`.

    >>> count_layers(["blocks.0.bias", "blocks.1.bias"], "blocks.", "last.ckpt")
    2
    """
    found = {name[len(prefix) :].split(".")[0] for name in names if name.startswith(prefix)}
    if not 0 < len(found) <= MOST_LAYERS or found != {str(i) for i in range(len(found))}:
        raise ValueError(
            f"the layers of `{source}`, {prefix}0, {prefix}1, …, must be numbered without a gap, up to {MOST_LAYERS} "
            f"of them: it has {len(found)}, {few(sorted(found, key=lambda i: (len(i), i)))}."
        )
    return len(found)


def filled(
    make: Callable[[], torch.nn.Module], state: dict[str, torch.Tensor], source: str | Path, what: str
) -> torch.nn.Module:
    """The model that `make` gives, without memory for weights of its own, in evaluation mode with those of `state`.

    Raises:
        `ValueError`: if `make` fails, since sizes that weights tell are those of no such model, and from [`fitting`].
    """
    with reading(source, what, NO_MODEL), torch.device("meta"):
        model = make()
    model.load_state_dict(fitting(model, state, source), assign=True)
    model.tie_weights()
    return model.requires_grad_(True).eval()


def fitting(model: torch.nn.Module, state: dict[str, torch.Tensor], source: str | Path) -> dict[str, torch.Tensor]:
    """`state` in float32, if it is the whole of `model`.

    Raises:
        `ValueError`: lists keys that are missing or unknown, shapes that differ, types that are not floating and what
            is not finite.
    """
    floats = {name: tensor.float() for name, tensor in state.items() if tensor.is_floating_point()}
    problems = misfits(shapes_of(model.state_dict()), shapes_of(state))
    problems["not floating"] = [f"{name} is {tensor.dtype}" for name, tensor in state.items() if name not in floats]
    problems["not finite"] = [name for name, tensor in floats.items() if not tensor.isfinite().all()]
    refuse(problems, type(model).__name__, source)
    return floats


def shapes_of(state: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def misfits(expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> dict[str, list[str]]:
    """By kind: keys that are missing or unknown, and shapes that differ."""
    both = [name for name in expected if name in found]
    return {
        "missing": [f"{name} {shape}" for name, shape in expected.items() if name not in found],
        "unknown": [f"{name} {shape}" for name, shape in found.items() if name not in expected],
        "wrong shape": [f"{n} is {found[n]}, expected {expected[n]}" for n in both if found[n] != expected[n]],
    }


def refuse(problems: dict[str, list[str]], model: str, source: str | Path) -> None:
    """Raise a `ValueError` that lists the first problems of each kind, if there are any."""
    lines = [f"  {kind}: {item}" for kind, items in problems.items() for item in items[:MOST_NAMED]]
    more = sum(max(0, len(items) - MOST_NAMED) for items in problems.values())
    if lines:
        lines += [f"  … and {more:,} more"] if more else []
        raise ValueError(f"the weights of `{source}` do not fit {model}:\n" + "\n".join(lines))
