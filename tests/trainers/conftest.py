# SPDX-License-Identifier: Apache-2.0
"""A run that several tests of checkpoints begin from."""

from pathlib import Path

import pytest

from . import faults


@pytest.fixture(scope="session")
def straight(tmp_path_factory) -> Path:
    """A run of four steps with checkpoints at 2 and 4, for reading alone."""
    folder = tmp_path_factory.mktemp("straight")
    faults.train(folder, max_steps=4, save_steps=2)
    return folder
