# SPDX-License-Identifier: Apache-2.0
import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the same numbers with and without a GPU
os.environ.setdefault("MKL_CBWR", "AVX2,STRICT")  # and wherever weights lie in memory

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
