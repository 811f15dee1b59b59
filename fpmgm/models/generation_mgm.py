# SPDX-License-Identifier: Apache-2.0
"""`generate`: sampling from a masked generative model under a budget of block evaluations (Section 3.3, Algorithm 1).

Shapes: B batch, L length, D hidden size, V vocabulary, T denoising steps, P positions revealed at a step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from transformers.utils import ModelOutput, logging

from .budget import BudgetPlan, check_whole, explicit_plan, plan_budget
from .generation_config_mgm import MGMGenerationConfig
from .reuse import REUSE_STATES, Solution, reuse_states, reuse_weights, updated_solution, visible_fraction
from .reveal import ORDERS
from .sampling import time_grid


logger = logging.get_logger(__name__)


@dataclass
class MGMGenerationOutput(ModelOutput):
    """Output of `generate(return_dict_in_generate=True)`.

    Args:
        sequences (`torch.LongTensor`): (B, L) tokens.
        block_evaluations (`int`): Block evaluations of the most costly sequence; never above the budget.
        block_evaluations_per_sequence (`torch.LongTensor`): (B,).
        num_steps (`int`): Denoising steps T.
        iterations (`list[int]`): Fixed-point iterations planned for each step.
        iterations_taken (`torch.LongTensor`): (T, B) iterations run.
        residuals (`torch.Tensor`): (T, max N, B) relative residual of each iteration; NaN where none was taken.
        reused (`list[dict[str, float]]`): Per step, the share of positions in each reuse state ("changed",
            "unchanged", "masked", "remasked"); an empty dict where nothing was reused.
        tuned_plan (`dict`, *optional*): What [`MGMGenerationConfig.tuned_plans`] holds for the budget, where it was
            used.
    """

    sequences: torch.LongTensor | None = None
    block_evaluations: int | None = None
    block_evaluations_per_sequence: torch.LongTensor | None = None
    num_steps: int | None = None
    iterations: list | None = None
    iterations_taken: torch.LongTensor | None = None
    residuals: torch.Tensor | None = None
    reused: list | None = None
    tuned_plan: dict | None = None


@dataclass(frozen=True)
class GenerationStep:
    """What a callback sees after a step.

    Args:
        step (`int`): 0 for the first.
        num_steps (`int`): Denoising steps T.
        time (`float`): Diffusion time t at which the denoiser ran.
        sequences (`torch.LongTensor`): (B, L) tokens after the step, the mask id where still unknown.
        revealed (`torch.BoolTensor`): (B, L) positions revealed by this step.
        fixed_point_state (`torch.Tensor`): (B, L, D) h*, or `None` without fixed-point layers.
        residuals (`torch.Tensor`): (N, B) of this step's iterations, or `None`.
    """

    step: int
    num_steps: int
    time: float
    sequences: torch.LongTensor
    revealed: torch.BoolTensor
    fixed_point_state: torch.Tensor | None
    residuals: torch.Tensor | None


class Ledger:
    """What each sequence may spend at a step, what it has spent, and what was measured on the way.

    Args:
        plan ([`BudgetPlan`]): Planned iterations.
        model_config: Configuration with the layer counts.
        config ([`MGMGenerationConfig`]): Of the call.
        batch_size (`int`): Sequences B.
    """

    def __init__(self, plan: BudgetPlan, model_config, config: MGMGenerationConfig, batch_size: int):
        self.plan, self.config, self.batch_size = plan, config, batch_size
        self.explicit = model_config.num_pre_layers + model_config.num_post_layers
        self.shared = model_config.num_fixed_point_layers
        self.saved: torch.Tensor | int = 0  # iterations that each sequence may take on top of its plan
        self.residuals: list[torch.Tensor | None] = []  # per step (N, B), None where no iteration was taken
        self.ran: list[bool] = []
        self.reused: list[torch.Tensor | None] = []
        self.finite: torch.Tensor | None = None

    def iterations(self, step: int) -> int | torch.Tensor | None:
        """The most iterations of this step, for all or for each sequence; `None` without fixed-point layers."""
        return self.plan.iterations[step] + self.saved if self.shared else None

    def skip(self) -> None:
        """Book a step that did not run."""
        self.ran.append(False)
        self.residuals.append(None)
        self.reused.append(None)

    def add(self, residuals: torch.Tensor | None, logits: torch.Tensor) -> None:
        """Book a step: its residuals (N, B), NaN where a sequence had stopped, and whether its logits are numbers."""
        allowed = self.iterations(len(self.ran))
        self.ran.append(True)
        self.residuals.append(residuals)
        if len(self.reused) < len(self.ran):
            self.reused.append(None)
        if self.config.carry_over and residuals is not None:
            self.saved = allowed - (~residuals.isnan()).sum(dim=0)
        finite = logits.isfinite().all()
        self.finite = finite if self.finite is None else self.finite & finite

    def close(self, tokens: torch.Tensor) -> "torch.LongTensor | MGMGenerationOutput":
        """What `generate` returns.

        Raises:
            `ValueError`: if some logits were not numbers.
        """
        if self.finite is not None and not self.finite:
            raise ValueError(
                "the model's weights give logits that are not finite, so no token can be drawn: check the checkpoint "
                "with `all(p.isfinite().all() for p in model.parameters())`, and lower the learning rate it came from."
            )
        if not self.config.return_dict_in_generate:
            return tokens
        residuals = [torch.empty(0, self.batch_size) if r is None else r.cpu() for r in self.residuals]
        table = torch.full((len(residuals), max(map(len, residuals)), self.batch_size), float("nan"))  # (T, N, B)
        for row, values in zip(table, residuals, strict=True):
            row[: len(values)] = values
        taken = (~table.isnan()).sum(dim=1)  # (T, B)
        cost = sum(self.ran) * self.explicit + taken.sum(dim=0) * self.shared  # (B,)
        return MGMGenerationOutput(
            sequences=tokens,
            block_evaluations=int(cost.max()),
            block_evaluations_per_sequence=cost,
            num_steps=self.plan.num_steps,
            iterations=self.plan.iterations,
            iterations_taken=taken,
            residuals=table,
            reused=[{} if r is None else dict(zip(REUSE_STATES, r.tolist(), strict=True)) for r in self.reused],
        )


class MGMGenerationMixin:
    """Gives a masked generative model `generate` and a saved [`MGMGenerationConfig`]."""

    generation_config_class = MGMGenerationConfig
    default_order = "ancestral"

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.LongTensor | None = None,
        generation_config: MGMGenerationConfig | None = None,
        *,
        batch_size: int | None = None,
        length: int | None = None,
        attention_mask: torch.Tensor | None = None,
        seed: int | list[int] | None = None,
        generator: torch.Generator | None = None,
        callback: Callable[[GenerationStep], None] | None = None,
        streamer=None,
        **kwargs: Any,
    ) -> torch.LongTensor | MGMGenerationOutput:
        """Reveal masked positions over a few denoising steps.

        Args:
            input_ids (`torch.LongTensor`, *optional*): (B, L) ids with the mask id wherever text is wanted; all
                other positions are kept. `None`: everything is masked.
            generation_config ([`MGMGenerationConfig`], *optional*): Parameters. `None`: the model's own.
            batch_size (`int`, *optional*): Sequences to write. `None`: the rows of `input_ids`, or 1. A single row
                of `input_ids` is repeated.
            length (`int`, *optional*): Length without `input_ids`. `None`: `max_position_embeddings`.
            attention_mask (`torch.Tensor`, *optional*): (B, L), 0 at padding, which is neither seen nor written.
            seed (`int` or `list[int]`, *optional*): Row k draws from the stream (seed, k); with one seed per row, a
                row run alone gives the same tokens. `None`: `generator`.
            generator (`torch.Generator`, *optional*): Source of randomness instead of `seed`. `None`: PyTorch's
                global generator.
            callback (`Callable`, *optional*): Called with a [`GenerationStep`] after each step that
                runs (an idle one may be skipped).
            streamer (*optional*): Its `put(tokens)` gets the (B, L) tokens on the CPU after each step that runs,
                `end()` the end ([`fpmgm.TextStreamer`] shows them in a terminal).
            kwargs: Any field of [`MGMGenerationConfig`] for this call: `budget`, `num_steps`, `iterations`,
                `allocation`, `reuse`, `tolerance`, `temperature`, `top_k`, `top_p`, `order`, `remask`, `final`, …

        Returns:
            `torch.LongTensor` of shape (B, L), or [`MGMGenerationOutput`] with `return_dict_in_generate=True`.

        Raises:
            `ValueError`: names the argument, its value, what is allowed and what to do; also when the model's
                weights give logits that are not numbers.
        """
        config, tuned_plan = (generation_config or self.generation_config).updated(**kwargs).tuned(given=kwargs)
        if tuned_plan is not None:
            logger.info(f"`budget`={config.budget}: using the tuned plan {tuned_plan}.")
        plan = self._plan(config)
        tokens, attention_mask = self._start(input_ids, batch_size, length, attention_mask)
        check_randomness(seed, generator, len(tokens))
        real = torch.ones_like(tokens) if attention_mask is None else attention_mask
        real = real.bool().cpu()
        wanted = (tokens == self.config.mask_token_id).cpu() & real
        rule = self._order(config)(wanted, real, plan.num_steps, self.config.mask_token_id, config, seed, generator)
        training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            out = self._denoise(tokens, attention_mask, bool(wanted.all()), rule, plan, config, callback, streamer)
        finally:
            for module in training:
                module.training = True
        if config.return_dict_in_generate:
            out.tuned_plan = tuned_plan
        return out

    def _denoise(self, tokens, attention_mask, all_masked, rule, plan, config, callback, streamer):
        """The loop over steps: start of the solver, denoiser, draw at the revealed positions."""
        (batch_size, length), times = tokens.shape, time_grid(plan.num_steps)
        reusing = config.reuse != "none" and self.config.num_fixed_point_layers > 0
        ledger, solution = Ledger(plan, self.config, config, batch_size), None
        alike = all_masked and attention_mask is None and batch_size > 1  # all rows, until something is revealed
        for step in logging.tqdm(range(plan.num_steps), desc="denoising", disable=not config.progress_bar):
            # 1. the positions whose logits the step needs; where there are none, and nothing is reused, it is idle
            positions = rule.candidates(step, tokens)
            if len(positions) == 0 and (not reusing or config.skip_idle_steps):
                tokens, _ = rule.write(step, tokens, positions, None)
                ledger.skip()
                continue
            # 2. the denoiser, started from the previous solution; rows that are alike are run once
            shared, alike = alike, False
            columns, inverse = (positions % length).unique(return_inverse=True) if shared else (positions, None)
            weights = None
            if solution is not None:
                weights = self._reuse_weights(solution, tokens, attention_mask, config, ledger)
            output = self(
                tokens[:1] if shared else tokens,
                timesteps=torch.full((1 if shared else batch_size,), times[step].item(), device=tokens.device),
                attention_mask=attention_mask,
                num_iterations=ledger.iterations(step),
                fixed_point_state=None if solution is None else solution.state,
                reuse_weights=weights,
                tolerance=config.tolerance,
                solver=config.solver,
                logits_positions=columns,
            )
            logits, state, residuals = output.logits, output.fixed_point_state, output.residuals
            if shared:
                logits = logits[inverse.to(logits.device)]
                state = None if state is None else state.expand(batch_size, -1, -1)
                residuals = None if residuals is None else residuals.expand(-1, batch_size)
            # 3. the draw
            solved_for = tokens
            tokens, revealed = rule.write(step, tokens, positions, logits)
            # 4. what the next step and the caller see
            if reusing:
                busy = None
                if config.skip_idle_steps:  # a sequence that revealed nothing keeps its solution
                    busy = (torch.bincount(positions // length, minlength=batch_size) > 0).to(tokens.device)
                solution = updated_solution(solution, Solution(solved_for, state, busy))
            ledger.add(residuals, logits)
            if callback is not None:
                time = times[step].item()
                callback(GenerationStep(step, plan.num_steps, time, tokens, revealed, state, residuals))
            if streamer is not None:
                streamer.put(tokens.cpu())
        if streamer is not None:
            streamer.end()
        return ledger.close(tokens)

    def _reuse_weights(self, solution, tokens, attention_mask, config, ledger) -> torch.Tensor:
        """γ of the next start, (B, L); the shares of the reuse states go to the ledger."""
        states = reuse_states(solution.input_ids, tokens, self.config.mask_token_id)
        ledger.reused.append(torch.stack([(states == i).float().mean() for i in range(len(REUSE_STATES))]))
        weights = reuse_weights(
            states,
            visible_fraction(tokens, self.config.mask_token_id, attention_mask),
            config.reuse,
            config.gamma_unchanged,
            config.gamma_masked,
            config.gamma_changed,
            config.gamma_remasked,
        )
        return weights if solution.rows is None else weights * solution.rows[:, None]

    def _plan(self, config: MGMGenerationConfig) -> BudgetPlan:
        if config.iterations is not None:
            return explicit_plan(self.config, config.iterations, config.num_steps)
        if config.budget is None:
            raise ValueError("`budget`=None and `iterations`=None: give a budget, or `num_steps` with `iterations`.")
        return plan_budget(self.config, config.budget, config.num_steps, config.allocation)

    def _order(self, config: MGMGenerationConfig) -> Callable:
        order = config.order or self.default_order
        if order not in ORDERS:
            raise ValueError(f"`order`={order!r} must be one of {tuple(ORDERS)}.")
        return ORDERS[order]

    def _start(self, input_ids, batch_size, length, attention_mask) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The masked tokens to begin with and the attention mask, both (B, L) on the model's device."""
        longest, mask_token_id = self.config.max_position_embeddings, self.config.mask_token_id
        if batch_size is not None:
            check_whole("batch_size", batch_size, minimum=1, unit="sequences")
        input_ids = None if input_ids is None else torch.as_tensor(input_ids).long()
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
        if attention_mask is not None:
            attention_mask = attention_mask.to(self.device)
        return input_ids.to(self.device), attention_mask

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
        wanted = wanted & attention_mask.bool().to(wanted.device)
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
