# SPDX-License-Identifier: Apache-2.0
"""How results are written: JSON for machines beside a table for people."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


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


def write_report(path: str | Path, result: dict[str, Any], text: str | None = None) -> None:
    """Write `result` to `path`, a .json, and `text` beside it as .md; what is there is replaced at once or not at all.

    Args:
        path (`str` or `Path`): Its folder is made.
        result (`dict`): Plain values.
        text (`str`, *optional*): Markdown. `None`: no such file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    contents = {path: json.dumps(result, indent=1)}
    if text is not None:
        contents[path.with_suffix(".md")] = text.rstrip("\n")
    for target, content in contents.items():
        part = target.with_name(f"{target.name}.part")
        part.write_text(content + "\n", encoding="utf-8")
        part.replace(target)
