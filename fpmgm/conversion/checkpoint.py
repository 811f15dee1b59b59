# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of others, read as data: nothing but tensors and plain containers is unpickled, no code runs."""

from pathlib import Path
from typing import Any

import torch


class _Inert:
    """Stands for a class that a checkpoint names (its training configuration, its tokenizer): holds, runs nothing."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


def _dict(*args) -> dict:
    """Stands for `defaultdict`, whose default is code."""
    return {}


def read_checkpoint(path: Path, advice: str = "save its tensors alone and load that") -> Any:
    """What a file of `torch.save` holds, with inert stand-ins for every class but tensors and plain containers.

    Args:
        path (`Path`): The file.
        advice (`str`): What to do where it was trained, for the error.

    Raises:
        `ValueError`: if the file holds objects that no stand-in can take the place of.
    """
    # The restricted unpickler accepts the stand-ins, so that it neither imports nor runs what the file names.
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    stand_ins = [
        (_dict if name == "collections.defaultdict" else type("Inert", (_Inert,), {}), name) for name in names
    ]
    with torch.serialization.safe_globals(stand_ins):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except torch.serialization.pickle.UnpicklingError as error:
            raise ValueError(
                f"`path_or_repo`={str(path)!r} holds objects that cannot be read as data ({names}). Where it was "
                f"trained, {advice}."
            ) from error


def check_state(model: torch.nn.Module, state: dict[str, torch.Tensor], source: str | Path) -> None:
    """Raise a `ValueError` that lists every key or shape of `state` that does not fit `model`, and every NaN."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in state]
    problems += [f"unknown: {name} {tuple(tensor.shape)}" for name, tensor in state.items() if name not in expected]
    problems += [
        f"wrong shape: {name} is {tuple(state[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    problems += [f"not finite: {name}" for name, tensor in state.items() if not tensor.isfinite().all()]
    if problems:
        raise ValueError(f"the weights of `{source}` do not fit {type(model).__name__}:\n  " + "\n  ".join(problems))
