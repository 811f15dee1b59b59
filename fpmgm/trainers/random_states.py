# SPDX-License-Identifier: Apache-2.0
"""The states of the global random numbers that a training draws from."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def get_random_states() -> tuple:
    """Of Python's, NumPy's and PyTorch's global generators, and of this process's GPU."""
    gpu = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), gpu


def set_random_states(states: tuple) -> None:
    """Set what [`get_random_states`] gave."""
    python, numpy, cpu, gpu = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if gpu is not None:
        torch.cuda.set_rng_state(gpu)


@contextmanager
def kept_random_states() -> Iterator[None]:
    """After the block the states are what they were before it."""
    states = get_random_states()
    try:
        yield
    finally:
        set_random_states(states)
