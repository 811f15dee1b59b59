# SPDX-License-Identifier: Apache-2.0
"""No step of `generate` waits for the device: on the meta device, which has shapes and no values, every step runs."""

from unittest.mock import patch

import pytest
import torch

from fpmgm.models.ledger import Ledger
from tests.testing_utils import tiny_image_model, tiny_model


@pytest.fixture(autouse=True)
def report_without_values():
    """The report, made after the last step, is the one place that asks for values."""
    with patch.object(Ledger, "close", lambda ledger, tokens: tokens):
        yield


@pytest.mark.parametrize(
    "arguments",
    [
        {"reuse": "none"},
        {"reuse": "full"},
        {"reuse": "3sr"},
        {"reuse": "3sr", "skip_idle_steps": True},
        {"remask": 0.3, "final": "argmax"},
        {"temperature": 0.5, "top_k": 3, "top_p": 0.9},
        {"temperature": 0},
        {"input_ids": torch.tensor([[1, 10, 10, 4, 10, 10, 0, 10]])},
    ],
)
def test_a_step_on_text(arguments):
    tokens = tiny_model().to("meta").generate(**{"num_steps": 4, "iterations": 2, "seed": 0, **arguments})
    assert tokens.is_meta


@pytest.mark.parametrize("order", ["halton", "random"])
def test_a_step_on_images_under_guidance(order):
    model = tiny_image_model().to("meta")
    assert model.generate(class_labels=[0, 2], guidance_scale=2.0, num_steps=3, iterations=2, order=order).is_meta


def test_a_choice_by_the_devices_own_numbers_waits():
    # What would make the tests above fail: the confidence order looks at probabilities, adaptive depth at residuals.
    with pytest.raises(NotImplementedError, match="meta tensor"):
        tiny_model().to("meta").generate(num_steps=2, iterations=2, order="confidence", seed=0)
    with pytest.raises(RuntimeError, match="meta tensor"):
        tiny_model().to("meta").generate(num_steps=2, iterations=2, tolerance=0.1, seed=0)
