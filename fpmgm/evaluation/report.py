# SPDX-License-Identifier: Apache-2.0
"""How results are written: JSON for machines beside a table for people."""

import json
import os.path
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .store import rank


def table(columns: Iterable[Any], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table, without a line break at its end; `None` is an empty cell.

    >>> print(table(["budget", "perplexity"], [[96, "7.10 ± 0.20"], [192, None]]))
    | budget | perplexity |
    |---|---|
    | 96 | 7.10 ± 0.20 |
    | 192 |  |
    """
    columns = list(columns)
    return "\n".join([_line(columns), "|" + "---|" * len(columns), *map(_line, rows)])


def _line(cells: Iterable[Any]) -> str:
    texts = ["" if cell is None else " ".join(str(cell).split()).replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(texts)} |"


def short_names(option: str, paths: Sequence[str]) -> list[str]:
    """What reports call what lies at `paths`: the last part of each, with as many before it as tell all apart.

    Args:
        option (`str`): Which names the paths, for messages.
        paths (`Sequence[str]`): Files, folders or hub names.

    Raises:
        `ValueError`: for a path that is there twice.

    >>> short_names("model", ["org/small", "org/large"]), short_names("model", ["a/export", "b/export"])
    (['small', 'large'], ['a-export', 'b-export'])
    """
    parts = [Path(os.path.abspath(path)).parts if Path(path).exists() else Path(path).parts for path in paths]
    for path, its in zip(paths, parts, strict=True):
        if parts.count(its) > 1:
            raise ValueError(f"`{option}`={list(paths)} names {path!r} twice: name it once.")
    count = 1
    while len({its[-count:] for its in parts}) < len(parts):
        count += 1
    return ["-".join(part.strip("/") for part in its[-count:]) for its in parts]


def as_json(value: Any, depth: int = 0) -> str:
    """JSON, indented from `depth` on, in which what holds nothing but plain values stands on one line.

    >>> print(as_json({"loss": [2.5, 2.25], "log": [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.25}]}))
    {
     "loss": [2.5, 2.25],
     "log": [
      {"step": 1, "loss": 2.5},
      {"step": 2, "loss": 2.25}
     ]
    }
    """
    named = isinstance(value, dict)
    parts = list(value.values() if named else value) if isinstance(value, dict | list | tuple) else []
    if not any(isinstance(part, dict | list | tuple) for part in parts):
        return json.dumps(value)
    lines = [as_json(part, depth + 1) for part in parts]
    if named:
        names = (name if isinstance(name, str) else json.dumps(name) for name in value)  # as JSON has them
        lines = [f"{json.dumps(name)}: {line}" for name, line in zip(names, lines, strict=True)]
    inner, outer = (f"\n{' ' * n}" for n in (depth + 1, depth))
    opening, closing = "{}" if named else "[]"
    return f"{opening}{inner}{f',{inner}'.join(lines)}{outer}{closing}"


def write_report(path: str | Path, result: dict[str, Any], text: str | None = None) -> None:
    """Write `result` to `path`, a .json, and `text` beside it as .md; what is there is replaced at once or not at all.

    With `torch.distributed` initialized, the first process writes.

    Args:
        path (`str` or `Path`): Its folder is made.
        result (`dict`): Plain values.
        text (`str`, *optional*): Markdown. `None`: no such file.
    """
    if rank() > 0:
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    contents = {path: as_json(result)}
    if text is not None:
        contents[path.with_suffix(".md")] = text.rstrip("\n")
    for target, content in contents.items():
        part = target.with_name(f"{target.name}.part")
        part.write_text(content + "\n", encoding="utf-8")
        part.replace(target)
