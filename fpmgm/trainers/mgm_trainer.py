# SPDX-License-Identifier: Apache-2.0
"""The base trainer: masked cross-entropy with stochastic Jacobian-free backpropagation (Sections 3.1 and 3.2).

All noise is drawn from (seed, optimizer step, place of the sequence in the global batch): it depends neither on how
the batch is split over ranks and micro-batches, nor on evaluations, nor on an interruption.

Shapes: B batch of one micro-batch, L length.
"""

import math
import time
from collections import defaultdict
from collections.abc import Sized
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers.utils import ModelOutput, logging

from ..models.noise import antithetic_times, mask_uniforms, sequential_times, stream_generator
from .atomic_trainer import AtomicCheckpointTrainer
from .batch import GlobalBatch, Noise, place
from .checkpoints import reading
from .collator import stack_and_pad
from .corruption import CORRUPTIONS, NoisedBatch, check_loss, drop_classes, maskable, noised
from .ema import EMA_FILE, EMACallback
from .engines import check_engine, compile_blocks, skips_bad_steps
from .mgm_config import MGMTrainingConfig
from .model_card import write_model_card
from .peft import with_adapter


logger = logging.get_logger(__name__)

GROWING_RESIDUAL = 1e-3  # below this relative residual the solver has converged, whatever the last ratio


