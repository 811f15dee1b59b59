# SPDX-License-Identifier: Apache-2.0
"""Where a number comes from: command, versions, device."""

import os
import platform
import re
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .store import world_size


PACKAGES = ("fpmgm", "torch", "transformers", "numpy", "mauve-text", "gguf")


def provenance(device: str | torch.device | None = None, argv: list[str] | None = None) -> dict:
    """What a results file must say of its run: `command`, `versions`, `device`, `processes`.

    Args:
        device (`str` or `torch.device`, *optional*): Where the models ran. `None`: the CPU.
        argv (`list[str]`, *optional*): The script and its arguments. `None`: this process's own.
    """
    argv = sys.argv if argv is None else argv
    return {
        "command": shlex.join(["python", *argv]),
        "versions": {"python": platform.python_version(), **_versions()},
        "device": device_name(device or "cpu"),
        "processes": world_size(),
    }


def device_name(device: str | torch.device) -> str:
    """The GPU's name, or the processor's with its number of cores and threads."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    name = found[1] if found else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
