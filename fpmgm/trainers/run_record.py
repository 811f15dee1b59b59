# SPDX-License-Identifier: Apache-2.0
"""What makes a run the one it is: written into each of its checkpoints, compared when one is resumed.

Nothing in a record depends on where a file lies, and nothing on what has been trained.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedConfig

from ..models.text_input import tokenizer_contents


RUN_FILE = "run.json"
SAMPLED_ROWS = 1024
SAMPLED_WEIGHTS = 1024  # of each tensor
CHUNK = 1 << 20
# Of a configuration: what says where it comes from or how outputs are returned. The ids of other special tokens than
# the mask follow the tokenizer when training begins.
NOT_ARCHITECTURE = {
    "transformers_version", "_name_or_path", "architectures", "auto_map", "dtype", "return_dict", "output_attentions",
    "output_hidden_states", "problem_type", "chunk_size_feed_forward", "is_encoder_decoder", "bos_token_id",
    "eos_token_id", "pad_token_id",
}  # fmt: skip
NOT_ADAPTER = {"base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version", "task_type"}


@dataclass(frozen=True)
class Origin:
    """What a run is made from beyond what its trainer sees, as JSON values by name.

    A resumed run must have the same; what is in `data` may differ with `ignore_data_change`.

    Args:
        data (`dict`): Of the training data, such as `{"text_files": describe_files(["my_text.txt"])}`.
        options (`dict`): Anything else.
        base_model (`str`, *optional*): Folder or hub name of the model that training starts from, for the card; it is
            not compared. `None`: the name that the model was loaded under, if any.
    """

    data: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    base_model: str | None = None


def describe_files(paths: Iterable[str | Path] | None, pattern: str = "*") -> list[dict] | None:
    """Size and SHA-256 of each file, and of those in each folder whose names match `pattern`.

    >>> describe_files(["LICENSE"])  # doctest: +SKIP
    [{'bytes': 11357, 'sha256': 'cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30'}]
    """
    if paths is None:
        return None
    files = []
    for path in map(Path, paths):
        files += sorted(file for file in path.rglob(pattern) if file.is_file()) if path.is_dir() else [path]
    return [{"bytes": file.stat().st_size, "sha256": _hash_of_file(file)} for file in files]


def _hash_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def digest(value: Any, of_others: Callable[[Any], Any] = repr) -> str:
    """SHA-256 of a nest of JSON values, and of others by what `of_others` makes of them, their text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=of_others).encode()).hexdigest()


def describe_processor(processor: Any) -> dict | None:
    """What a tokenizer makes of text, or an image processor of pictures; `None` for none.

    Left out of a tokenizer is what changes while it is used.
    """
    if processor is None:
        return None
    if not hasattr(processor, "get_vocab"):
        return {"sha256": digest(processor.to_dict())}
    contents = tokenizer_contents(processor)
    return {
        "tokens": len(contents[0]),
        "mask_token_id": processor.mask_token_id,
        "sha256": digest(contents),
    }


def describe_rows(rows: Any) -> dict | None:
    """The number of rows of a dataset, and of a `datasets.Dataset` or a list a hash of up to 1,024 of them, evenly
    spread; a dataset of another kind may make its rows at random.

    `None` for a stream, of which nothing is known beforehand; by name for a `dict` of datasets.
    """
    if isinstance(rows, dict):
        return {name: describe_rows(part) for name, part in rows.items()}
    if not hasattr(rows, "__len__"):
        return None
    count = len(rows)
    chosen = sorted({i * count // SAMPLED_ROWS for i in range(SAMPLED_ROWS)}) if count else []
    if isinstance(rows, Dataset):
        sample = rows.with_format("arrow")[chosen].to_pylist()  # no transform, which may draw random numbers
    elif isinstance(rows, list | tuple):
        sample = [rows[i] for i in chosen]
    else:
        return {"rows": count}
    return {"rows": count, "sha256": digest(sample, _numbers)}


def _numbers(value: Any) -> Any:
    """Of an array or a tensor; `None` of what has none, such as a picture, whose text may be another each time."""
    return value.tolist() if hasattr(value, "tolist") else None


def describe_config(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of `config` that make the architecture and the meaning of its ids."""
    return {name: value for name, value in config.to_dict().items() if name not in NOT_ARCHITECTURE}


def describe_model(model: nn.Module) -> dict[str, dict]:
    """Architecture, adapters, and weights: which tensors are trained, and a hash of those that are not, since a
    checkpoint of adapters leaves them out."""
    adapters = {
        key if name == "default" else f"{name}.{key}": value
        for name, adapter in getattr(model, "peft_config", {}).items()
        for key, value in adapter.to_dict().items()
        if key not in NOT_ADAPTER
    }
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    shapes = {name: list(getattr(p, "ds_shape", p.shape)) for name, p in trained.items()}  # ZeRO-3 may have split it
    return {
        "architecture": {**describe_config(model.config), "dtype": str(next(model.parameters()).dtype)},
        "adapters": adapters,
        "weights": known(
            trained={"tensors": len(trained), "sha256": digest(shapes)},
            frozen=digest_of_weights(p for p in model.parameters() if not p.requires_grad),
        ),
    }


def with_teacher(record: dict[str, dict], teacher: nn.Module) -> dict[str, dict]:
    """`record` with what a `teacher` is: its architecture and weights, of which a checkpoint holds nothing."""
    weights = digest_of_weights(teacher.parameters())
    described = {"sha256": digest([weights, as_json(describe_config(teacher.config))])}
    return {**record, "weights": {**record["weights"], "teacher": described}}


def digest_of_bytes(tensor: torch.Tensor) -> str:
    """SHA-256 of all values of a tensor on the CPU."""
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy()).hexdigest()


@torch.no_grad()
def digest_of_weights(parameters: Iterable[nn.Parameter]) -> str | None:
    """SHA-256 of up to 1,024 values of each tensor, evenly spread; `None` without tensors, or if they are split over
    processes."""
    parameters = list(parameters)
    if not parameters or any(hasattr(p, "ds_shape") or hasattr(p, "placements") for p in parameters):
        return None
    hashed = hashlib.sha256()
    for parameter in parameters:
        step = max(1, parameter.numel() // SAMPLED_WEIGHTS)
        values = parameter.flatten()[::step].cpu().contiguous()
        hashed.update(values.view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def as_json(record: dict[str, dict]) -> dict[str, dict]:
    """`record` as it is read again: keys are text, tuples and sets lists, others their text."""
    return json.loads(
        json.dumps(record, default=lambda value: sorted(value) if isinstance(value, set) else str(value))
    )


def known(**values: Any) -> dict[str, Any]:
    """The values that are not `None`."""
    return {name: value for name, value in values.items() if value is not None}
