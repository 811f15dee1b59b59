# SPDX-License-Identifier: Apache-2.0
"""What a measurement was made on."""

import os
import platform

import torch
import transformers

from fpmgm import __version__
from fpmgm.evaluation.provenance import commit


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


def _processor() -> str:
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()
