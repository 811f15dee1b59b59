# SPDX-License-Identifier: Apache-2.0
"""Tiny models and data that the tests share."""

import os
from pathlib import Path

import pytest
import torch

from fpmgm import FPMDLMConfig, FPMDLMForMaskedDiffusion


SHARED = Path(os.environ.get("FPMGM_SHARED", Path(__file__).parents[2] / "shared"))

needs_shared = pytest.mark.skipif(
    not (SHARED / "parity").is_dir(), reason="needs the fixtures of the original implementations (FPMGM_SHARED)"
)


def tiny_config(**overrides) -> FPMDLMConfig:
    """A configuration of a few hundred weights; vocabulary 11 with mask id 10, length 8."""
    defaults = {
        "vocab_size": 11,
        "mask_token_id": 10,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "conditioning_size": 8,
        "max_position_embeddings": 8,
        "dropout": 0.0,
    }
    return FPMDLMConfig(**{**defaults, **overrides})


def tiny_model(seed: int = 0, scale: float = 0.3, **overrides) -> FPMDLMForMaskedDiffusion:
    """A model whose every weight is drawn at random (a fresh one is the identity under a zero head), in evaluation.

    The same seed gives the same weights, and the global generator is left alone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FPMDLMForMaskedDiffusion(tiny_config(**overrides))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(scale * torch.randn(parameter.shape))
    return model.eval()
