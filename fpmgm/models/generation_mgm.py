# SPDX-License-Identifier: Apache-2.0
"""`generate`: sampling from a masked generative model under a budget of block evaluations (Section 3.3, Algorithm 1).

Shapes: B batch, R rows that the denoiser runs (B, or 2B with guidance), L length, D hidden size, V vocabulary,
T denoising steps, P positions revealed at a step.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.utils import logging

from .arguments import check_names, checked, shown
from .blocks import block_starts
from .budget import BudgetPlan, explicit_plan, plan_budget
from .draw import MOST_NUMBERS
from .end_of_text import StopAtEnd, known_ends, read_ends, warn_of_ended_prompts
from .freeze import Frozen, NothingFrozen, expected_shares, gains_nothing
from .generation_config_mgm import MISPLACED, MGMGenerationConfig, check_given
from .generation_inputs import (
    ALLOWED,
    check_generation_config,
    check_ids,
    continued,
    read_mask,
    read_seeds,
    read_whole,
)
from .guidance import check_classes, class_rows, guidance_scales, guided_logits
from .ledger import GenerationStep, Ledger, MGMGenerationOutput
from .loading import saved_generation_config
from .reuse import REUSE_STATES, Solution, step_weights
from .reveal import TEXT_ORDERS, RevealTask, check_order
from .runs import Runs
from .transfer import to_device


logger = logging.get_logger(__name__)


class Conditions(NamedTuple):
    """What the denoiser is told of its rows beside their tokens: `attention_mask` (B, L) on the device and `classes`
    (R,) on the CPU (`None`: none), and whether rows are `alike`, with nothing but masks and no padding: until the
    first token is revealed they differ by their class alone."""

    attention_mask: torch.Tensor | None
    classes: torch.Tensor | None
    alike: bool


class MGMGenerationMixin:
    """Gives a masked generative model `generate` and a saved [`MGMGenerationConfig`].

    `orders` are the orders of revealing that the model knows, its default first.
    """

    generation_config_class = MGMGenerationConfig
    orders = TEXT_ORDERS

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.LongTensor | None = None,
        generation_config: MGMGenerationConfig | None = None,
        *,
        batch_size: int | None = None,
        length: int | None = None,
        max_new_tokens: int | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        class_labels: int | list[int] | torch.Tensor | None = None,
        seed: int | list[int] | None = None,
        generator: torch.Generator | None = None,
        callback: Callable[[GenerationStep], None] | None = None,
        streamer=None,
        **kwargs: Any,
    ) -> torch.LongTensor | MGMGenerationOutput:
        """Reveal masked positions over a few denoising steps.

        Args:
            input_ids (`torch.LongTensor`, list or array, *optional*): (B, L) ids with the mask id wherever tokens are
                wanted; all other positions are kept. `None`: everything is masked.
            generation_config ([`MGMGenerationConfig`], *optional*): Parameters. `None`: the model's own.
            batch_size (`int`, *optional*): Sequences to write. `None`: the rows of `input_ids`, the number of
                `class_labels`, or 1. A single row of `input_ids` is repeated.
            length (`int`, *optional*): Length without `input_ids`. `None`: `max_position_embeddings`, an image's only
                length.
            max_new_tokens (`int`, *optional*): Masks to put behind each row of `input_ids`, a prompt: behind its last
                token that is no padding, on whichever side that is. Of text only. `None`: `input_ids` have the masks.
            attention_mask (`torch.Tensor`, list or array, *optional*): (B, L), 0 at padding, which is neither seen nor
                written, and 1 elsewhere, of any type. Of text only. `None`: no padding.
            token_type_ids (*optional*): Not read: tokenizers of BERT's kind send it. Of text only.
            class_labels (`int`, `list[int]` or `torch.LongTensor`, *optional*): Class of all sequences or of each,
                (B,). Of images only. `None`: no class.
            seed (`int` or `list[int]`, *optional*): Row k draws from the stream (seed, k); with one seed per row, a
                row run alone gives the same tokens. `None`: `generator`.
            generator (`torch.Generator`, *optional*): Source of randomness instead of `seed`. `None`: PyTorch's
                global generator.
            callback (`Callable`, *optional*): Called with a [`GenerationStep`] after each step that
                runs (an idle one may be skipped). `None`: none.
            streamer (*optional*): Its `put(tokens)` gets the (B, L) tokens on the CPU after each step that runs,
                `end()` the end ([`fpmgm.TextStreamer`] shows them in a terminal).
            kwargs: Any field of [`MGMGenerationConfig`] for this call: `budget`, `num_steps`, `iterations`,
                `allocation`, `reuse`, `tolerance`, `temperature`, `top_k`, `top_p`, `order`, `entropy_bound`,
                `confidence_threshold`, `margin_threshold`, `guidance_scale`, `guidance_schedule`, `remask`, `final`,
                `block_length`, `stop_at_eos`, `freeze`, …

        Returns:
            `torch.LongTensor` of shape (B, L), longer by `max_new_tokens` and cut under `stop_at_eos`; or
                [`MGMGenerationOutput`] with `return_dict_in_generate=True`.

        The model's mode is neither read nor changed: dropout never acts here.

        Raises:
            `ValueError`: names the argument, its value, what is allowed and what to do; also when the model's
                weights give logits that are not numbers.
        """
        # 1. what is asked
        given = {"batch_size": batch_size, "length": length, "max_new_tokens": max_new_tokens, "generator": generator}
        given = checked(ALLOWED, {**given, "callback": callback, "streamer": streamer})
        batch_size, length, max_new_tokens = (given[name] for name in ("batch_size", "length", "max_new_tokens"))
        config, tuned_plan = self._configure(generation_config, kwargs)
        order, mask = self._order(config, kwargs), self.config.mask_token_id
        # 2. the tokens to begin with
        classes = check_classes(class_labels, config.guidance_scale, self.config.num_classes)
        input_ids = None if input_ids is None else read_whole("input_ids", input_ids)
        if batch_size is None and classes is not None and classes.dim() and (input_ids is None or len(input_ids) == 1):
            batch_size = len(classes)
        given = (batch_size, length, attention_mask, token_type_ids, max_new_tokens)
        tokens, attention_mask = self._start(input_ids, *given)
        seed = read_seeds(seed, generator, len(tokens))
        if classes is not None:
            classes = class_rows(classes, len(tokens), config.guidance_scale, self.config.num_classes)
        # 3. which positions when
        real = torch.ones_like(tokens, dtype=torch.bool) if attention_mask is None else attention_mask
        wanted = (tokens == mask) & real
        if max_new_tokens is not None:
            warn_of_ended_prompts(tokens, wanted, real, known_ends(config, self.config))
        plan = self._plan(config, wanted)
        task = RevealTask(wanted, real, plan.num_steps, mask, config, seed, generator)
        rule = order(task)
        if config.stop_at_eos:
            rule = StopAtEnd(rule, task, *read_ends(config, self.config))
        frozen = NothingFrozen()
        if config.freeze and config.refresh_every != 1 and not gains_nothing(plan, wanted, real).all():
            frozen = Frozen(wanted, real, plan, self.config, config)
        # 4. the steps
        check_dropout(self)
        alike = bool(wanted.all()) and attention_mask is None
        attention_mask = None if attention_mask is None else to_device(attention_mask, self.device)
        conditions = Conditions(attention_mask, classes, alike)
        watchers = watchers_of(callback, streamer)
        tokens = to_device(tokens, self.device)
        tokens, ledger = self._denoise(tokens, conditions, rule, frozen, plan, config, watchers)
        # 5. what is returned
        if streamer is not None:
            streamer.end()
        lengths = (to_device(wanted, self.device) & (tokens != mask)).sum(dim=1)
        tokens, lengths = rule.cut(tokens) if config.stop_at_eos else (tokens, lengths)
        out = ledger.close(tokens, lengths)
        if config.return_dict_in_generate:
            out.tuned_plan = tuned_plan
        return out

    def _denoise(
        self,
        tokens: torch.LongTensor,
        conditions: Conditions,
        rule: Any,
        frozen: Frozen | NothingFrozen,
        plan: BudgetPlan,
        config: MGMGenerationConfig,
        watchers: list[Callable[[GenerationStep], None]],
    ) -> tuple[torch.LongTensor, Ledger]:
        """The loop over steps: start of the solver, denoiser, draw at the revealed positions, which `rule` says. Gives
        the tokens (B, L) and what was booked.

        Which positions a step needs is known on the CPU; it waits for the device only where the rule has to ask.
        """
        (batch_size, length), classes = tokens.shape, conditions.classes
        copies = 1 if classes is None else len(classes) // batch_size  # 2: guidance, the second without classes
        reusing = config.reuse != "none" and self.config.can_reuse
        width = length + self.config.num_register_tokens
        ledger, solution = Ledger(plan, self.config, config, batch_size, copies * batch_size, width), None
        for step in logging.tqdm(range(plan.num_steps), desc="denoising", disable=not config.progress_bar):
            # 1. the positions whose logits the step needs; where there are none, and nothing is reused, it is idle
            turn = rule.turn(step, tokens)
            positions = turn.positions
            if not turn.unfinished.any():
                break
            active = frozen.active(step, turn)  # (B, L + R), or None: all
            if len(positions) == 0 and not (reusing and (active is None or active.any())):
                tokens, _ = rule.write(step, tokens, positions, None)
                ledger.skip()
                frozen.skip(step, tokens, rule)
                continue
            # 2. the denoiser, started from the previous solution; of rows that are alike, one of each runs
            rows, weights = tokens.repeat(copies, 1), None  # (R, L)
            moment = rule.clock.moment(step, tokens == self.config.mask_token_id)
            runs = frozen.runs(active, turn.unfinished, copies, batch_size, classes, conditions.alike)
            if solution is not None:
                weights = self._reuse_weights(solution, rows, conditions.attention_mask, config, ledger, runs)
            logits, state, residuals = self._evaluate(
                rows, conditions, runs,
                positions=torch.cat([positions + copy * tokens.numel() for copy in range(copies)]),
                frozen=frozen.options(active, copies),
                timesteps=moment.times.repeat(copies).float(),
                num_iterations=ledger.iterations(step),
                fixed_point_state=None if solution is None else solution.state,
                reuse_weights=weights,
                tolerance=config.tolerance,
                solver=config.solver,
            )  # fmt: skip
            conditions = conditions._replace(alike=False)  # from the first revealed token on
            # 3. the draw
            if copies == 2:
                places = moment.places[to_device(positions // length, self.device)]
                scales = guidance_scales(config.guidance_scale, config.guidance_schedule, places)
                logits = guided_logits(logits, scales)
            tokens, revealed = rule.write(step, tokens, positions, logits)
            # 4. what the next step and the caller see
            if reusing:
                solution = Solution(rows, state)
            ledger.add(residuals, logits, runs, active)
            frozen.add(step, active, state, tokens, rule)
            if watchers:
                seen = GenerationStep.of(step, plan.num_steps, moment.times, tokens, revealed, state, residuals)
                for watch in watchers:
                    watch(seen)
        return tokens, ledger

    def _evaluate(self, rows, conditions: Conditions, runs: Runs | None, positions, frozen: dict, **options):
        """The denoiser on `rows` (R, L): logits (P, V) at `positions`, indices into R·L, state and residuals.

        Where there are `runs`, some of the rows are run for all of it. `None`: each is run. `frozen` are the model's
        options about frozen positions, `options` the others, whose tensors have R rows.
        """
        given = {"attention_mask": conditions.attention_mask, "class_labels": conditions.classes, **options}
        given = {name: to_device(x, rows.device) if torch.is_tensor(x) else x for name, x in given.items()}
        given = {name: x for name, x in given.items() if x is not None}
        if runs is None:
            output = self(rows, logits_positions=positions, training=False, **given, **frozen)
            return output.logits, output.fixed_point_state, output.residuals
        positions, place = runs.positions(positions, rows.shape[1])
        ran, stands, idle = (to_device(x, rows.device) for x in runs)
        given = {name: x[ran] if torch.is_tensor(x) else x for name, x in given.items()}
        output = self(rows[ran], logits_positions=positions, training=False, **given, **frozen)
        if "frozen_states" in frozen and len(ran) < len(stands):
            frozen["frozen_states"].repeat(stands)
        state, residuals = output.fixed_point_state, output.residuals
        state = None if state is None else state[stands]
        residuals = None if residuals is None else residuals[:, stands].masked_fill(idle, float("nan"))
        return output.logits[to_device(place, rows.device)], state, residuals

    def _reuse_weights(self, solution, rows, attention_mask, config, ledger, runs) -> torch.Tensor:
        """γ of the next start, (R, L), registers behind; the shares of the tokens' reuse states go to the ledger."""
        states, weights = step_weights(solution.input_ids, rows, self.config, config.reuse, config, attention_mask)
        ran = slice(None) if runs is None else to_device(runs.ran, rows.device)
        of_tokens = states[ran, : rows.shape[1]]
        if attention_mask is not None:
            of_tokens = of_tokens.masked_fill(~attention_mask[ran], -1)  # padding is in no state
        counts = torch.stack([(of_tokens == i).sum() for i in range(len(REUSE_STATES))])
        ledger.reused.append(counts / counts.sum())
        return weights

    def _configure(self, generation_config, given: dict[str, Any]) -> tuple[MGMGenerationConfig, dict | None]:
        """The parameters of a call, with the values `given` in it, and the tuned plan where one is used."""
        config = self.generation_config if generation_config is None else generation_config
        check_generation_config(config)
        arguments = [name for name in inspect.signature(MGMGenerationMixin.generate).parameters if name != "kwargs"]
        check_names(given, {*arguments[1:], *config.names()}, "generation argument(s)", MISPLACED)
        config, tuned_plan = config.updated(**given).tuned(given=given)
        check_given(config, given, self.config)
        if tuned_plan is not None:
            logger.info(f"`budget`={config.budget}: using the tuned plan {tuned_plan}.")
        return config, tuned_plan

    def _plan(self, config: MGMGenerationConfig, wanted: torch.Tensor) -> BudgetPlan:
        if config.iterations is not None:
            return explicit_plan(self.config, config.iterations, config.num_steps)
        if config.budget is None:
            raise ValueError("`budget`=None and `iterations`=None: give a budget, or `num_steps` with `iterations`.")
        starts = None if config.block_length is None else partial(block_starts, wanted, config.block_length)
        shares = expected_shares(config, self.orders, wanted.shape[1], self.config.num_register_tokens)
        return plan_budget(
            self.config, config.budget, config.num_steps, config.allocation, starts, shares, config.iterations_per_step
        )

    def _order(self, config: MGMGenerationConfig, given: dict[str, Any]) -> Callable:
        order = next(iter(self.orders)) if config.order is None else config.order
        if order not in self.orders:
            raise ValueError(f"`order`={order!r} must be one of {tuple(self.orders)} for this model.")
        check_order(order, config, given, is_text="ancestral" in self.orders)
        return self.orders[order]

    def _start(
        self, input_ids, batch_size, length, attention_mask, token_type_ids, max_new_tokens
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The masked tokens to begin with and the attention mask, both (B, L) on the CPU. Token types are not read."""
        longest, mask_token_id = self.config.max_position_embeddings, self.config.mask_token_id
        if max_new_tokens is not None:
            input_ids, attention_mask = continued(input_ids, attention_mask, max_new_tokens, self.config)
        shape = (batch_size or 1, longest if length is None else length)
        shape = shape if input_ids is None else tuple(input_ids.shape)
        if length is not None and shape and length != shape[-1]:
            raise ValueError(f"`length`={length} must be the length {shape[-1]} of `input_ids`: leave it out.")
        if len(shape) != 2 or not 1 <= shape[1] <= longest or shape[0] == 0:
            raise ValueError(
                f"`length`={shape[-1] if shape else None} (`input_ids` of shape {shape}) must be (batch, length) with "
                f"length from 1 to `max_position_embeddings`={longest} and at least one row."
            )
        if attention_mask is not None:
            attention_mask = read_mask("attention_mask", attention_mask)
            if attention_mask.shape != shape:
                raise ValueError(
                    f"`attention_mask` of shape {tuple(attention_mask.shape)} must have the shape {shape} of "
                    "`input_ids`."
                )
        if batch_size is not None and shape[0] not in (1, batch_size):
            raise ValueError(f"`batch_size`={batch_size} must be the {shape[0]} rows of `input_ids`, or one row.")
        rows = batch_size or shape[0]
        if rows * shape[1] > MOST_NUMBERS:
            raise ValueError(
                f"`batch_size`={rows} at length {shape[1]} is more than {MOST_NUMBERS:,} tokens: give fewer."
            )
        if input_ids is None:
            input_ids = torch.full(shape, mask_token_id, device="cpu")
        if shape[0] != rows:
            input_ids = input_ids.repeat(rows, 1)
            attention_mask = None if attention_mask is None else attention_mask.repeat(rows, 1)
        check_ids(input_ids, attention_mask, self.config)
        return input_ids, attention_mask

    def adjust_generation_fn(
        self, generation_config, from_auto_class, from_pipeline, pretrained_model_name_or_path, *args, **kwargs
    ) -> None:
        """Called by `from_pretrained`: load `generation_config.json` into our class, not transformers' own."""
        names = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")
        kwargs = {name: value for name, value in kwargs.items() if name in names}  # others configure the model
        kwargs.update(zip(names, args, strict=False))
        if generation_config is not None:
            check_generation_config(generation_config)
            self.generation_config = generation_config.updated()
            return
        self.generation_config = saved_generation_config(
            self.generation_config_class, pretrained_model_name_or_path, **kwargs
        )


def watchers_of(callback: Callable | None, streamer: Any) -> list[Callable[[GenerationStep], None]]:
    """Who sees each step."""
    shown = None if streamer is None else lambda step: streamer.put(step.sequences.cpu())
    return [watch for watch in (callback, shown) if watch is not None]


def check_dropout(model: nn.Module) -> None:
    """Raise a `ValueError` for what draws at random in training mode and is not the model's own: an adapter's dropout,
    or noise that a trainer adds to embeddings (NEFTune)."""
    training = [(name, x) for name, x in model.named_modules() if x.training]
    acting = [name for name, x in training if "Dropout" in type(x).__name__ and getattr(x, "p", 1) > 0]
    acting += [name for name, x in training if getattr(x, "neftune_noise_alpha", None)]
    if acting:
        raise ValueError(
            f"`generate` changes no module's mode, and the dropout or noise of these would act: {shown(acting)}. Call "
            "`model.eval()` before it, and `model.train()` after it if the model is in training."
        )


__all__ = ["GenerationStep", "MGMGenerationConfig", "MGMGenerationMixin", "MGMGenerationOutput"]
