# SPDX-License-Identifier: Apache-2.0
"""What `generate` reports: a step to the callback, and what a run spent and measured.

Shapes: B batch, R rows that the denoiser runs (B, or 2B with guidance), L length, D hidden size, T denoising steps,
N iterations.
"""

import time
from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput

from .budget import BudgetPlan
from .generation_config_mgm import MGMGenerationConfig
from .reuse import REUSE_STATES
from .runs import Runs


@dataclass
class MGMGenerationOutput(ModelOutput):
    """Output of `generate(return_dict_in_generate=True)`.

    Args:
        sequences (`torch.LongTensor`): (B, L) tokens; with `stop_at_eos` no longer than the longest row.
        lengths (`torch.LongTensor`): (B,) tokens written; with `stop_at_eos` up to the end of the text and with it.
        block_evaluations (`int`): Block evaluations of the most costly sequence; never above the budget. Where
            positions are frozen, those of single positions divided by their number, rounded up.
        block_evaluations_per_sequence (`torch.LongTensor`): (B,).
        full_block_evaluations (`int`): What the same steps and iterations would have cost with no position frozen.
        guidance_evaluations (`int`): Further block evaluations of the most costly sequence without its class, for
            guidance; 0 without guidance. The budget does not count them.
        num_steps (`int`): Denoising steps T taken: fewer than planned where all is written earlier.
        num_steps_per_sequence (`torch.LongTensor`): (B,) steps that ran for each sequence.
        tokens_per_step (`float`): Tokens written, over the steps that ran to write them, all sequences together.
        tokens_per_second (`float`): Tokens written by the batch, over the time of its steps.
        iterations (`list[int]`): Fixed-point iterations planned for each step taken.
        iterations_taken (`torch.LongTensor`): (T, B) iterations run.
        positions_computed (`torch.LongTensor`): (T, B) positions that were not frozen, registers among them; 0 where a
            row did not run.
        residuals (`torch.Tensor`): (T, max N, B) relative residual of each iteration; NaN where none was taken.
        reused (`list[dict[str, float]]`): Per step, the share of real positions in each reuse state ("changed",
            "unchanged", "masked", "remasked"); an empty dict where nothing was reused.
        tuned_plan (`dict`, *optional*): What [`MGMGenerationConfig.tuned_plans`] holds for the budget, where it was
            used.
    """

    sequences: torch.LongTensor | None = None
    lengths: torch.LongTensor | None = None
    block_evaluations: int | None = None
    block_evaluations_per_sequence: torch.LongTensor | None = None
    full_block_evaluations: int | None = None
    guidance_evaluations: int | None = None
    num_steps: int | None = None
    num_steps_per_sequence: torch.LongTensor | None = None
    tokens_per_step: float | None = None
    tokens_per_second: float | None = None
    iterations: list | None = None
    iterations_taken: torch.LongTensor | None = None
    positions_computed: torch.LongTensor | None = None
    residuals: torch.Tensor | None = None
    reused: list | None = None
    tuned_plan: dict | None = None


@dataclass(frozen=True)
class GenerationStep:
    """What a callback sees after a step.

    Args:
        step (`int`): 0 for the first.
        num_steps (`int`): Denoising steps T planned; fewer are taken where all is written earlier.
        time (`float`): Diffusion time t at which the denoiser ran, the mean of the sequences where an adaptive order
            has them at different ones; models without time do not see it.
        sequences (`torch.LongTensor`): (B, L) tokens after the step, the mask id where still unknown.
        revealed (`torch.BoolTensor`): (B, L) positions revealed by this step.
        fixed_point_state (`torch.Tensor`): (B, L, D) h*, where L counts registers too, or `None` without fixed-point
            layers; under guidance that of the rows with their class. Of a row that did not run, whose residuals are
            NaN, it says nothing.
        residuals (`torch.Tensor`): (N, B) of this step's iterations, or `None`.
    """

    step: int
    num_steps: int
    time: float
    sequences: torch.LongTensor
    revealed: torch.BoolTensor
    fixed_point_state: torch.Tensor | None
    residuals: torch.Tensor | None

    @classmethod
    def of(cls, step, num_steps, times, sequences, revealed, state, residuals) -> "GenerationStep":
        """Of the `times` (B,), and of the first B of the denoiser's rows in `state` and `residuals`."""
        state = None if state is None else state[: len(sequences)]
        residuals = None if residuals is None else residuals[:, : len(sequences)]
        return cls(step, num_steps, times.mean().item(), sequences, revealed, state, residuals)


