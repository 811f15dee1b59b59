# SPDX-License-Identifier: Apache-2.0
"""No step of `generate`, and no loss that a trainer takes at masked positions, waits for the device.

The meta device has shapes and no values: what asks for values fails there. A copy from the CPU is one more way to
wait, unless it says otherwise; `RefuseWaitingCopies` sees that. Where there is a GPU, PyTorch itself tells of both.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fpmgm.models.ledger import Ledger
from fpmgm.trainers import ConsistencyTrainer, ConversionTrainer, MGMTrainer, SDTTTrainer
from tests.testing_utils import checkpoint_activations, tiny_image_model, tiny_model
from tests.trainers.training_utils import image_rows, make_trainer, training_model


DEVICE = "cuda" if torch.cuda.is_available() else "meta"


class RefuseWaitingCopies(TorchDispatchMode):
    """Fails on operators with tensors of two devices, but for copies that do not wait."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        devices = {x.device.type for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)}
        assert len(devices) < 2 or (kwargs or {}).get("non_blocking"), f"{function} waits for the device"
        return out


@contextmanager
def no_waiting() -> Iterator[None]:
    """Fails on what waits for the device; the report of `generate`, made after its last step, is left out."""
    with patch.object(Ledger, "close", lambda ledger, tokens, lengths: tokens):
        if DEVICE == "meta":
            # Autocast does not know of the meta device, not even to say that it is off.
            with (
                patch.object(torch, "is_autocast_enabled", lambda *_: False),
                patch.object(torch, "autocast", lambda *_, **__: nullcontext()),
                RefuseWaitingCopies(),
            ):
                yield
            return
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


# --- sampling -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"reuse": "none"},
        {"reuse": "full"},
        {"reuse": "3sr"},
        {"remask": 0.3, "final": "argmax"},
        {"temperature": 0.5, "top_k": 3, "top_p": 0.9},
        {"temperature": 0},
        {"freeze": True},
        {"freeze": True, "refresh_every": 2, "remask": 0.3, "reuse": "none"},
        {"input_ids": torch.tensor([[1, 10, 10, 4, 10, 10, 0, 10]])},
    ],
)
def test_a_step_on_text(arguments):
    model = tiny_model().to(DEVICE)
    with no_waiting():
        model.generate(**{"num_steps": 4, "iterations": 2, "seed": 0, **arguments})


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("order", ["halton", "random"])
def test_a_step_on_images_under_guidance(order, freeze):
    model = tiny_image_model().to(DEVICE)
    with no_waiting():
        model.generate(class_labels=[0, 2], guidance_scale=2.0, num_steps=3, iterations=2, order=order, freeze=freeze)


def test_a_choice_by_the_devices_own_numbers_waits():
    # What would make the tests above fail: the confidence order looks at probabilities, adaptive depth at residuals.
    with pytest.raises(NotImplementedError, match="meta tensor"):
        tiny_model().to("meta").generate(num_steps=2, iterations=2, order="confidence", seed=0)
    with pytest.raises(RuntimeError, match="meta tensor"):
        tiny_model().to("meta").generate(num_steps=2, iterations=2, tolerance=0.1, seed=0)


def test_an_ordinary_copy_waits():
    with pytest.raises((AssertionError, RuntimeError), match=r"waits|synchroniz"), no_waiting():
        torch.ones(2).to(DEVICE)


# --- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kept", [None, 1])
def test_a_loss_on_text(tmp_path, checkpointing, kept):
    model = training_model(dropout=0.1)
    if checkpointing:
        checkpoint_activations(model)
    check_loss(make_trainer(tmp_path, model, num_kept_iterations=kept))


@pytest.mark.parametrize("consistency_loss", ["hidden_mse", "logit_kl"])
def test_a_consistency_loss(tmp_path, consistency_loss):
    options = {"consistency_loss": consistency_loss, "stop_at_perplexity_increase": None}
    check_loss(make_trainer(tmp_path, None, ConsistencyTrainer, **options))


@pytest.mark.parametrize("trainer_class", [ConversionTrainer, SDTTTrainer])
def test_a_loss_with_a_teacher(tmp_path, trainer_class):
    check_loss(make_trainer(tmp_path, None, trainer_class, teacher=training_model(seed=1)))


def test_a_loss_on_images(tmp_path):
    model = tiny_image_model(class_dropout=0.1)
    check_loss(make_trainer(tmp_path, model, train_dataset=image_rows(4)))


def check_loss(trainer: MGMTrainer) -> None:
    """One micro-batch from the data to gradients, with nothing that waits."""
    model = trainer.model.to(DEVICE).train()
    if hasattr(trainer, "teacher"):
        trainer.teacher.to(DEVICE)
    rows = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    (inputs,), _ = trainer.get_batch_samples(iter([{name: x.to(DEVICE) for name, x in rows.items()}]), 1, DEVICE)
    with no_waiting():
        trainer.compute_loss(model, inputs).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(gradient.device.type == DEVICE for gradient in gradients)
