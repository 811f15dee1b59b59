# SPDX-License-Identifier: Apache-2.0
"""Exponential moving average of the weights, as a callback: updated after each optimizer step, saved with each
checkpoint, and lent to the model for evaluation and export."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback


EMA_FILE = "ema.safetensors"


class EMACallback(TrainerCallback):
    """Keeps s ← d_n·s + (1 − d_n)·w with d_n = min(`decay`, (1 + n)/(10 + n)) after the n-th update, in float32.

    Args:
        model (`nn.Module`): The model, unwrapped; its trainable parameters are averaged.
        decay (`float`): Limit of the decay, in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = model
        self.decay = decay
        self.num_updates = 0
        self.shadow: dict[str, torch.Tensor] | None = None  # None: training has not begun

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def start(self) -> None:
        """Begin from the current weights."""
        self.num_updates = 0
        self.shadow = {name: p.detach().float().clone() for name, p in self._parameters().items()}

    @torch.no_grad()
    def update(self) -> None:
        """One step of the average."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        weights = [p.detach().float() for p in self._parameters().values()]
        torch._foreach_lerp_(list(self.shadow.values()), weights, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model holds the average inside the block and its own weights again afterwards."""
        if self.shadow is None:
            yield
            return
        parameters = self._parameters()
        own = {name: p.detach().clone() for name, p in parameters.items()}
        _copy(parameters, self.shadow)
        try:
            yield
        finally:
            _copy(parameters, own)

    def save(self, folder: str | Path) -> None:
        """Write the average to `folder`."""
        metadata = {"num_updates": str(self.num_updates), "decay": str(self.decay)}
        tensors = {name: tensor.contiguous() for name, tensor in self.shadow.items()}
        save_file(tensors, Path(folder) / EMA_FILE, metadata=metadata)

    def load(self, folder: str | Path) -> None:
        """Go on from the average in `folder`.

        Raises:
            `ValueError`: if `folder` holds none.
        """
        path = Path(folder) / EMA_FILE
        if not path.is_file():
            raise ValueError(
                f"`resume_from_checkpoint`={str(folder)!r} holds no {EMA_FILE}: it was trained without EMA. "
                "Resume from another checkpoint or with `ema_decay=None`."
            )
        with safe_open(path, framework="pt") as file:
            self.num_updates = int(file.metadata()["num_updates"])
            parameters = self._parameters()
            self.shadow = {name: file.get_tensor(name).to(p.device) for name, p in parameters.items()}

    # --- events -------------------------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0 or self.shadow is None:
            self.start()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.update()


@torch.no_grad()
def _copy(parameters: dict[str, nn.Parameter], values: dict[str, torch.Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])
