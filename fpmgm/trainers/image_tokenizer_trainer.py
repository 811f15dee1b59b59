# SPDX-License-Identifier: Apache-2.0
"""Training of an image tokenizer: reconstruction and codebook losses, and codes that nothing uses brought back.

Shapes: B batch, K codebook size, E codebook dimension.
"""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import TrainingArguments

from ..models.arguments import check_whole
from ..models.noise import stream_generator
from ..models.transfer import to_device
from .checkpoints import reading
from .checks import check_pixels
from .options import REFUSED, check_arguments, check_options, paths_as_text
from .rows import CheckedRowsTrainer


@dataclass
class ImageTokenizerConfig(TrainingArguments):
    r"""
    Arguments of [`ImageTokenizerTrainer`], beside those of `TrainingArguments`.

    Defaults that differ from `TrainingArguments`: `learning_rate=1e-3`, `lr_scheduler_type="cosine"`,
    `warmup_steps=50`, `remove_unused_columns=False` (a dataset may make pixels of its other columns; what else is in
    a row is dropped all the same). `dataloader_pin_memory` is off on a CPU.

    Args:
        mirror (`bool`, defaults to `False`): Whether half of the pictures of a training step are mirrored. The draws
            follow from its number, so that a resumed run draws the same.
        restart_every (`int`, defaults to 50): Steps after which the codes that no latent was nearest to in them take
            the place of random latents of the last batch. 0: never.
        ignore_data_change (`bool`, defaults to `False`): Whether a run may go on from a checkpoint with other data
            than it was made with, which is an error otherwise.

    Raises:
        `ValueError`: on a value that is not allowed.
    """

    learning_rate: float = 1e-3
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 50
    remove_unused_columns: bool = False

    mirror: bool = False
    restart_every: int = 50
    ignore_data_change: bool = False

    def __post_init__(self):
        check_whole("restart_every", self.restart_every, minimum=0, unit="steps")
        paths_as_text(self)
        super().__post_init__()
        check_options(self, REFUSED)
        self.dataloader_pin_memory &= self.device.type != "cpu"


