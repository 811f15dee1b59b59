# SPDX-License-Identifier: Apache-2.0
"""`generate`: sampling from a masked generative model under a budget of block evaluations (Section 3.3, Algorithm 1).

Shapes: B batch, L length, D hidden size, V vocabulary, T denoising steps, P positions revealed at a step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import ModelOutput, logging

from .budget import BudgetPlan, check_whole, explicit_plan, plan_budget
from .generation_config_mgm import MGMGenerationConfig
from .reuse import REUSE_STATES, reuse_states, reuse_weights, visible_fraction
from .sampling import REVEAL_ORDERS, draw_tokens, draw_uniforms, time_grid


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
            "unchanged", "masked"); an empty dict where nothing was reused.
    """

    sequences: torch.LongTensor | None = None
    block_evaluations: int | None = None
    block_evaluations_per_sequence: torch.LongTensor | None = None
    num_steps: int | None = None
    iterations: list | None = None
    iterations_taken: torch.LongTensor | None = None
    residuals: torch.Tensor | None = None
    reused: list | None = None


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
            callback (`Callable`, *optional*): Called with a [`GenerationStep`] after each step.
            kwargs: Any field of [`MGMGenerationConfig`] for this call: `budget`, `num_steps`, `iterations`,
                `allocation`, `reuse`, `temperature`, `top_k`, `top_p`, `order`, `final`, …

        Returns:
            `torch.LongTensor` of shape (B, L), or [`MGMGenerationOutput`] with `return_dict_in_generate=True`.

        Raises:
            `ValueError`: names the argument, its value, what is allowed and what to do; also when the model's
                weights give logits that are not numbers.
        """
        config = (generation_config or self.generation_config).updated(**kwargs)
        plan = self._plan(config)
        tokens, attention_mask = self._start(input_ids, batch_size, length, attention_mask)
        check_randomness(seed, generator, tokens.shape[0])
        reveal_uniforms, token_uniforms = draw_uniforms(*tokens.shape, seed, generator)
        wanted = tokens == self.config.mask_token_id
        if attention_mask is not None:
            wanted &= attention_mask.bool()
        reveal_step = self._reveal_order(config)(reveal_uniforms.to(tokens.device), plan.num_steps)
        reveal_step = torch.where(wanted, reveal_step, plan.num_steps + 1)  # T + 1: not ours to write
        was_training = self.training
        self.eval()
        try:
            return self._denoise(
                tokens, attention_mask, reveal_step, token_uniforms.to(tokens.device), plan, config, callback
            )
        finally:
            self.train(was_training)

    def _denoise(self, tokens, attention_mask, reveal_step, token_uniforms, plan, config, callback):
        """The loop over steps: start of the solver, denoiser, draw at the revealed positions."""
        mask_token_id, times = self.config.mask_token_id, time_grid(plan.num_steps)
        previous, state = tokens, None
        finite = torch.ones((), dtype=torch.bool, device=tokens.device)
        cost, residuals, reused = 0, [], []
        for step in logging.tqdm(range(plan.num_steps), desc="denoising", disable=not config.progress_bar):
            # 1. which share of the previous solution each position starts from
            weights, shares = None, {}
            if state is not None:
                states = reuse_states(previous, tokens, mask_token_id)
                visible = visible_fraction(tokens, mask_token_id, attention_mask)
                weights = reuse_weights(
                    states, visible, config.reuse, config.gamma_unchanged, config.gamma_masked, config.gamma_changed
                )
                shares = {name: (states == i).float().mean() for i, name in enumerate(REUSE_STATES)}
            # 2. the denoiser, with logits at the positions that this step reveals
            last = step == plan.num_steps - 1
            left_over = reveal_step == plan.num_steps
            revealed = (reveal_step == step) | (left_over & (last and config.final != "none"))
            positions = revealed.flatten().nonzero().squeeze(1)  # (P,)
            output = self(
                tokens,
                timesteps=times[step].float().expand(len(tokens)).to(tokens.device),
                attention_mask=attention_mask,
                num_iterations=plan.iterations[step] or None,
                fixed_point_state=state,
                reuse_weights=weights,
                logits_positions=positions,
            )
            # 3. the draw
            logits, uniforms = output.logits, token_uniforms.flatten()[positions]
            drawn = draw_tokens(logits, uniforms, mask_token_id, config.temperature, config.top_k, config.top_p)
            if last and config.final == "argmax":
                likeliest = draw_tokens(logits, uniforms, mask_token_id, temperature=0)
                drawn = torch.where(left_over.flatten()[positions], likeliest, drawn)
            finite = finite & logits.isfinite().all()
            previous, tokens = tokens, tokens.flatten().index_copy(0, positions, drawn).view_as(tokens)
            # 4. what the next step and the caller see
            if config.reuse != "none":
                state = output.fixed_point_state
            cost += output.block_evaluations
            residuals.append(output.residuals)
            reused.append(shares)
            if callback is not None:
                callback(
                    GenerationStep(
                        step, plan.num_steps, times[step].item(), tokens, revealed,
                        output.fixed_point_state, output.residuals,
                    )
                )  # fmt: skip
        if not finite:
            raise ValueError(
                "the model's weights give logits that are not finite, so no token can be drawn: check the checkpoint "
                "with `all(p.isfinite().all() for p in model.parameters())`, and lower the learning rate it came from."
            )
        if not config.return_dict_in_generate:
            return tokens
        return _output(tokens, plan, cost, residuals, reused)

    def _plan(self, config: MGMGenerationConfig) -> BudgetPlan:
        if config.iterations is not None:
            return explicit_plan(self.config, config.iterations, config.num_steps)
        if config.budget is None:
            raise ValueError("`budget`=None and `iterations`=None: give a budget, or `num_steps` with `iterations`.")
        return plan_budget(self.config, config.budget, config.num_steps, config.allocation)

    def _reveal_order(self, config: MGMGenerationConfig) -> Callable:
        order = config.order or self.default_order
        if order not in REVEAL_ORDERS:
            raise ValueError(f"`order`={order!r} must be one of {tuple(REVEAL_ORDERS)}.")
        return REVEAL_ORDERS[order]

    def _start(self, input_ids, batch_size, length, attention_mask) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The masked tokens to begin with and the attention mask, both (B, L) on the model's device."""
        longest, mask_token_id = self.config.max_position_embeddings, self.config.mask_token_id
        if batch_size is not None:
            check_whole("batch_size", batch_size, minimum=1, unit="sequences")
        if input_ids is None:
            length = check_whole("length", longest if length is None else length, minimum=1, unit="tokens")
            input_ids = torch.full((batch_size or 1, length), mask_token_id)
        elif length is not None and length != input_ids.shape[-1]:
            raise ValueError(
                f"`length`={length} must be the length {input_ids.shape[-1]} of `input_ids`: leave it out."
            )
        if input_ids.dim() != 2 or input_ids.shape[1] > longest:
            raise ValueError(
                f"`length`={input_ids.shape[-1]} (`input_ids` of shape {tuple(input_ids.shape)}) must be (batch, "
                f"length) with length at most `max_position_embeddings`={longest}."
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
        kwargs.update(zip(names, args, strict=False))
        kwargs.pop("trust_remote_code", None)
        if generation_config is not None:
            self.generation_config = self.generation_config.updated(**generation_config.to_dict())
            return
        try:
            self.generation_config = self.generation_config_class.from_pretrained(
                pretrained_model_name_or_path, _from_auto=from_auto_class, _from_pipeline=from_pipeline, **kwargs
            )
        except OSError:
            logging.get_logger(__name__).info("No generation_config.json: using the defaults of `generate`.")


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
    if any(isinstance(s, bool) or not isinstance(s, int) for s in (seed if isinstance(seed, list) else [seed or 0])):
        raise ValueError(f"`seed`={seed!r} must be a whole number or a list of them.")


def _output(tokens, plan: BudgetPlan, cost: int, residuals: list, reused: list) -> MGMGenerationOutput:
    taken = torch.tensor([[0 if r is None else len(r)] * len(tokens) for r in residuals])  # (T, B)
    table = torch.full((plan.num_steps, int(taken.max()), len(tokens)), float("nan"))  # (T, N, B)
    for step, values in enumerate(residuals):
        if values is not None:
            table[step, : len(values)] = values.cpu()
    return MGMGenerationOutput(
        sequences=tokens,
        block_evaluations=cost,
        block_evaluations_per_sequence=torch.full((len(tokens),), cost),
        num_steps=plan.num_steps,
        iterations=plan.iterations,
        iterations_taken=taken,
        residuals=table,
        reused=[{name: share.item() for name, share in shares.items()} for shares in reused],
    )


__all__ = ["GenerationStep", "MGMGenerationConfig", "MGMGenerationMixin", "MGMGenerationOutput"]