class Ledger:
    """What each row may spend at a step, what it has spent, and what was measured on the way.

    Args:
        plan ([`BudgetPlan`]): Planned iterations.
        model_config: Configuration with the layer counts.
        config ([`MGMGenerationConfig`]): Of the call.
        batch_size (`int`): Sequences B.
        rows (`int`): Rows R: beyond the first B, the same sequences without their class.
        width (`int`): Positions of a row, registers among them.
    """

    def __init__(
        self, plan: BudgetPlan, model_config, config: MGMGenerationConfig, batch_size: int, rows: int, width: int
    ):
        self.plan, self.config, self.batch_size, self.rows, self.width = plan, config, batch_size, rows, width
        self.began = time.perf_counter()
        self.explicit = model_config.num_pre_layers + model_config.num_post_layers
        self.shared = model_config.num_fixed_point_layers
        self.residuals: list[torch.Tensor | None] = []  # per step (N, R), None where no iteration was taken
        self.idle: list[torch.Tensor] = []  # per step (R,), rows that did not run
        self.computed: list[torch.Tensor] = []  # per step (R,), positions that were not frozen
        self.reused: list[torch.Tensor | None] = []
        self.finite: torch.Tensor | None = None

    def iterations(self, step: int) -> int | None:
        """The most iterations of this step; `None` without fixed-point layers."""
        return self.plan.iterations[step] if self.shared else None

    def skip(self) -> None:
        """Book a step that did not run."""
        self.idle.append(torch.ones(self.rows, dtype=torch.bool, device="cpu"))
        self.computed.append(torch.zeros(self.rows, dtype=torch.long, device="cpu"))
        self.residuals.append(None)
        self.reused.append(None)

    def add(
        self,
        residuals: torch.Tensor | None,
        logits: torch.Tensor,
        runs: Runs | None,
        active: torch.Tensor | None = None,
    ) -> None:
        """Book a step: its residuals (N, R), NaN where a row had stopped, whether its logits are numbers, which rows
        needed it, and which positions were `active`, (B, width) bool (`None`: all)."""
        self.idle.append(torch.zeros(self.rows, dtype=torch.bool, device="cpu") if runs is None else runs.idle)
        computed = self.width * ~self.idle[-1] if active is None else active.sum(dim=1)
        self.computed.append(computed.repeat(self.rows // len(computed)))
        self.residuals.append(residuals)
        if len(self.reused) < len(self.idle):
            self.reused.append(None)
        finite = logits.isfinite().all()
        self.finite = finite if self.finite is None else self.finite & finite

    def close(self, tokens: torch.Tensor, lengths: torch.Tensor) -> "torch.LongTensor | MGMGenerationOutput":
        """What `generate` returns, of the `tokens` (B, L) and how many of each row's are written, `lengths` (B,).

        Raises:
            `ValueError`: if some logits were not numbers.
        """
        if self.finite is not None and not self.finite:
            raise ValueError(
                "the model gives logits that are not finite, so no token can be drawn. If its weights are not finite "
                "(`all(p.isfinite().all() for p in model.parameters())`), lower the learning rate they came from. If "
                f"they are, its shared block is no contraction, and under `reuse`={self.config.reuse!r} its state "
                "grows from step to step: use `reuse`='none', or train with `input_injection`='diagonal'. A large "
                f"`guidance_scale` (here {self.config.guidance_scale:g}) can be too much for them, too."
            )
        if not self.config.return_dict_in_generate:
            return tokens
        seconds = time.perf_counter() - self.began
        float32 = {"dtype": torch.float32, "device": "cpu"}
        residuals = [torch.empty(0, self.rows, **float32) if r is None else r.cpu() for r in self.residuals]
        size = (len(residuals), max(map(len, residuals)), self.rows)
        table = torch.full(size, float("nan"), **float32)  # (T, N, R)
        for row, values in zip(table, residuals, strict=True):
            row[: len(values)] = values
        taken = (~table.isnan()).sum(dim=1)  # (T, R)
        steps = (~torch.stack(self.idle)).sum(dim=0)  # (R,) that ran
        blocks = ~torch.stack(self.idle) * self.explicit + taken * self.shared  # (T, R), at all positions
        computed = torch.stack(self.computed)  # (T, R)
        cost = ((blocks * computed).sum(dim=0) + self.width - 1) // self.width  # (R,), rounded up
        own = slice(self.batch_size)
        lengths = lengths.cpu()
        written = int(lengths.sum())
        return MGMGenerationOutput(
            sequences=tokens,
            lengths=lengths,
            block_evaluations=int(cost[own].max()),
            block_evaluations_per_sequence=cost[own],
            full_block_evaluations=int(blocks.sum(dim=0)[own].max()),
            guidance_evaluations=int(cost[self.batch_size :].max()) if self.rows > self.batch_size else 0,
            num_steps=len(self.idle),
            num_steps_per_sequence=steps[own],
            tokens_per_step=written / max(1, int(steps[own].sum())),
            tokens_per_second=written / seconds,
            iterations=self.plan.iterations[: len(self.idle)],
            iterations_taken=taken[:, own],
            positions_computed=computed[:, own],
            residuals=table[:, :, own],
            reused=[{} if r is None else dict(zip(REUSE_STATES, r.tolist(), strict=True)) for r in self.reused],
        )
