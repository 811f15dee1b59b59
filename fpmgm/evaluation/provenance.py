# SPDX-License-Identifier: Apache-2.0
"""Where a number comes from: command, versions, commit, device."""

import os
import platform
import re
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .store import world_size


PACKAGES = ("fpmgm", "torch", "transformers", "liger-kernel", "numpy", "scikit-learn", "mauve-text", "gguf")
CHECKOUT = Path(__file__).parents[2]


def provenance(device: str | torch.device | None = None) -> dict:
    """What a results file must say of its run: `command`, `versions`, `commit`, `device`, `processes`.

    Args:
        device (`str` or `torch.device`, *optional*): Where the models ran. `None`: the CPU.
    """
    return {
        "command": shlex.join(["python", *sys.argv]),
        "versions": {"python": platform.python_version(), **_versions()},
        "commit": commit(),
        "device": device_name(device or "cpu"),
        "processes": world_size(),
    }


def commit() -> str | None:
    """The commit of the checkout that this package is, with a plus where the package differs from it; `None` for an
    installed package."""
    if not (CHECKOUT / ".git").exists():
        return None
    git = ["git", "-C", str(CHECKOUT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "fpmgm"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def device_name(device: str | torch.device) -> str:
    """The GPU's name, or the processor's with its number of cores and threads."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def processor_name() -> str:
    """The processor's own name where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", cpuinfo.read_text(encoding="utf-8")) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
