# SPDX-License-Identifier: Apache-2.0
"""Local files of text: which they are, who reads them, and what is wrong with one that cannot be read."""

import codecs
import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO


ENCODING = {"encoding": "utf-8-sig"}  # a byte-order mark is not part of the text
READERS = {  # suffix → reader of `datasets`, and its options: a .txt file is one document
    ".txt": ("text", {"sample_by": "document", **ENCODING}),
    ".jsonl": ("json", {"parse_agent_traces": False, **ENCODING}),
    ".json": ("json", {"parse_agent_traces": False, **ENCODING}),
    ".parquet": ("parquet", {}),
}
MARKS = {  # the longer ones first
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
AT_ONCE = 1 << 20  # bytes that are read


def kind(file: Path) -> str:
    """The suffix that says how a file is read, whatever its case, and whether it is compressed.

    >>> kind(Path("BOOKS.TXT.gz"))
    '.txt'
    """
    return Path(file.name.lower().removesuffix(".gz")).suffix


def list_files(given: str | Path | Iterable[str | Path]) -> list[Path]:
    """The files named, and those below the folders named, in order of their names.

    Raises:
        `ValueError`: for what does not exist or is empty, and for files of no known kind, or of several.
    """
    files = []
    for path in map(Path, [given] if isinstance(given, str | Path) else given):
        if path.is_dir():
            files += _files_of(path)
        elif path.is_file():
            files.append(path)
        else:
            raise ValueError(f"`text_files`: {str(path)!r} does not exist.")
    for file in files:
        if file.stat().st_size == 0:
            raise ValueError(f"`text_files`: {str(file)!r} is empty.")
    suffixes = {kind(file) for file in files}
    if len(suffixes) != 1 or not suffixes <= set(READERS):
        raise ValueError(
            f"`text_files` end in {sorted(suffixes)}: give files of one kind of {tuple(READERS)} (or .gz)."
        )
    return files


def _files_of(folder: Path) -> list[Path]:
    """Those of a known kind; hidden files and folders are left out."""
    below = [(path, path.relative_to(folder).parts) for path in sorted(folder.rglob("*"))]
    files = [path for path, parts in below if kind(path) in READERS and not any(p.startswith(".") for p in parts)]
    files = [path for path in files if path.is_file()]
    if not files:
        raise ValueError(f"`text_files`: the folder {str(folder)!r} has no files of {tuple(READERS)} (or .gz).")
    return files


def check_encoding(file: Path, whole: bool) -> None:
    """Raise a `ValueError` that names a text file and its encoding if that is not UTF-8.

    Args:
        file (`Path`): Of text or JSON; others pass.
        whole (`bool`): Read all of it, not its beginning only.
    """
    if kind(file) == ".parquet":
        return
    decoder, offset = codecs.getincrementaldecoder("utf-8")(), 0
    with _open(file) as opened:
        part = opened.read(AT_ONCE)
        found = next((name for mark, name in MARKS.items() if part.startswith(mark)), None)
        if found is None and part.count(0) > len(part) // 4:
            found = "UTF-16"  # without a mark, every other byte of English is 0
        if found is not None:
            raise ValueError(_not_utf8(file, f"but {found}", found))
        while True:
            pending = len(decoder.getstate()[0])  # bytes of a character that a part cuts
            try:
                decoder.decode(part, final=not part)
            except UnicodeDecodeError as error:
                bad = f"byte 0x{error.object[error.start]:02x} at position {offset - pending + error.start}"
                raise ValueError(_not_utf8(file, f"({bad}), probably latin-1 or Windows-1252", "latin1")) from error
            if not part or not whole:
                return
            offset, part = offset + len(part), opened.read(AT_ONCE)


def _not_utf8(file: Path, found: str, source: str) -> str:
    return (
        f"`text_files`: {str(file)!r} is not UTF-8 {found}: convert it, as by "
        f"`iconv -f {source.lower()} -t utf-8 {file.name}`."
    )


def _open(file: Path) -> BinaryIO:
    with file.open("rb") as opened:
        packed = opened.read(2) == b"\x1f\x8b"
    return gzip.open(file) if packed else file.open("rb")


def explain(files: list[Path]) -> str | None:
    """What is wrong with the first of `files` that cannot be read; `None` if nothing is found."""
    for file in files:
        try:
            check_encoding(file, whole=True)
            if kind(file) == ".jsonl":
                _check_lines(file)
        except (ValueError, OSError, EOFError) as error:
            return str(error)
    return None


def _check_lines(file: Path) -> None:
    with _open(file) as opened:
        for number, line in enumerate(opened, start=1):
            text = line.decode("utf-8-sig").strip()
            try:
                row = json.loads(text) if text else None
            except ValueError as error:
                raise ValueError(f"`text_files`: line {number} of {str(file)!r} is no JSON: {error}.") from error
            if row is not None and not isinstance(row, dict):
                raise ValueError(
                    f"`text_files`: line {number} of {str(file)!r} is {text[:40]!r}: give objects such as "
                    '{"text": "…"}.'
                )
