# SPDX-License-Identifier: Apache-2.0
"""lm-eval's command line with the model `fpmgm`, also installed as `fpmgm-eval`.

python -m fpmgm.evaluation.lm_eval --model_args pretrained=FOLDER,protocol=pgm --tasks arc_easy --output_path out
accelerate launch -m fpmgm.evaluation.lm_eval --model_args pretrained=FOLDER --tasks arc_easy
"""

import io
import sys

import torch
from lm_eval import utils
from lm_eval.__main__ import cli_evaluate

from .adapter import DEFAULT_BATCH_SIZE
from .table import make_table


def with_defaults(arguments: list[str]) -> list[str]:
    """lm-eval's `arguments` with this command's model and batch size before the user's own, which win.

    Other subcommands than `run` stay as they are, and so do runs that a `--config` file describes.

    >>> with_defaults(["run", "--tasks", "piqa"])
    ['run', '--model', 'fpmgm', '--batch_size', '64', '--tasks', 'piqa']
    """
    options = arguments[1:] if arguments[:1] == ["run"] else arguments
    described = any(option.split("=")[0] in ("--config", "-C", "--help", "-h") for option in options)
    if not options or not options[0].startswith("-") or described:
        return arguments
    return ["run", "--model", "fpmgm", "--batch_size", str(DEFAULT_BATCH_SIZE), *options]


def main() -> None:
    """Run lm-eval."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that lacks the table's arrows is no reason to stop
            stream.reconfigure(errors="replace")
    sys.argv[1:] = with_defaults(sys.argv[1:])
    utils.make_table = make_table
    try:
        cli_evaluate()
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