class MGMTrainer(AtomicCheckpointTrainer):
    """Trains a masked generative model on a dataset that yields `input_ids` (and `attention_mask` where padded, or
    `class_labels` of images).

    Args:
        model (`PreTrainedModel`): A model of this library, also one loaded as remote code or wrapped by PEFT.
        args ([`MGMTrainingConfig`]): Arguments.
        train_dataset, eval_dataset (`Dataset`, *optional*): Rows with `input_ids` of at most the model's length.
        processing_class (`PreTrainedTokenizerBase`, *optional*): Saved beside the model.
        peft_config (`peft.PeftConfig`, *optional*): Train this adapter on the frozen model, average it and export it.
            `None`: train what `model` leaves trainable.
        kwargs: Passed to `transformers.Trainer`.

    Raises:
        `ValueError`: if the model is of another architecture, holds weights that are not finite, or has an adapter
            already where there is a `peft_config`; if DeepSpeed or FSDP is set such that nothing could be exported.
        `FloatingPointError`: when the loss or its gradient is not finite, after saving a checkpoint of the last good
            step.
        `OSError`: when a checkpoint cannot be written, say to a full disk. Those written before are left intact.

    Example:

    ```python
    >>> from fpmgm import FPMDLMConfig, FPMDLMForMaskedDiffusion
    >>> from fpmgm.trainers import MGMTrainer, MGMTrainingConfig
    >>> model = FPMDLMForMaskedDiffusion(FPMDLMConfig())  # doctest: +SKIP
    >>> args = MGMTrainingConfig(output_dir="outputs/owt", max_steps=1000)  # doctest: +SKIP
    >>> MGMTrainer(model=model, args=args, train_dataset=blocks).train()  # doctest: +SKIP

    ```
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by the positions of the whole optimizer step

    def __init__(
        self,
        model: nn.Module,
        args: MGMTrainingConfig,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class=None,
        peft_config=None,
        **kwargs,
    ):
        check_model(model)
        self.corruption = CORRUPTIONS[model.config.model_type]
        check_loss(args, model.config.model_type)
        model = with_adapter(model, peft_config)
        kwargs.setdefault("data_collator", stack_and_pad)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        check_engine(self)
        compile_blocks(self)
        self.ema = None
        if args.ema_decay is not None:
            self.ema = EMACallback(self.model, args.ema_decay)
            self.add_callback(self.ema)
        self._global_batch: GlobalBatch | None = None
        self._micro_batch = 0
        self._metrics: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._clock, self._tokens = time.perf_counter(), 0

    # --- the training step --------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one optimizer step, and their place among those of all ranks."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._global_batch = place(samples, (self.args.seed, "train", self.state.global_step), self.accelerator)
        self._micro_batch = 0
        self._tokens += self._global_batch.positions
        return samples, None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of one micro-batch, scaled so that micro-batches add up and ranks average to the global batch's."""
        noise = self._draw(inputs)
        self._micro_batch += 1
        loss, output = self.micro_batch_loss(model, drop_classes(inputs, noise, self.model.config), noise)
        self._record_output(output)
        return (loss, output) if return_outputs else loss

    def micro_batch_loss(self, model, batch: dict, noise: Noise) -> tuple[torch.Tensor, ModelOutput]:
        """This micro-batch's part of the loss, Σ w(t)·(−log p(x)) over masked positions / all positions of the
        optimizer step, and the model's output."""
        # 1. hide
        masked = maskable(batch) & (noise.uniforms < self.corruption.masked_probability(noise.t)[:, None])
        state = self.noised(batch, masked, noise.t)
        # 2. predict
        output = model(**state.supervised(), **noise.iterations, num_items_in_batch=noise.num_items)
        return output.loss, output

    def noised(self, batch: dict, masked: torch.Tensor, t: torch.Tensor) -> NoisedBatch:
        """`batch` hidden at `masked` (B, L), weighted as in training."""
        weights = self.corruption.weight(self.args.loss_weighting)(t)
        return noised(batch, masked, t, weights, self.model.config.mask_token_id)

    def _draw(self, inputs: dict[str, torch.Tensor]) -> Noise:
        """The noise that belongs to the places of a micro-batch's sequences in the global batch."""
        batch, ranks = self._global_batch, self.accelerator.num_processes
        size, length = inputs["input_ids"].shape
        places = batch.offsets[self._micro_batch] + torch.arange(size)
        shift = torch.rand((), generator=stream_generator(*batch.key, "shift")).item()
        no_grad, grad = self.draw_iterations()
        return Noise(
            key=batch.key,
            places=places,
            t=antithetic_times(shift, places, batch.total, self.corruption.time),
            uniforms=self._uniforms(batch.key, places, length),
            iterations={
                "num_no_grad_iterations": no_grad,
                "num_iterations": grad,
                "num_kept_iterations": self.args.num_kept_iterations,
            },
            num_items=batch.positions / ranks,
            num_sequences=batch.total / ranks,
        )

    def _uniforms(self, key: tuple, places: torch.Tensor, length: int) -> torch.Tensor:
        """(B, L): a sequence's stream is as long as the model's longest, so that padding does not change it."""
        longest = max(length, self.model.config.max_position_embeddings)
        return mask_uniforms(longest, *((*key, j) for j in places.tolist()))[:, :length]

    def draw_iterations(self) -> tuple[int, int]:
        """N without and with gradient for this optimizer step, the same on every rank and micro-batch."""
        config = self.model.config
        if config.num_fixed_point_layers == 0:
            return 0, 0
        generator = stream_generator(self.args.seed, "iterations", self.state.global_step)
        ranges = (config.no_grad_iterations, config.grad_iterations)
        return tuple(int(torch.randint(low, high + 1, (), generator=generator)) for low, high in ranges)

    def _get_grad_norm(self, model, grad_norm=None):
        """As in `Trainer`, but a gradient that is not finite ends the run before the optimizer sees it.

        A loss that is not finite on any rank shows here on all of them.
        """
        grad_norm = super()._get_grad_norm(model, grad_norm)
        # Float16 skips steps whose gradient overflows by itself, but not for ever: there the loss tells.
        if not math.isfinite(self.accelerator.gather(self._tr_loss).sum() if skips_bad_steps(self) else grad_norm):
            self._stop_on_bad_gradient(model)
        return grad_norm

    def _stop_on_bad_gradient(self, model) -> None:
        step, unsaved = self.state.global_step, None
        bad = torch.tensor([len(not_finite(self.model))], device=self.args.device)  # of this rank's part
        if step > 0 and self.accelerator.gather(bad).sum() == 0:
            try:
                self._save_checkpoint(model, trial=None)
                self.callback_handler.on_save(self.args, self.state, self.control)
            except OSError as error:
                unsaved = error
        saved = "Step {} is saved in {}.".format(*self.last_saved) if self.last_saved else "No step is saved."
        raise FloatingPointError(
            f"the loss or its gradient is not finite at step {step + 1}. {saved} Lower `learning_rate`, keep "
            "`max_grad_norm` at 1, or use `input_injection='diagonal'`, whose fixed point is stable for any weights."
        ) from unsaved

    # --- evaluation ---------------------------------------------------------------------------------------------

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss of a batch under noise that belongs to its rows, however they are split into batches and ranks."""
        inputs = self._prepare_inputs(inputs)
        size, length = inputs["input_ids"].shape
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        rows = (self._eval_batch * ranks + rank) * self.args.eval_batch_size + torch.arange(size)
        self._eval_batch += 1
        key = (self.args.seed, "eval")
        shift = torch.rand((), generator=stream_generator(*key, "shift")).item()
        uniforms = self._uniforms(key, rows, length)
        t = sequential_times(shift, rows, self.corruption.time)
        masked = maskable(inputs) & (uniforms < self.corruption.masked_probability(t)[:, None])
        fresh = rows < self._eval_rows  # accelerate fills the last batch with rows that were evaluated already
        weights = self.corruption.weight(None)(t) * fresh
        state = noised(inputs, masked, t, weights, self.model.config.mask_token_id)
        with torch.no_grad(), self.compute_loss_context_manager():
            total = model(**state.supervised(), num_items_in_batch=1).loss.detach()
        self._eval_totals[0] += total.double()
        self._eval_totals[1] += int(maskable(inputs)[fresh].sum())
        return total, None, None

    def evaluation_loop(self, dataloader, *args, metric_key_prefix="eval", **kwargs):
        """Evaluate the EMA weights: text by the negative ELBO per real token, images by the cross-entropy per masked
        token; and its exponential, of text a bound of the perplexity."""
        start, dataset = time.perf_counter(), dataloader.dataset
        self._eval_batch = 0
        self._eval_rows = len(dataset) if isinstance(dataset, Sized) else math.inf
        self._eval_totals = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        with self._averaged():
            output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        total, positions = self.accelerator.reduce(self._eval_totals).tolist()
        if positions > 0:
            output.metrics[f"{metric_key_prefix}_loss"] = total / positions
            output.metrics[f"{metric_key_prefix}_perplexity"] = math.exp(min(total / positions, 700))
        self._clock += time.perf_counter() - start
        return output

    # --- logs ---------------------------------------------------------------------------------------------------

    def log(self, logs, start_time=None):
        """Add the means since the last log line, over ranks: accuracy, residual, iterations, state norm, tokens/s."""
        if "loss" in logs and self._metrics:
            means = {name: torch.stack(values).mean() for name, values in sorted(self._metrics.items())}
            gathered = self.accelerator.gather(torch.stack(list(means.values())).unsqueeze(0)).mean(dim=0)
            logs.update({name: value.item() for name, value in zip(means, gathered, strict=True)})
            logs["tokens_per_second"] = round(self._tokens / (time.perf_counter() - self._clock), 1)
            self._metrics.clear()
            self._warn_if_growing(logs)
            self._clock, self._tokens = time.perf_counter(), 0
        super().log(logs, start_time)

    def record(self, **values: torch.Tensor) -> None:
        """Note scalars, whose means the next log line shows."""
        for name, value in values.items():
            self._metrics[name].append(value.detach())

    def since_log(self) -> dict[str, list[torch.Tensor]]:
        """Also the values whose means the line adds."""
        return super().since_log() | {f"mean.{name}": list(values) for name, values in self._metrics.items()}

    def go_on_since_log(self, collected: dict[str, list[torch.Tensor]]) -> None:
        """Also with the values whose means the line adds."""
        super().go_on_since_log(collected)
        means = {name: values for name, values in collected.items() if name.startswith("mean.")}
        self._metrics.update({name.removeprefix("mean."): values for name, values in means.items()})

    def forget_steps(self) -> None:
        """Also the values whose means the line adds."""
        super().forget_steps()
        self._metrics.clear()
        self._clock, self._tokens = time.perf_counter(), 0

    @torch.no_grad()
    def _record_output(self, output: ModelOutput) -> None:
        if output.masked_accuracy is not None:
            self.record(masked_accuracy=output.masked_accuracy)
        if output.residuals is not None:
            residuals = output.residuals.mean(dim=1)  # (N,)
            self.record(
                residual=residuals[-1],
                residual_ratio=residuals[-1] / residuals[max(len(residuals) - 2, 0)].clamp(min=1e-12),
                iterations=residuals.new_full((), len(residuals)),
                state_norm=output.fixed_point_state.float().square().mean().sqrt(),
            )

    def _warn_if_growing(self, logs: dict[str, float]) -> None:
        residual, ratio = logs.get("residual", 0), logs.get("residual_ratio", 0)
        if residual > 1 or (ratio >= 1 and residual > GROWING_RESIDUAL):
            logger.warning_once(
                "The residual does not fall over the solver's iterations (see `residual` and `residual_ratio` in the "
                "log): F is no contraction and its fixed point is not reached. Lower `learning_rate`, or use "
                "`input_injection='diagonal'`."
            )

    # --- checkpoints and export ---------------------------------------------------------------------------------

    def _averaged(self) -> AbstractContextManager:
        return self.ema.applied() if self.ema is not None else nullcontext()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Export the EMA weights; a checkpoint (an internal call) holds the raw weights, with the EMA beside them."""
        if _internal_call:
            super().save_model(output_dir, _internal_call)
            return
        with self._averaged():
            super().save_model(output_dir)
        if self.is_world_process_zero():
            write_model_card(output_dir or self.args.output_dir, self.model, self.args, self.state.global_step)

    def push_to_hub(self, *args, **kwargs):
        """Export the EMA weights and their card to the hub."""
        with self._averaged():
            return super().push_to_hub(*args, **kwargs)

    def create_model_card(self, **kwargs) -> None:
        """Write the card, filled with what this run knows."""
        if self.is_world_process_zero():
            write_model_card(self.args.output_dir, self.model, self.args, self.state.global_step)

    def save_beside(self, folder: Path) -> None:
        """Also the EMA."""
        super().save_beside(folder)
        if self.ema is not None:
            self.ema.save(folder, write=self.args.should_save)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.ema is not None:
            with reading(checkpoint, EMA_FILE):
                self.ema.load(checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.ema is not None:
            with reading(self.state.best_model_checkpoint, EMA_FILE):
                self.ema.load(self.state.best_model_checkpoint)


def check_model(model: nn.Module) -> None:
    """Raise a `ValueError` for a model of another architecture or with weights that are not finite."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in CORRUPTIONS:
        raise ValueError(
            f"`model` is of `model_type`={model_type!r}, but must be one of {tuple(CORRUPTIONS)}: see `FPMDLMConfig` "
            "and `FPMaskGITConfig`."
        )
    bad = not_finite(model)
    if bad:
        raise ValueError(f"`model` has weights that are not finite: {bad}. Start from another checkpoint.")


def not_finite(model: nn.Module) -> list[str]:
    """Names of the parameters that are not finite."""
    return [name for name, p in model.named_parameters() if not p.is_meta and not p.isfinite().all()]
