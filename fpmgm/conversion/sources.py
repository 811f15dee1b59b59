# SPDX-License-Identifier: Apache-2.0
"""Where files come from: a path here or a repository on the hub. A path that is not there is said at once."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.utils import HFValidationError, validate_repo_id

from .checkpoint import few, one_line, read_json


WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # whole, or in shards beside an index
SAFETENSORS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
PICKLES = ("pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json")
FILE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".safetensors")


def local_path(name: str | Path) -> Path | None:
    """The file or folder of this name; `None` if it can only be a hub repository's.

    Raises:
        `ValueError`: for what looks like a path (`./model`, `/models/mine`, `runs/a/b`, `last.ckpt`, a `Path`) and
            does not exist.

    >>> local_path("kuleshov-group/mdlm-owt") is None
    True
    """
    path = Path(name)
    if path.exists():
        return path
    if isinstance(name, str) and path.suffix not in FILE_SUFFIXES:
        try:
            validate_repo_id(name)
            return None
        except HFValidationError:
            pass
    raise ValueError(
        f"`path_or_repo`={str(name)!r} does not exist: correct the path, or give the name of a hub repository, such "
        "as 'kuleshov-group/mdlm-owt'."
    )


def fetch(
    name: str | Path,
    patterns: list[str] | tuple[str, ...],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """A file or folder here, or the folder of a hub repository's files that match `patterns`.

    Args:
        name (`str` or `Path`): Path, or name of a repository.
        patterns (`list[str]`): Files to download of a repository.
        revision (`str`, *optional*): Branch, tag or commit. `None`: `main`.
        token, cache_dir, local_files_only: As in `huggingface_hub.snapshot_download`.

    Raises:
        `ValueError`: for a path that does not exist, a `revision` of a path, and what the hub does not give.
    """
    path = local_path(name)
    if path is not None:
        if revision is not None:
            raise ValueError(
                f"`revision`={revision!r} is of hub repositories, but `path_or_repo`={str(name)!r} is here."
            )
        return path
    where = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), **where))
    except (OSError, ValueError) as error:
        at = "" if revision is None else f" at `revision`={revision!r}"
        raise ValueError(
            f"`path_or_repo`={name!r} is no path here, and the hub does not give it{at}: {one_line(error)}"
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder's weights: one of `WEIGHTS`, or the shards that its index names.

    Raises:
        `ValueError`: for a folder without weights, and for an index whose shards are not all there.
    """
    for name in WEIGHTS:
        if (folder / name).exists():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.exists():
            return _shards(index)
    found = sorted(path.name for path in folder.iterdir())
    raise ValueError(
        f"{str(folder)!r} holds no weights ({' or '.join(WEIGHTS)}, whole or in shards): it holds "
        f"[{few(found)}]. Give a file by its own path; of a hub repository with a model on each branch, "
        "such as 'jdeschena/sdtt', give the branch as `revision`."
    )


def _shards(index: Path) -> list[Path]:
    names = read_json(index).get("weight_map")
    names = set(names.values()) if isinstance(names, dict) else set()
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise ValueError(f"{str(index)!r} must name files of its folder, the shards, under 'weight_map'.")
    missing = sorted(name for name in names if not (index.parent / name).exists())
    if missing:
        raise ValueError(
            f"{str(index.parent)!r} lacks {len(missing)} of {len(names)} shards that {index.name} names, such as "
            f"{missing[0]!r}: get it again."
        )
    return [index.parent / name for name in sorted(names)]
