# SPDX-License-Identifier: Apache-2.0
"""What a measurement was made on."""

import torch
import transformers

from fpmgm import __version__
from fpmgm.evaluation.provenance import commit, processor_name


def machine(device: str = "cpu") -> dict:
    """Device, versions and commit, for a results file."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "processor": processor_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "fpmgm": __version__,
        "commit": commit(),
    }
