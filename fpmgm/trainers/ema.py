# SPDX-License-Identifier: Apache-2.0
"""Exponential moving average of the weights, as a callback: updated after each optimizer step, saved with each
checkpoint, and lent to the model for evaluation and export. Each rank averages what it holds of the weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback

from .shards import forget_gathered, part_from, part_of, whole_from


EMA_FILE = "ema.safetensors"


class EMACallback(TrainerCallback):
    """Keeps s ← d_n·s + (1 − d_n)·w with d_n = min(`decay`, (1 + n)/(10 + n)) after the n-th update, in float32.

    Where an engine splits the weights over ranks (ZeRO-3, FSDP2), each rank averages its part; the file is whole.

    Args:
        model (`nn.Module`): The model, unwrapped; its trainable parameters are averaged.
        decay (`float`): Limit of the decay, in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = model
        self.decay = decay
        self.num_updates = 0
        self.shadow: dict[str, torch.Tensor] | None = None  # this rank's parts; None: training has not begun

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def start(self) -> None:
        """Begin from the current weights."""
        self.num_updates = 0
        self.shadow = {name: part_of(p).float().clone() for name, p in self._parameters().items()}

    @torch.no_grad()
    def update(self) -> None:
        """One step of the average."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        weights = [part_of(p).float() for p in self._parameters().values()]
        torch._foreach_lerp_(list(self.shadow.values()), weights, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model holds the average inside the block and its own weights again afterwards."""
        if self.shadow is None:
            yield
            return
        forget_gathered(self.model)
        with torch.no_grad():
            own = {name: part_of(p).clone() for name, p in self._parameters().items()}
        self._set_weights(self.shadow)
        try:
            yield
        finally:
            forget_gathered(self.model)
            self._set_weights(own)

    @torch.no_grad()
    def _set_weights(self, parts: dict[str, torch.Tensor]) -> None:
        for name, parameter in self._parameters().items():
            part_of(parameter).copy_(parts[name])

    def save(self, folder: str | Path, write: bool = True) -> None:
        """Write the average to `folder`, whole. Every rank must call it; one without `write` only lends its part."""
        tensors = {}
        for name, parameter in self._parameters().items():
            whole = whole_from(self.shadow[name], parameter)
            if write:
                tensors[name] = whole.cpu().contiguous()
        if write:
            metadata = {"num_updates": str(self.num_updates), "decay": str(self.decay)}
            save_file(tensors, Path(folder) / EMA_FILE, metadata=metadata)

    def load(self, folder: str | Path) -> None:
        """Go on from the average in `folder`.

        Raises:
            `ValueError`: if `folder` holds none, or one of other weights, or one that is not finite.
        """
        path = Path(folder) / EMA_FILE
        if not path.is_file():
            raise ValueError("there is none, it was trained without EMA: with `ema_decay=None` it can go on")
        with safe_open(path, framework="pt") as file:
            parameters, names = self._parameters(), set(file.keys())
            if names != parameters.keys():
                raise ValueError(
                    f"an average of the trained weights is expected, {min(names ^ parameters.keys())} differs"
                )
            self.num_updates = int(file.metadata()["num_updates"])
            self.shadow = {name: part_from(_read(file, name, p), p) for name, p in parameters.items()}

    # --- events -------------------------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0 or self.shadow is None:
            self.start()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.update()


def _read(file, name: str, parameter: nn.Parameter) -> torch.Tensor:
    tensor, shape = file.get_tensor(name), getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 may have split it
    if tensor.shape != shape:
        raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, not {tuple(shape)}")
    if not tensor.isfinite().all():
        raise ValueError(f"values that are not finite in {name}")
    return tensor