class ImageTokenizerTrainer(CheckedRowsTrainer):
    """Trains a tokenizer of `fpmgm.models` on rows with `pixel_values` (3, S, S) in [-1, 1].

    Logs `codebook_usage`, the share of codes that the latents of the steps since the last restart used, and evaluates
    `psnr` (mean over pictures, dB, of clamped pixels), `codebook_usage` and `codebook_perplexity` (exp of the entropy
    of the codes; at most K). A resumed run equals the uninterrupted one bit for bit.

    Args:
        model (`nn.Module`): The tokenizer.
        args ([`ImageTokenizerConfig`], *optional*): Arguments. `None`: the defaults.
        kwargs: As for `transformers.Trainer`. `compute_metrics` gets reconstructions as predictions, and pictures as
            labels.

    Raises:
        `ValueError`: for an argument that would be ignored; while training and evaluating, for a row that is no
            picture of the tokenizer's size in [-1, 1], with its number.
    """

    columns = ("pixel_values",)

    def __init__(self, model: nn.Module, args: ImageTokenizerConfig | None = None, **kwargs):
        args = ImageTokenizerConfig() if args is None else args
        check_arguments(self, args, ImageTokenizerConfig, kwargs)
        if not hasattr(model, "codebook"):
            raise ValueError(
                f"`model`={model!r:.60} is no image tokenizer: give a `VQGANModel` or an `XQGANModel`, or what "
                "`fpmgm.conversion.load_image_tokenizer` reads of a folder."
            )
        super().__init__(model, args, **kwargs)
        self._used: torch.Tensor | None = None  # (K,) uses of each code since the last restart
        self._latents: torch.Tensor | None = None  # (…, E) of the last micro-batch
        self._restarted_at = 0
        self._step, self._micro_batch = -1, 0
        self._shares = [1.0]  # of each micro-batch of an optimizer step, in units of their mean size

    def batch_check(self):
        """See [`check_pixels`]."""
        return partial(check_pixels, size=self._tokenizer.image_size)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one optimizer step, of which the last of the data may be smaller."""
        samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        sizes = [len(batch["pixel_values"]) for batch in samples]
        self._shares = [size * len(sizes) / sum(sizes) for size in sizes]
        return samples, num_items

    def training_step(self, model, inputs, num_items_in_batch=None):
        """As in `Trainer`; first the dead codes are restarted, where it is time."""
        step, every = self.state.global_step, self.args.restart_every
        self._micro_batch = self._micro_batch + 1 if step == self._step else 0
        self._step = step
        if every and step % every == 0 and step != self._restarted_at:
            self._restart()
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The tokenizer's own loss, in training such that micro-batches add up to the mean over all pictures of the
        optimizer step; its codes are counted."""
        pixels = inputs["pixel_values"]
        output = model(self._mirror(pixels) if self.args.mirror and model.training else pixels)
        if model.training:
            counts = output.codes.flatten().bincount(minlength=self._tokenizer.codebook_size)
            self._used = counts if self._used is None else self._used + counts
            self._latents = output.latents.detach().flatten(0, -2)
        loss = output.loss * self._shares[self._micro_batch] if model.training else output.loss
        return (loss, output) if return_outputs else loss

    def _mirror(self, pixels: torch.Tensor) -> torch.Tensor:
        """Half of the pictures (B, 3, S, S), on average, by a stream of this step, micro-batch and rank."""
        key = (self.args.seed, "mirror", self._step, self._micro_batch, self.args.process_index)
        chosen = torch.rand(len(pixels), generator=stream_generator(*key)) < 0.5
        return torch.where(to_device(chosen, pixels.device)[:, None, None, None], pixels.flip(-1), pixels)

    @property
    def _tokenizer(self):
        return self.accelerator.unwrap_model(self.model)

    @torch.no_grad()
    def _restart(self) -> None:
        """Put codes without a use at random latents of the last batch, the same on every rank."""
        used = self.accelerator.reduce(self._used)
        dead = (used == 0).nonzero().squeeze(1)
        latents = self.accelerator.gather(self._latents)  # (…, E)
        generator = stream_generator(self.args.seed, "restart", self.state.global_step)
        chosen = torch.randint(len(latents), (len(dead),), generator=generator).to(latents.device)
        self._tokenizer.codebook[dead] = latents[chosen].to(self._tokenizer.codebook.dtype)
        self._used, self._restarted_at = None, self.state.global_step

    def forget_steps(self) -> None:
        """Also the uses of the codes."""
        super().forget_steps()
        self._used, self._latents, self._restarted_at, self._step = None, None, 0, -1

    @torch.no_grad()
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `Trainer`. The codebook is written on the unit sphere; a checkpoint (an internal call) leaves that of
        the training where it is, so that what is learned does not depend on when it is saved."""
        own = self._tokenizer.codebook.clone()
        super().save_model(output_dir, _internal_call)
        if _internal_call:
            self._tokenizer.codebook.copy_(own)

    def save_beside(self, folder: Path) -> None:
        """Also the codebook as it is, and what the next restart needs of this rank."""
        super().save_beside(folder)
        state = {"used": self._used, "latents": self._latents, "codebook": self._tokenizer.codebook.detach()}
        save_file({name: value.contiguous() for name, value in state.items()}, self._restart_file(folder))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            with reading(checkpoint, "the use of the codes by this process"):
                state = load_file(self._restart_file(Path(checkpoint)))  # it does not know a process's `cpu:0`
                self._used, self._latents = (state[name].to(self.args.device) for name in ("used", "latents"))
                if "codebook" in state:  # not in an earlier version's
                    self._tokenizer.codebook.data.copy_(state["codebook"])

    def _restart_file(self, folder: Path) -> Path:
        return folder / f"restart_{self.args.process_index}.safetensors"

    def log(self, logs, start_time=None):
        """Add the share of codes in use."""
        if "loss" in logs and self._used is not None:
            logs["codebook_usage"] = (self.accelerator.reduce(self._used) > 0).float().mean().item()
        super().log(logs, start_time)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss of a batch, and unless `prediction_loss_only` its reconstructions and pictures; its codes and the
        quality of its pictures are added up."""
        pixels = self._prepare_inputs(inputs)["pixel_values"]
        with torch.no_grad(), self.compute_loss_context_manager():
            output = model(pixels)
        _, fresh = self.rows_of_batch(len(pixels))
        fresh = to_device(fresh, pixels.device)
        self._codes += output.codes[fresh].flatten().bincount(minlength=len(self._codes))
        self._quality += torch.stack([psnr(output.pixel_values, pixels)[fresh].sum(), fresh.sum()]).double()
        wanted = (None, None) if prediction_loss_only else (output.pixel_values, pixels)
        return output.loss.detach(), *wanted

    def evaluation_loop(self, dataloader, *args, metric_key_prefix="eval", **kwargs):
        """As in `Trainer`, with the quality of the reconstructions and the use of the codebook."""
        self.start_evaluation(dataloader.dataset)
        self._codes = torch.zeros(self._tokenizer.codebook_size, dtype=torch.long, device=self.args.device)
        self._quality = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        total, count = self.accelerator.reduce(self._quality).tolist()
        counts = self.accelerator.reduce(self._codes)
        output.metrics[f"{metric_key_prefix}_psnr"] = total / max(count, 1)
        output.metrics[f"{metric_key_prefix}_codebook_usage"] = (counts > 0).float().mean().item()
        output.metrics[f"{metric_key_prefix}_codebook_perplexity"] = codebook_perplexity(counts)
        return output


def psnr(images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(B,) peak signal-to-noise ratio in dB of `images` (B, …), clamped to [-1, 1], to `targets` in [-1, 1].

    >>> psnr(torch.zeros(1, 4), torch.full((1, 4), 0.2)).round(decimals=3).tolist()
    [20.0]
    """
    error = F.mse_loss(images.clamp(-1, 1).float(), targets.float(), reduction="none").flatten(1).mean(dim=1)
    return 10 * torch.log10(4 / error)  # the peak is 2


def codebook_perplexity(counts: torch.Tensor) -> float:
    """exp of the entropy of codes that occur `counts` (K,) times.

    >>> round(codebook_perplexity(torch.tensor([5, 5, 5, 5, 0])), 6)
    4.0
    """
    shares = counts[counts > 0].double() / counts.sum()
    return math.exp(-(shares * shares.log()).sum())
