# SPDX-License-Identifier: Apache-2.0
"""Finished pieces of a long evaluation, kept on disk and shared among processes."""

import hashlib
import json
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from transformers.utils import logging


logger = logging.get_logger(__name__)

# What this version of the package finds for a seed, a text or a model: to be raised by every change of it within one
# version, in `generate` or in a measure, so that nothing older is taken for it.
PROCEDURE = 8

# Of configurations: where they come from, and which version wrote them.
NO_EFFECT = {"_name_or_path", "transformers_version", "architectures", "auto_map", "dtype"}
NO_EFFECT |= {"base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version"}


class ResultStore:
    """What one procedure has finished: a value for each key, in a .jsonl file per process.

    A run that was interrupted, or another one with the same procedure, finds the values again.

    Args:
        folder (`str` or `Path`, *optional*): Where the files are. `None`: nothing is kept.
        protocol (`dict`): All that the values depend on beside this package's own code; another protocol, another
            version of the package or another `PROCEDURE` has other files.

    Example:

    ```python
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     ResultStore(folder, {"judge": "mine"}).add({"a": 1.5})
    ...     ResultStore(folder, {"judge": "mine"}).values, ResultStore(folder, {"judge": "yours"}).values
    ({'a': 1.5}, {})

    ```
    """

    def __init__(self, folder: str | Path | None, protocol: dict[str, Any]):
        self.values: dict[str, Any] = {}
        self.path = None
        if folder is None:
            return
        protocol = {**protocol, "code": code()}
        name = digest(protocol)
        Path(folder).mkdir(parents=True, exist_ok=True)
        for path in sorted(Path(folder).glob(f"{name}-*.jsonl")):
            self.values.update(_read(path))
        self.path = Path(folder) / f"{name}-{rank()}.jsonl"
        described = json.dumps(protocol, indent=2, sort_keys=True) + "\n"
        (Path(folder) / f"{name}.json").write_text(described, encoding="utf-8")

    def add(self, values: dict[str, Any]) -> None:
        """Keep `values`, on disk before this returns."""
        self.values.update(values)
        if self.path is not None:
            lines = "".join(json.dumps([key, value]) + "\n" for key, value in values.items())
            with self.path.open("a+", encoding="utf-8") as file:
                # What an interruption tore off ends its own line and is not read again.
                torn = file.tell() > 0 and not self.path.read_bytes().endswith(b"\n")
                file.write("\n" * torn + lines)


def _read(path: Path) -> dict[str, Any]:
    values, damaged = {}, 0
    for line in filter(None, path.read_bytes().split(b"\n")):
        try:
            pair = json.loads(line)
        except ValueError:  # torn, or a byte that is no text
            pair = None
        if isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str):
            values[pair[0]] = pair[1]
        else:
            damaged += 1
    if damaged:
        logger.warning(
            f"{path}: {damaged} damaged line(s), as an interruption leaves them, are left out, and their values "
            "computed again. Take them out of the file to be rid of this."
        )
    return values


def finish(
    store: ResultStore, batches: list[list[str]], function: Callable[[int], Iterable[Any]], title: str | None = None
) -> dict[str, Any]:
    """The values of all keys: those in the store, and `function(index)` for each batch that is not complete there.

    The batches are dealt out to the processes of `torch.distributed` and stay whole, so that rounding does not depend
    on interruptions or the number of processes.

    Args:
        store ([`ResultStore`]): Of the procedure.
        batches (`list[list[str]]`): Keys of each batch.
        function (`Callable`): From the index of a batch to the values of its keys.
        title (`str`, *optional*): Of a progress bar. `None`: there is none.
    """
    mine = range(rank(), len(batches), world_size())
    for index in logging.tqdm(mine, desc=title, disable=title is None or rank() > 0):
        if not all(key in store.values for key in batches[index]):
            store.add(dict(zip(batches[index], function(index), strict=True)))
    wanted = {key for batch in batches for key in batch}
    return merged({key: value for key, value in store.values.items() if key in wanted})


def merged(values: dict[str, Any]) -> dict[str, Any]:
    """The union over processes."""
    if world_size() == 1:
        return values
    everyone = [None] * world_size()
    distributed.all_gather_object(everyone, values)
    return {key: value for part in everyone for key, value in part.items()}


def rank() -> int:
    """Of this process; 0 without `torch.distributed`."""
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def world_size() -> int:
    """Number of processes; 1 without `torch.distributed`."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def code() -> str:
    """The version of this package and of what it does within it."""
    try:
        return f"fpmgm {version('fpmgm')}, procedure {PROCEDURE}"
    except PackageNotFoundError:  # a checkout that is not installed
        return f"procedure {PROCEDURE}"


def digest(value: Any) -> str:
    """A short name for a value of plain types."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


def configuration(model: nn.Module) -> str:
    """A short name for what a model does with its weights: its configuration, those of its adapters, and which of
    these act."""
    adapters = getattr(model, "peft_config", {})
    own = model.config.to_dict() if hasattr(model.config, "to_dict") else vars(model.config)  # of another's denoiser
    parts = {"model": own, **{name: adapter.to_dict() for name, adapter in adapters.items()}}
    parts = {part: {k: v for k, v in values.items() if k not in NO_EFFECT} for part, values in parts.items()}
    if adapters:
        parts["acting"] = acting_adapters(model)
    return digest(json.dumps(parts, sort_keys=True, default=lambda x: sorted(x) if isinstance(x, set) else str(x)))


def acting_adapters(model: nn.Module) -> list[str]:
    """Names of the adapters that are switched on: all of them are among the weights."""
    layers = [module for module in model.modules() if getattr(module, "disable_adapters", None) is False]
    return sorted({name for layer in layers for name in layer.active_adapters})


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """A short name for a model's weights, whatever their device, or where a `device_map` keeps them."""
    hashed = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(model.state_dict().items()):
        tensor = offloaded(model, name) if tensor.is_meta else tensor
        hashed.update(name.encode())
        hashed.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def offloaded(model: nn.Module, name: str) -> torch.Tensor:
    """The weight `name` of a model, from the main memory or the disk that accelerate reads it from in each call."""
    from accelerate.utils import align_module_device  # which has put it there

    owner, _, own = name.rpartition(".")
    module = model.get_submodule(owner)
    with align_module_device(module, "cpu"):
        return module.state_dict()[own].clone()
