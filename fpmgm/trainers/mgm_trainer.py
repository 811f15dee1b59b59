# SPDX-License-Identifier: Apache-2.0
"""The base trainer: masked cross-entropy with stochastic Jacobian-free backpropagation (Sections 3.1 and 3.2).

All noise is drawn from (seed, optimizer step, place of the sequence in the global batch): it depends neither on how
the batch is split over ranks and micro-batches, nor on evaluations, nor on an interruption.

Shapes: B batch of one micro-batch, L length.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer
from transformers.utils import ModelOutput, logging

from ..models.head import forbid
from ..models.kinds import KINDS
from ..models.noise import antithetic_times, mask_uniforms, stream_generator
from ..models.transfer import to_device
from .batch import GlobalBatch, Noise, maskable, place
from .checkpoints import reading
from .checks import check_batch, columns_of
from .collator import stack_and_pad
from .corruption import NoisedBatch, check_loss, drawn_mask, drop_classes, noised, random_length, shortened
from .ema import EMA_FILE, EMACallback
from .engines import check_engine, compile_blocks, skips_bad_steps
from .estimator import draws_needed, estimate_rows, summary, times_of_rows
from .mgm_config import MGMTrainingConfig
from .model_card import write_model_card
from .options import check_arguments, warn_of_warmup
from .peft import with_adapter
from .prompts import check_prompt_options, read_prompts
from .rows import CheckedRowsTrainer
from .run_record import known
from .start import check_model, check_trainable, fit_tokenizer, load_model, not_finite, warn_of_half_precision


logger = logging.get_logger(__name__)

GROWING_RESIDUAL = 1e-3  # below this relative residual the solver has converged, whatever the last ratio


class MGMTrainer(CheckedRowsTrainer):
    """Trains a masked generative model.

    Args:
        model (`PreTrainedModel`, `str` or `Path`): A model of this library, also one loaded as remote code or wrapped
            by PEFT; or its folder or its name on the hub.
        args ([`MGMTrainingConfig`], *optional*): Arguments. `None`: the defaults.
        train_dataset, eval_dataset (`Dataset`, *optional*): Rows, each a dict of: `input_ids`, of at most the model's
            length and without the mask id; `attention_mask`, 0 at padding; `labels`, the ids themselves, or -100 where
            a position (of a prompt, say) is never masked, scored or counted; `class_labels`, the class of an image.
            Whole numbers of any type. Other columns are dropped. Of a stream each pass leaves out the micro-batches at
            its end that fill no optimizer step.
        processing_class (`PreTrainedTokenizerBase`, *optional*): Saved beside the model, whose ids it must have.
        peft_config (`peft.PeftConfig`, *optional*): Train this adapter on the frozen model, average it and export it.
            `None`: train what `model` leaves trainable.
        kwargs: Passed to `transformers.Trainer`.

    Raises:
        `ValueError`: if the model is of another architecture, holds weights that are not finite, or has an adapter
            already where there is a `peft_config`; if DeepSpeed or FSDP is set such that nothing could be exported;
            for an argument that would be ignored (`fpmgm/trainers/options.py`); while training and evaluating, for a
            row that the model cannot be trained on, with its number and column.
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

    config_class = MGMTrainingConfig
    loss_is_scaled_for_ga = True  # compute_loss divides by the positions of the whole optimizer step

    def __init__(
        self,
        model: nn.Module | str | Path,
        args: MGMTrainingConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class=None,
        peft_config=None,
        **kwargs,
    ):
        args = self.config_class() if args is None else args
        check_arguments(self, args, self.config_class, kwargs)
        model = load_model(model)
        check_model(model)
        self.kind = KINDS[model.config.model_type]
        check_loss(args, model.config)
        model = with_adapter(model, peft_config)
        fit_tokenizer(model, processing_class)
        check_prompt_options(args, model.config, (train_dataset, eval_dataset))
        read = partial(read_prompts, tokenizer=processing_class, args=args, config=model.config)
        kwargs.setdefault("data_collator", stack_and_pad)
        super().__init__(
            model=model,
            args=args,
            train_dataset=read(train_dataset, "training data"),
            eval_dataset=read(eval_dataset, "evaluation data"),
            processing_class=processing_class,
            **kwargs,
        )
        if not hasattr(Trainer, "loss_is_scaled_for_ga"):  # transformers 5.17 divides unless it knows a loss function
            self.compute_loss_func = self.compute_loss
        check_engine(self)
        compile_blocks(self)
        self.ema = None
        if args.ema_decay is not None:
            self.ema = EMACallback(self.model, args.ema_decay)
            self.add_callback(self.ema)
        self._global_batch: GlobalBatch | None = None
        self._micro_batch = 0
        self._loaded_step: int | None = None  # that of the best checkpoint, at the end; None: the last one's
        self._metrics: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._clock, self._tokens = time.perf_counter(), 0

    def train(self, *args, **kwargs):
        """As in `Trainer`, of a model that has something to train."""
        check_trainable(self.model)
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):  # which may hold them in float32 besides
            warn_of_half_precision(self.model)
        return super().train(*args, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """As in `Trainer`, of a rate that the run reaches."""
        warn_of_warmup(self.args, num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of a row that are read, or refused by name."""
        return columns_of(self.model.config)

    def batch_check(self) -> Callable[[Mapping], dict]:
        """See [`check_batch`]."""
        return partial(check_batch, config=self.model.config, completion_only_loss=self.args.completion_only_loss)

    def _get_dataloader(self, dataset, description, *args, **kwargs):
        """As in `Trainer`, of prompts too: those given to `evaluate` and `predict` are still text."""
        dataset = read_prompts(
            dataset, f"{description.lower()} data", self.processing_class, self.args, self.model.config
        )
        return super()._get_dataloader(dataset, description, *args, **kwargs)

    # --- the training step --------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one optimizer step, and their place among those of all ranks."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not samples:
            return samples, None
        share = random_length(self.args, self.state.global_step)
        if share is not None:
            samples = [shortened(batch, share) for batch in samples]
        self._global_batch = place(samples, (self.args.seed, "train", self.state.global_step), self.accelerator)
        self._micro_batch = 0
        if self._global_batch.positions == 0:
            logger.warning_once(
                f"Nothing is learned in step {self.state.global_step + 1}: all `labels` of its rows are -100. Leave "
                "out rows that have nothing to learn."
            )
        self._tokens += self._global_batch.tokens
        return samples, None

    def _track_num_input_tokens(self, inputs):
        """As in `Trainer`, which would take ends of text for padding in a batch that has none, and so no mask."""
        super()._track_num_input_tokens({"attention_mask": torch.ones_like(inputs["input_ids"]), **inputs})

    def _get_num_items_in_batch(self, batch_samples, device) -> None:
        """Not counted from labels, which most rows do not have: see [`place`]."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of one micro-batch, scaled so that micro-batches add up and ranks average to the global batch's."""
        noise = self._draw(inputs)
        self._micro_batch += 1
        loss, output = self.micro_batch_loss(model, drop_classes(inputs, noise, self.model.config), noise)
        self._record_output(output, noise.share_of_sequences)
        return (loss, output) if return_outputs else loss

    def micro_batch_loss(self, model, batch: dict, noise: Noise) -> tuple[torch.Tensor, ModelOutput]:
        """This micro-batch's part of the loss, Σ w(t)·(−log p(x)) over masked positions / all positions of the
        optimizer step, and the model's output."""
        # 1. hide
        masked = drawn_mask(batch, noise, self.kind)
        state = self.hide(batch, masked, noise.t)
        # 2. predict
        output = model(**state.supervised(), **noise.iterations, num_items_in_batch=noise.num_items)
        return output.loss, output

    def hide(self, batch: dict, masked: torch.Tensor, t: torch.Tensor) -> NoisedBatch:
        """`batch` hidden at `masked` (B, L), weighted as in training."""
        weights = self.kind.weight(self.args.loss_weighting)(t)
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
            t=antithetic_times(shift, places, batch.total, self.kind.time),
            uniforms=self._uniforms(batch.key, places, length),
            iterations={
                "num_no_grad_iterations": no_grad,
                "num_iterations": grad,
                "num_kept_iterations": self.args.num_kept_iterations,
            },
            num_items=max(1, batch.positions) / ranks,
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
        """The loss of a batch under noise that belongs to its rows, however they are split into batches and ranks; of
        the first draw, unless `prediction_loss_only`, logits (B, L, V) and labels (B, L), -100 where nothing is
        masked."""
        inputs, logits, labels = self._prepare_inputs(inputs), None, None
        size, length = inputs["input_ids"].shape
        rows, fresh = self.rows_of_batch(size)
        scored = maskable(inputs)
        totals = torch.zeros_like(self._eval_totals)
        totals[2] = int(scored[fresh].sum()) * len(self._eval_draws)
        totals[3] = int(fresh.sum()) * len(self._eval_draws)
        for draw in self._eval_draws:
            key = (self.args.seed, "eval", draw)
            t = times_of_rows((self.args.seed, "eval", 0), draw, rows, self.kind.time)
            probabilities, weights = self.kind.masked_probability(t), self.kind.weight(None)(t)
            masked = scored & (self._uniforms(key, rows, length) < probabilities[:, None])
            state = noised(inputs, masked, t, weights, self.model.config.mask_token_id)
            with self.compute_loss_context_manager():
                estimates = estimate_rows(model, state, probabilities)  # (B, 2)
            totals[:2] += estimates[to_device(fresh, estimates.device)].sum(dim=0)
            if draw == 0 and not prediction_loss_only:
                logits, labels = self._logits(model, state), state.labels
        self._eval_totals += totals
        return (totals[0] / totals[2].clamp(min=1)).float(), logits, labels

    @torch.no_grad()
    def _logits(self, model, state: NoisedBatch) -> torch.Tensor:
        with self.compute_loss_context_manager():
            logits = model(**{**state.seen(), "logits_positions": None}).logits.clone()
        forbid(logits.flatten(0, 1), self.model.config.mask_token_id)
        return logits

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """Evaluate the EMA weights: text by the negative ELBO per scored token, images by the cross-entropy per masked
        token; and its exponential, of text a bound of the perplexity, with its standard error."""
        start, dataset = time.perf_counter(), dataloader.dataset
        self._eval_totals = torch.zeros(4, dtype=torch.float64, device=self.args.device)
        loop = partial(super().evaluation_loop, dataloader, description, metric_key_prefix=metric_key_prefix)
        with self._averaged():
            draws = self.args.eval_num_draws or 1
            self._eval_draws = range(draws)
            self.start_evaluation(dataset)
            output = loop(prediction_loss_only=prediction_loss_only, ignore_keys=ignore_keys)
            totals = self.accelerator.reduce(self._eval_totals).tolist()
            if totals[2] == 0:
                raise ValueError("the evaluation data has nothing to score: all of its `labels` are -100.")
            if self.args.eval_num_draws is None and draws_needed(*totals) > 1:
                draws = draws_needed(*totals)
                self._eval_draws = range(1, draws)
                self.start_evaluation(dataset)
                loop(prediction_loss_only=True)
                totals = self.accelerator.reduce(self._eval_totals).tolist()
        results = summary(*totals[:3], draws)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in results.items()})
        self._clock += time.perf_counter() - start
        return output

    # --- logs ---------------------------------------------------------------------------------------------------

    def log(self, logs, start_time=None):
        """Add the means since the last log line, over ranks: accuracy, residual, iterations, state norm, tokens/s."""
        if "loss" in logs and self._metrics:
            sums = {name: torch.stack(values).sum(dim=0) for name, values in sorted(self._metrics.items())}
            totals, weights = self.accelerator.gather(torch.stack(list(sums.values())).unsqueeze(0)).sum(dim=0).T
            means = totals / weights.clamp(min=1e-12)
            logs.update({name: value.item() for name, value in zip(sums, means, strict=True)})
            logs["tokens_per_second"] = round(self._tokens / (time.perf_counter() - self._clock), 1)
            self._metrics.clear()
            self._warn_if_growing(logs)
            self._clock, self._tokens = time.perf_counter(), 0
        super().log(logs, start_time)

    def record(self, weight: float | torch.Tensor, **values: torch.Tensor) -> None:
        """Note scalars of a micro-batch, whose means by `weight` the next log line shows; by its share of the
        sequences of its step, these are means over steps however the batch is split."""
        for name, value in values.items():
            part = torch.stack([value.detach() * weight, torch.ones_like(value) * weight])
            self._metrics[name] = [sum(self._metrics[name], part)]  # one, however long nothing is logged

    def since_log(self) -> dict[str, list[torch.Tensor]]:
        """Also the values whose means the line adds."""
        return super().since_log() | {f"sums.{name}": list(values) for name, values in self._metrics.items()}

    def go_on_since_log(self, collected: dict[str, list[torch.Tensor]]) -> None:
        """Also with the values whose means the line adds."""
        super().go_on_since_log(collected)
        sums = {name: values for name, values in collected.items() if name.startswith("sums.")}
        self._metrics.update({name.removeprefix("sums."): values for name, values in sums.items()})

    def forget_steps(self) -> None:
        """Also the values whose means the line adds, and that another step's weights were loaded."""
        super().forget_steps()
        self._metrics.clear()
        self._loaded_step = None
        self._clock, self._tokens = time.perf_counter(), 0

    @torch.no_grad()
    def _record_output(self, output: ModelOutput, share: float) -> None:
        if output.masked_accuracy is not None:
            self.record(len(output.last_hidden_state), masked_accuracy=output.masked_accuracy)  # of P positions
        if output.residuals is not None:
            residuals = output.residuals.mean(dim=1)  # (N,)
            self.record(
                share,
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
            self._write_card(output_dir or self.args.output_dir)

    def push_to_hub(self, *args, **kwargs):
        """Export the EMA weights and their card to the hub."""
        with self._averaged():
            return super().push_to_hub(*args, **kwargs)

    def create_model_card(self, **kwargs) -> None:
        """Write the card, filled with what this run knows."""
        if self.is_world_process_zero():
            self._write_card(self.args.output_dir)

    def _write_card(self, folder: str | Path) -> None:
        steps = self.state.global_step if self._loaded_step is None else self._loaded_step
        write_model_card(folder, self.model, self.args, steps, self.lineage())

    def lineage(self) -> dict[str, str]:
        """What the model came from and how, in words by name, for its card."""
        return known(**{"started from": self.origin.base_model or getattr(self.model, "name_or_path", None) or None})

    def save_beside(self, folder: Path) -> None:
        """Also the EMA."""
        super().save_beside(folder)
        if self.ema is not None:
            self.ema.save(folder, write=self.args.should_save)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._load_average(checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_average(self.state.best_model_checkpoint)
        self._loaded_step = self.state.best_global_step

    def _load_average(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.ema is not None:
            with reading(checkpoint, EMA_FILE):
                self.ema.load(checkpoint)
