# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint's files must hold beside what transformers asks of them."""

from collections.abc import Iterable
from os import PathLike
from typing import Any

from transformers.utils import cached_file, logging

from .generation_config_mgm import MGMGenerationConfig


logger = logging.get_logger(__name__)


def check_complete(source: str | None, missing: Iterable[str], advice: str) -> None:
    """Raise a `ValueError` that names the weights which the files of a model or of an adapter lack."""
    names = sorted(missing)
    if names:
        some = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
        raise ValueError(f"{source!r} lacks {len(names)} of the weights: {some}. {advice}")


def saved_generation_config(
    config_class: type[MGMGenerationConfig], path: str | PathLike, **options: Any
) -> MGMGenerationConfig:
    """What `generation_config.json` beside the weights says; the defaults where there is no such file.

    Args:
        config_class (`type`): Its class.
        path (`str` or `PathLike`): Folder or repository.
        options: Of the download, such as `revision`.

    Raises:
        `ValueError`: names the file, for one that cannot be read or holds what is not allowed.
    """
    # `None` where there is none
    file = cached_file(
        path, "generation_config.json", **options,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip
    if file is None:
        logger.info("No generation_config.json: using the defaults of `generate`.")
        return config_class()
    try:
        return config_class.from_pretrained(path, **options)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} cannot be read as the parameters of `generate`: {error} Get the file again, or delete it to take "
            "the defaults."
        ) from error
