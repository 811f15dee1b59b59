# SPDX-License-Identifier: Apache-2.0
"""`generate`: sampling from a masked generative model under a budget of block evaluations (Section 3.3, Algorithm 1).

Shapes: B batch, R rows that the denoiser runs (B, or 2B with guidance), L length, D hidden size, V vocabulary,
T denoising steps, P positions revealed at a step.
"""

from collections.abc import Callable
from numbers import Integral
from typing import Any

import torch
from torch.nn import functional as F
from transformers.utils import logging

from .budget import BudgetPlan, check_whole, explicit_plan, plan_budget
from .generation_config_mgm import MGMGenerationConfig
from .guidance import check_classes, class_rows, guidance_scales, guided_logits
from .ledger import GenerationStep, Ledger, MGMGenerationOutput
from .reuse import REUSE_STATES, Solution, reuse_states, reuse_weights, visible_fraction
from .reveal import TEXT_ORDERS, RevealTask
from .sampling import time_grid
from .transfer import to_device


logger = logging.get_logger(__name__)


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
        attention_mask: torch.Tensor | None = None,
        class_labels: int | list[int] | torch.Tensor | None = None,
        seed: int | list[int] | None = None,
        generator: torch.Generator | None = None,
        callback: Callable[[GenerationStep], None] | None = None,
        streamer=None,
        **kwargs: Any,
    ) -> torch.LongTensor | MGMGenerationOutput:
        """Reveal masked positions over a few denoising steps.

        Args:
            input_ids (`torch.LongTensor`, *optional*): (B, L) ids with the mask id wherever tokens are wanted; all
                other positions are kept. `None`: everything is masked.
            generation_config ([`MGMGenerationConfig`], *optional*): Parameters. `None`: the model's own.
            batch_size (`int`, *optional*): Sequences to write. `None`: the rows of `input_ids`, the number of
                `class_labels`, or 1. A single row of `input_ids` is repeated.
            length (`int`, *optional*): Length without `input_ids`. `None`: `max_position_embeddings`, an image's only
                length.
            attention_mask (`torch.Tensor`, *optional*): (B, L), 0 at padding, which is neither seen nor written. Of
                text only.
            class_labels (`int`, `list[int]` or `torch.LongTensor`, *optional*): Class of all sequences or of each,
                (B,). Of images only. `None`: no class.
            seed (`int` or `list[int]`, *optional*): Row k draws from the stream (seed, k); with one seed per row, a
                row run alone gives the same tokens. `None`: `generator`.
            generator (`torch.Generator`, *optional*): Source of randomness instead of `seed`. `None`: PyTorch's
                global generator.
            callback (`Callable`, *optional*): Called with a [`GenerationStep`] after each step that
                runs (an idle one may be skipped).
            streamer (*optional*): Its `put(tokens)` gets the (B, L) tokens on the CPU after each step that runs,
                `end()` the end ([`fpmgm.TextStreamer`] shows them in a terminal).
            kwargs: Any field of [`MGMGenerationConfig`] for this call: `budget`, `num_steps`, `iterations`,
                `allocation`, `reuse`, `tolerance`, `temperature`, `top_k`, `top_p`, `order`, `guidance_scale`,
                `guidance_schedule`, `remask`, `final`, …

        Returns:
            `torch.LongTensor` of shape (B, L), or [`MGMGenerationOutput`] with `return_dict_in_generate=True`.

        Raises:
            `ValueError`: names the argument, its value, what is allowed and what to do; also when the model's
                weights give logits that are not numbers.
        """
        config, tuned_plan = (generation_config or self.generation_config).updated(**kwargs).tuned(given=kwargs)
        if tuned_plan is not None:
            logger.info(f"`budget`={config.budget}: using the tuned plan {tuned_plan}.")
        plan, order = self._plan(config), self._order(config)
        classes = check_classes(class_labels, config.guidance_scale, getattr(self.config, "num_classes", None))
        if batch_size is None and classes is not None and classes.dim() and (input_ids is None or len(input_ids) == 1):
            batch_size = len(classes)
        tokens, attention_mask = self._start(input_ids, batch_size, length, attention_mask)
        check_randomness(seed, generator, len(tokens))
        if classes is not None:
            classes = class_rows(classes, len(tokens), config.guidance_scale, self.config.num_classes)
        real = torch.ones_like(tokens, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        wanted = (tokens == self.config.mask_token_id) & real
        rule = order(RevealTask(wanted, real, plan.num_steps, self.config.mask_token_id, config, seed, generator))
        alike = bool(wanted.all()) and attention_mask is None
        tokens = to_device(tokens, self.device)
        attention_mask = None if attention_mask is None else to_device(attention_mask, self.device)
        training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            out = self._denoise(tokens, attention_mask, classes, alike, rule, plan, config, callback, streamer)
        finally:
            for module in training:
                module.training = True
        if config.return_dict_in_generate:
            out.tuned_plan = tuned_plan
        return out

    def _denoise(self, tokens, attention_mask, classes, alike, rule, plan, config, callback, streamer):
        """The loop over steps: start of the solver, denoiser, draw at the revealed positions.

        Which positions a step needs is known on the CPU, so that no step waits for the device.
        """
        batch_size, times = len(tokens), time_grid(plan.num_steps)
        copies = 1 if classes is None else len(classes) // batch_size  # 2: guidance, the second without classes
        scales = guidance_scales(config.guidance_scale, config.guidance_schedule, plan.num_steps)
        reusing = config.reuse != "none" and self.config.num_fixed_point_layers > 0
        ledger, solution = Ledger(plan, self.config, config, batch_size, copies * batch_size), None
        for step in logging.tqdm(range(plan.num_steps), desc="denoising", disable=not config.progress_bar):
            # 1. the positions whose logits the step needs; where there are none, and nothing is reused, it is idle
            positions = rule.candidates(step, tokens)
            if len(positions) == 0 and not reusing:
                tokens, _ = rule.write(step, tokens, positions, None)
                ledger.skip()
                continue
            # 2. the denoiser, started from the previous solution
            rows, time, weights = tokens.repeat(copies, 1), times[step].item(), None  # (R, L)
            if solution is not None:
                weights = self._reuse_weights(solution, rows, attention_mask, config, ledger)
            logits, state, residuals = self._evaluate(
                rows, attention_mask, classes, time, alike,
                positions=torch.cat([positions + copy * tokens.numel() for copy in range(copies)]),
                num_iterations=ledger.iterations(step),
                fixed_point_state=None if solution is None else solution.state,
                reuse_weights=weights,
                tolerance=config.tolerance,
                solver=config.solver,
            )  # fmt: skip
            alike = False  # from the first revealed token on
            # 3. the draw
            logits = guided_logits(logits, scales[step]) if copies == 2 else logits
            tokens, revealed = rule.write(step, tokens, positions, logits)
            # 4. what the next step and the caller see
            if reusing:
                solution = Solution(rows, state)
            ledger.add(residuals, logits)
            if callback is not None:
                state = None if state is None else state[:batch_size]
                residuals = None if residuals is None else residuals[:, :batch_size]
                callback(GenerationStep(step, plan.num_steps, time, tokens, revealed, state, residuals))
            if streamer is not None:
                streamer.put(tokens.cpu())
        if streamer is not None:
            streamer.end()
        return ledger.close(tokens)

    def _evaluate(self, rows, attention_mask, classes, time, alike, positions, **options):
        """The denoiser on `rows` (R, L): logits (P, V) at `positions`, indices into R·L, state and residuals.

        Where all rows are `alike`, one of each class is run for all of it.
        """
        length, group = rows.shape[1], None
        if alike:
            group = torch.zeros(len(rows), dtype=torch.long)  # (R,)
            if classes is not None:
                classes, group = classes.unique(return_inverse=True)
            rows = rows[: int(group.max()) + 1]
            positions = group[positions // length] * length + positions % length
            positions, place = positions.unique(return_inverse=True)
        conditions = {"attention_mask": attention_mask, "class_labels": classes}
        conditions = {name: to_device(x, rows.device) for name, x in conditions.items() if x is not None}
        timesteps = torch.full((len(rows),), time, device=rows.device)
        output = self(rows, timesteps=timesteps, logits_positions=positions, **conditions, **options)
        logits, state, residuals = output.logits, output.fixed_point_state, output.residuals
        if group is not None:
            group, place = (to_device(x, rows.device) for x in (group, place))
            logits = logits[place]
            state = None if state is None else state[group]
            residuals = None if residuals is None else residuals[:, group]
        return logits, state, residuals

    def _reuse_weights(self, solution, rows, attention_mask, config, ledger) -> torch.Tensor:
        """γ of the next start, (R, L), registers behind; the shares of the tokens' reuse states go to the ledger."""
        mask, registers = self.config.mask_token_id, getattr(self.config, "num_register_tokens", 0)
        # A register is like a position that is masked still.
        ids = (F.pad(ids, (0, registers), value=mask) for ids in (solution.input_ids, rows))
        states = reuse_states(*ids, mask)
        of_tokens = states[:, : rows.shape[1]]
        ledger.reused.append(torch.stack([(of_tokens == i).float().mean() for i in range(len(REUSE_STATES))]))
        return reuse_weights(
            states,
            visible_fraction(rows, mask, attention_mask),
            config.reuse,
            config.gamma_unchanged,
            config.gamma_masked,
            config.gamma_changed,
            config.gamma_remasked,
        )

    def _plan(self, config: MGMGenerationConfig) -> BudgetPlan:
        if config.iterations is not None:
            return explicit_plan(self.config, config.iterations, config.num_steps)
        if config.budget is None:
            raise ValueError("`budget`=None and `iterations`=None: give a budget, or `num_steps` with `iterations`.")
        return plan_budget(self.config, config.budget, config.num_steps, config.allocation)

    def _order(self, config: MGMGenerationConfig) -> Callable:
        order = next(iter(self.orders)) if config.order is None else config.order
        if order not in self.orders:
            raise ValueError(f"`order`={order!r} must be one of {tuple(self.orders)} for this model.")
        for name, neutral in (("remask", None), ("final", "sample")):
            if order != "ancestral" and getattr(config, name) != neutral:
                raise ValueError(
                    f"`{name}`={getattr(config, name)!r} needs `order`='ancestral', not {order!r}, which writes each "
                    "token once and leaves none out."
                )
        return self.orders[order]

    def _start(self, input_ids, batch_size, length, attention_mask) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The masked tokens to begin with and the attention mask, both (B, L) on the CPU."""
        longest, mask_token_id = self.config.max_position_embeddings, self.config.mask_token_id
        if batch_size is not None:
            check_whole("batch_size", batch_size, minimum=1, unit="sequences")
        input_ids = None if input_ids is None else torch.as_tensor(input_ids).long().cpu()
        attention_mask = None if attention_mask is None else attention_mask.cpu()
        if input_ids is None:
            length = check_whole("length", longest if length is None else length, minimum=1, unit="tokens")
            input_ids = torch.full((batch_size or 1, length), mask_token_id)
        elif length is not None and length != input_ids.shape[-1]:
            raise ValueError(
                f"`length`={length} must be the length {input_ids.shape[-1]} of `input_ids`: leave it out."
            )
        if input_ids.dim() != 2 or input_ids.shape[1] > longest or input_ids.numel() == 0:
            raise ValueError(
                f"`length`={input_ids.shape[-1]} (`input_ids` of shape {tuple(input_ids.shape)}) must be (batch, "
                f"length) with length from 1 to `max_position_embeddings`={longest} and at least one row."
            )
        if len(input_ids) == 1 and batch_size is not None:
            input_ids = input_ids.repeat(batch_size, 1)
            attention_mask = attention_mask.repeat(batch_size, 1) if attention_mask is not None else None
        elif batch_size is not None and batch_size != len(input_ids):
            raise ValueError(
                f"`batch_size`={batch_size} must be the {len(input_ids)} rows of `input_ids`, or one row."
            )
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
            self.generation_config = self.generation_config.updated(**generation_config.to_dict())
            return
        try:
            self.generation_config = self.generation_config_class.from_pretrained(
                pretrained_model_name_or_path, _from_auto=from_auto_class, _from_pipeline=from_pipeline, **kwargs
            )
        except OSError:
            logger.info("No generation_config.json: using the defaults of `generate`.")


def check_ids(input_ids: torch.Tensor, attention_mask: torch.Tensor | None, config) -> None:
    """Raise a `ValueError` for ids outside the vocabulary, a mask of another shape, or a row with nothing to write."""
    low, high = input_ids.min().item(), input_ids.max().item()
    if low < 0 or high >= config.vocab_size:
        raise ValueError(
            f"`input_ids` holds ids from {low} to {high}, but they must lie in [0, `vocab_size`={config.vocab_size}): "
            "use the tokenizer that the model was trained with."
        )
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"`attention_mask` of shape {tuple(attention_mask.shape)} must have the shape {tuple(input_ids.shape)} "
            "of `input_ids`."
        )
    wanted = input_ids == config.mask_token_id
    if attention_mask is not None:
        wanted = wanted & attention_mask.bool()
    complete = (~wanted.any(dim=1)).nonzero().flatten().tolist()
    if complete:
        raise ValueError(
            f"`input_ids` has no mask in row(s) {complete}: put `mask_token_id`={config.mask_token_id} wherever "
            "tokens are wanted."
        )


def check_randomness(seed: int | list[int] | None, generator: torch.Generator | None, batch_size: int) -> None:
    """Raise a `ValueError` unless at most one source of randomness is given, with one seed per row."""
    if seed is not None and generator is not None:
        raise ValueError(f"`seed`={seed} and `generator` exclude each other: give one of them.")
    if isinstance(seed, list) and len(seed) != batch_size:
        raise ValueError(f"`seed` lists {len(seed)} seeds for {batch_size} sequences: give one per sequence.")
    seeds = [] if seed is None else seed if isinstance(seed, list) else [seed]
    if any(isinstance(s, bool) or not isinstance(s, Integral) for s in seeds):
        raise ValueError(f"`seed`={seed!r} must be a whole number or a list of them.")


__all__ = ["GenerationStep", "MGMGenerationConfig", "MGMGenerationMixin", "MGMGenerationOutput"]
