# SPDX-License-Identifier: Apache-2.0
"""Peak memory in a process of its own."""

from functools import partial

import torch

from fpmgm.analysis.measured import peak_in_subprocess


def prepared(kept: int, used: int):
    """Holds `kept` bytes, and returns what takes `used` more twice, one after the other."""
    held = torch.ones(kept // 4)
    return lambda: [torch.ones(used // 4).sum() + held[0] for _ in range(2)]


def test_what_was_prepared_does_not_count():
    assert 100_000 <= peak_in_subprocess(partial(prepared, 1_000_000, 100_000)) < 200_000
