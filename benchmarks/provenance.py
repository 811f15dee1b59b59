# SPDX-License-Identifier: Apache-2.0
"""What a measurement was made on."""

import os
import platform
import subprocess

import torch
import transformers

from fpmgm import __version__


def machine(device: str = "cpu") -> dict:
    """Device, versions and commit, for a results file."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "processor": _processor(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "fpmgm": __version__,
        "commit": commit(),
    }


def commit() -> str:
    """The commit measured, with a plus where the package differs from it."""
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run(["git", "status", "--porcelain", "fpmgm"], capture_output=True, text=True).stdout.strip()
    return head + ("+" if changed else "")


def _processor() -> str:
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()
