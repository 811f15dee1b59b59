# SPDX-License-Identifier: Apache-2.0
"""Files of others, read as data: nothing but tensors and plain containers is unpickled, no code runs.

A file that cannot be read is named, with what it was expected to be and what it seems to be. What a file claims is
compared with its size before anything is made of it.
"""

import contextlib
import json
import mmap
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


MOST_JSON = 2**26  # bytes
MOST_NAMED = 20  # things of a kind that an error lists
TENSORS = (torch.Tensor, torch.nn.Parameter)
# What pickle may call although it takes memory or time that no size of a file bounds: a buffer of any length, and a
# codec whose time is quadratic.
COSTLY = (b"\nbytearray\n", b"punycode")
DAMAGED = "it is damaged, cut off or of another kind: get it again"
NO_MODEL = "its sizes are those of no model"
SIGNATURES = {
    b"version https://git-lfs": "it is a Git LFS pointer in place of the file: run `git lfs pull` where it comes from",
    b"<": "it is a web page or XML: download the file itself",
}


class _Inert:
    """Stands for a class that a checkpoint names (its training configuration, its tokenizer): runs nothing, and keeps
    what it would have been made of in `state`."""

    state: Any = None

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        self.__dict__["state"] = state


def _dict(*args) -> dict:
    """Stands for `defaultdict`, whose default is code."""
    return {}


@contextlib.contextmanager
def reading(source: str | Path, expected: str, otherwise: str = DAMAGED) -> Iterator[None]:
    """Whatever is raised inside becomes a `ValueError` that names the source, what it should be and what it seems.

    Args:
        source (`str` or `Path`): File, folder or repository.
        expected (`str`): What it should be.
        otherwise (`str`): What is wrong, and what to do, if it is neither empty nor plainly something else.

    Raises:
        `ValueError`: a `ValueError` that names the source already passes as it is.
    """
    try:
        yield
    except ImportError:  # a package that is not installed
        raise
    except Exception as error:
        if isinstance(error, ValueError) and str(source) in str(error):
            raise
        reason = f"{seeming(Path(source)) or otherwise} ({type(error).__name__}: {one_line(error)})"
        raise ValueError(f"{str(source)!r} cannot be read as {expected}: {reason}") from error


def seeming(path: Path) -> str | None:
    """What a file plainly is in place of what it should be, and what to do; `None`: not plainly anything."""
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        start = file.read(64)
    if not start:
        return "it is empty: get it again"
    return next((what for signature, what in SIGNATURES.items() if start.startswith(signature)), None)


def few(items: list) -> str:
    """The first of a list, and how many more there are.

    >>> few(["a", "b"])
    'a, b'
    """
    more = [f"… and {len(items) - MOST_NAMED:,} more"] if len(items) > MOST_NAMED else []
    return ", ".join([one_line(item) for item in items[:MOST_NAMED]] + more)


def one_line(error: object) -> str:
    """The beginning of an error's message.

    >>> one_line(ValueError("first\\n\\nsecond"))
    'first second'
    """
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]} …"


def check_file(path: Path) -> None:
    """Raise a `ValueError` for what is no file: opening a named pipe would wait for ever."""
    if not path.is_file():
        what = "is no file" if path.exists() else "does not exist"
        raise ValueError(f"{str(path)!r} {what}: it must be an existing file.")


def read_json(path: Path) -> dict:
    """An object of JSON.

    Raises:
        `ValueError`: names the file.
    """
    check_file(path)
    with reading(path, "a JSON object"):
        if path.stat().st_size > MOST_JSON:
            raise ValueError(f"{path.stat().st_size:,} bytes are more than the {MOST_JSON:,} that are read")
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError(f"it holds a {type(value).__name__}")
    return value


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a `.safetensors` file.

    Raises:
        `ValueError`: names the file.
    """
    check_file(path)
    with reading(path, "tensors (safetensors)"):
        return load_file(path)


def read_checkpoint(path: Path, advice: str = "save its tensors alone and load that") -> Any:
    """What a file of `torch.save` holds, with inert stand-ins for every class but tensors and plain containers.

    Args:
        path (`Path`): The file.
        advice (`str`): What to do where it was trained, for the error.

    Raises:
        `ValueError`: if the file is none of `torch.save`, or holds objects that no stand-in can take the place of.
    """
    check_file(path)
    names = []
    with reading(path, "a checkpoint of `torch.save`"):
        _check_sizes(path)
        if zipfile.is_zipfile(path):
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    # The restricted unpickler accepts the stand-ins, so that it neither imports nor runs what the file names.
    stand_ins = [
        (_dict if name == "collections.defaultdict" else type("Inert", (_Inert,), {}), name) for name in names
    ]
    objects = (
        f"it is damaged, or holds objects that nothing can stand for ({few(names)}): where it was trained, {advice}"
    )
    with reading(path, "data", objects if names else DAMAGED), torch.serialization.safe_globals(stand_ins):
        return torch.load(path, map_location="cpu", weights_only=True)


def check_tensors(state: Any, path: Path) -> None:
    """Raise a `ValueError` unless `state` holds named dense tensors, together no larger than the file they were in."""
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{str(path)!r} holds no state dict where one was expected.")
    others = [name for name, tensor in state.items() if not (isinstance(name, str) and _is_dense(tensor))]
    if others:
        raise ValueError(f"{str(path)!r} holds {len(others)} entries that are no dense tensors: {few(others)}.")
    declared, size = sum(x.numel() * x.element_size() for x in state.values()), path.stat().st_size
    if declared > 2 * size:  # tied weights are stored once and listed twice
        raise ValueError(f"the tensors of {str(path)!r} claim {declared:,} bytes, but the file has {size:,}.")


def setting(node: Any, *names: str) -> Any:
    """An entry of nested dicts, or of stand-ins for the configuration objects of omegaconf; `None` without it.

    >>> setting({"model": {"length": 8}}, "model", "length")
    8
    """
    for name in names:
        node = getattr(node, "state", node)
        node = node.get("_content", node) if isinstance(node, dict) else None
        node = node.get(name) if isinstance(node, dict) else None
    state = getattr(node, "state", node)
    return state["_val"] if isinstance(state, dict) and "_val" in state else node


def _check_sizes(path: Path) -> None:
    """Raise a `ValueError` for a pickle that would take more memory or time than its size."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            records = file.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise ValueError("its records are compressed, which `torch.save` never does: unpack it")
        if sum(record.file_size for record in records) > path.stat().st_size:
            raise ValueError("its records are larger than the file")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = [name.decode().strip() for name in COSTLY if content.find(name) >= 0]
    if found:
        raise ValueError(f"it makes objects of sizes of its own ({found}): save tensors alone")


def _is_dense(x: Any) -> bool:
    if type(x) not in TENSORS or x.layout != torch.strided or x.device.type != "cpu":
        return False
    return not (x.is_quantized or x.is_nested)
