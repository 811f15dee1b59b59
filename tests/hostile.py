# SPDX-License-Identifier: Apache-2.0
"""Damaged and hostile files, seeded: what a download, a disk or an attacker may leave in place of a good one."""

import builtins
import codecs
import contextlib
import io
import json
import os
import pickle
import random
import struct
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
NUMBERS = (-1, 0, 10**9, 10**30, 1e400, float("nan"), True, None, "8", [], {}, "x" * 9999)


class Attack:
    """Pickled, it asks for a call when it is read."""

    def __init__(self, call: Callable, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


def damaged(content: bytes, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """Damages of any file."""
    yield "empty", b""
    yield "pointer", POINTER
    yield "page", b"<!DOCTYPE html><html></html>"
    yield "zeros", bytes(len(content))
    yield "doubled", content + content
    yield "noise", rng.randbytes(len(content))
    for _ in range(4):
        yield "cut", content[: rng.randrange(len(content))]
    for _ in range(8):
        flipped = bytearray(content)
        for _ in range(rng.choice((1, 1, 9))):
            flipped[rng.randrange(min(len(content), 4096))] = rng.randrange(256)
        yield "flipped", bytes(flipped)


def damaged_json(content: bytes, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """Damages of a JSON object: what any file may suffer, other types, and values out of any range."""
    values = json.loads(content)
    for text in (b"[]", b"null", b"3", b"{", b"{}", b"[" * 10**5, b'{"a":' * 10**5, b"\xff\xfe{}", b'{"a": 1e999}'):
        yield text[:12].decode("latin-1"), text
    for name in values:
        yield f"{name} = another", json.dumps(values | {name: rng.choice(NUMBERS)}).encode()
        yield f"without {name}", json.dumps({k: v for k, v in values.items() if k != name}).encode()


def hostile_safetensors() -> Iterator[tuple[str, bytes]]:
    """Headers that claim what the file does not hold."""

    def written(header, data=b"", length=None):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text) if length is None else length) + text + data

    one = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    yield "length", written({}, length=2**63)
    yield "no header", written(b"[]")
    yield "nested", written(b'{"a":' * 10**5)
    yield "claims", written({"vocab_embed.embedding": {**one, "shape": [10**9, 10**9]}}, bytes(4))
    yield "overflow", written({"a": {**one, "shape": [2**63, 2**63]}}, bytes(4))
    yield "offsets", written({"a": {**one, "data_offsets": [0, 10**12]}}, bytes(4))
    yield "negative", written({"a": {**one, "shape": [-1]}}, bytes(4))
    yield "type", written({"a": {**one, "dtype": "NO"}}, bytes(4))
    yield "whole numbers", written({"vocab_embed.embedding": {**one, "dtype": "I32"}}, bytes(4))
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    yield "layers", written({f"blocks.{i}.norm1.weight": empty for i in range(20000)})
    yield "a layer", written({f"blocks.{10**9 - 1}.norm1.weight": empty, f"transformer.layers.{10**9}.ln1": empty})


def hostile_pickles(trace: Path) -> Iterator[tuple[str, bytes]]:
    """Checkpoints that would run code (which writes `trace`), or claim more than they hold."""
    calls = (
        (os.system, f"touch {trace}"), (builtins.eval, f"open({str(trace)!r}, 'w')"), (open, str(trace), "w"),
        (builtins.exec, f"open({str(trace)!r}, 'w')"), (subprocess.call, ["touch", str(trace)]),
        (os.mkdir, str(trace)),
        (getattr, os, "system"), (__import__, "os"), (bytearray, 10**12), (bytes, 10**12), (pow, 10, 10**9),
        (list, range(10**9)), (torch.zeros, (10**6, 10**6)), (torch.Tensor, 10**6, 10**6),
        (torch.FloatTensor, 10**12), (codecs.encode, "é" * 10**6, "punycode"),
    )  # fmt: skip
    for call, *arguments in calls:
        attack = Attack(call, *arguments)
        for value in (attack, {"state_dict": {"a": attack}}, {"model": {}, "hyper_parameters": attack}):
            with contextlib.suppress(pickle.PicklingError, TypeError, AttributeError):
                yield call.__name__, saved(value)
                yield f"{call.__name__}, plain", pickle.dumps(value, protocol=2)
    huge = torch.zeros(1).expand(10**6, 10**6)
    meta, sparse = torch.empty(10**6, 10**6, device="meta"), torch.zeros(3, 3).to_sparse()
    for kind, tensor in {
        "huge": huge,
        "meta": meta,
        "sparse": sparse,
        "text": "x",
        "whole": torch.ones(3).int(),
    }.items():
        for key in ("state_dict", "model", "model_state_dict", "module"):
            yield f"{kind} under {key}", saved({key: {"vocab_embed.embedding": tensor, "tok_emb.weight": tensor}})
    for value in ([], None, 3, {"state_dict": []}, {"state_dict": {1: torch.ones(1)}}, {"ema": {}, "state_dict": {}}):
        yield f"{value!r:.30}", saved(value)
    layers = {f"backbone.blocks.{10**9 - 1}.norm1.weight": torch.ones(1), "vocab_embed.embedding": torch.ones(2, 2)}
    yield "a layer far away", saved({"state_dict": layers})
    yield "deep", nested_pickle()
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data.pkl", bytes(10**8))
        bomb.writestr("archive/version", "3\n")
    yield "zip bomb", file.getvalue()


def nested_pickle() -> bytes:
    """A list in a list, a hundred thousand deep."""
    return b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"."


def saved(value) -> bytes:
    """What `torch.save` writes."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()
