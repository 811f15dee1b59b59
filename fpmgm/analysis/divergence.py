# SPDX-License-Identifier: Apache-2.0
"""How much predictions change while a sequence is revealed: lagged divergence of logits (Appendix F.6, Figure 11).

Shapes: B batch, L length, P positions, V vocabulary, T denoising steps, K lags.
"""

from collections import deque
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from ..models.head import chunk_rows, forbid, wide
from ..models.modes import evaluating
from .axes import finish, logarithmic_values, new_figure, save
from .solver import denoiser_call
from .trajectory import Trajectory


@torch.no_grad()
def lagged_divergence(
    model: nn.Module,
    trajectory: Trajectory,
    lags: tuple[int, ...] = (1, 2, 3, 4),
    num_iterations: int | None = None,
) -> torch.Tensor:
    """KL(p_{s+ℓ} ‖ p_s): what a prediction at step s lacks to that of ℓ steps later, with more tokens visible.

    A mean over the positions that are masked at both steps, in nats, with no probability on the mask id.

    Args:
        model (`PreTrainedModel`): Fixed-point or explicit.
        trajectory ([`Trajectory`]): The contexts; the same for models to compare.
        lags (`tuple[int, ...]`, defaults to (1, 2, 3, 4)): ℓ, at least 1.
        num_iterations (`int`, *optional*): Fixed-point iterations of each step, from h_pre; explicit models take none.
            `None`: the model's own.

    Returns:
        `torch.Tensor`: (K, T, B) at the noisier step s; NaN where no position is masked at both.
    """
    lags = tuple(lags)
    if not lags or min(lags) < 1:
        raise ValueError(f"`lags`={lags} must be at least 1 step each.")
    steps, batch_size = len(trajectory.times), trajectory.states.shape[1]
    options = {"num_iterations": num_iterations} if model.config.num_fixed_point_layers else {}
    found = torch.full((len(lags), steps, batch_size), float("nan"))
    window: deque[tuple[torch.Tensor, torch.Tensor]] = deque(maxlen=max(lags) + 1)
    for step in range(steps):
        call = denoiser_call(trajectory, step, model.device)
        with evaluating(model):
            hidden = model(**call, **options, output_logits=False).normed_hidden_state  # (B, L, D)
        window.append((call["input_ids"] == model.config.mask_token_id, hidden))
        for row, lag in zip(found, lags, strict=True):
            if lag <= step:
                row[step - lag] = _mean_divergence(model, window[-1 - lag], window[-1]).cpu()
    return found


def divergence(noisier: torch.Tensor, cleaner: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    """KL(cleaner ‖ noisier) in nats of two sets of raw logits (P, V), the mask id forbidden: (P,).

    >>> divergence(torch.tensor([[0.0, 0.0, 9.0]]), torch.tensor([[50.0, 0.0, 0.0]]), mask_token_id=2)
    tensor([0.6931])
    """
    both = (forbid(logits.to(wide(logits.dtype), copy=True), mask_token_id) for logits in (noisier, cleaner))
    log_probabilities = (logits.log_softmax(dim=-1) for logits in both)
    return F.kl_div(*log_probabilities, reduction="none", log_target=True).sum(dim=-1)


def _mean_divergence(model: nn.Module, noisier: tuple, cleaner: tuple) -> torch.Tensor:
    """(B,) of two pairs of masked positions (B, L) and head inputs (B, L, D)."""
    both = noisier[0] & cleaner[0]
    chunks = [states[both].split(chunk_rows(model.config.vocab_size, both.device)) for _, states in (noisier, cleaner)]
    parts = [
        divergence(model.lm_head(a), model.lm_head(b), model.config.mask_token_id)
        for a, b in zip(*chunks, strict=True)
    ]
    values = torch.zeros(both.shape, dtype=parts[0].dtype, device=both.device)
    return values.masked_scatter(both, torch.cat(parts)).sum(dim=1).float() / both.sum(dim=1)


def plot_lagged_divergence(
    divergences: dict[str, dict[int, torch.Tensor]], path: str | Path, lags: tuple[int, ...] = (1, 2, 3, 4)
) -> Path:
    """Draw the divergence along the steps and against their number, and what it is against that of the first model.

    Args:
        divergences (`dict[str, dict[int, torch.Tensor]]`): For each model and number of steps T what
            [`lagged_divergence`] gives, (K, T, B), on the same contexts.
        path (`str` or `Path`): Picture to write; the suffix is the format.
        lags (`tuple[int, ...]`, defaults to (1, 2, 3, 4)): As measured; curves are drawn for the first and the last.

    Returns:
        `Path` of the picture.
    """
    several = len(divergences) > 1
    figure = new_figure(14 if several else 9.5, 4.2)
    along, against, *change = figure.subplots(1, 3 if several else 2)
    reference = next(iter(divergences))
    for i, (name, by_steps) in enumerate(divergences.items()):
        longest = max(by_steps)
        for k, line in {0: "-", len(lags) - 1: "--"}.items():
            style = {"color": f"C{i}", "linestyle": line, "label": name if k == 0 else None}
            along.plot(torch.arange(longest) / longest, by_steps[longest][k].nanmean(dim=-1), **style)
            against.plot(list(by_steps), [overall(v)[k] for v in by_steps.values()], marker="o", **style)
        if name != reference:
            for marker, (steps, values) in zip("osD^v<>", by_steps.items(), strict=False):
                relative = 100 * (overall(values) / overall(divergences[reference][steps]) - 1)
                change[0].plot(lags, relative, color=f"C{i}", marker=marker, label=f"{name}, {steps} steps")
    shown = f"lag {lags[0]} (solid) and {lags[-1]} (dashed)"
    label = "mean KL from step s to s + lag (nats)"
    finish(along, log=True, title=f"{longest} steps, {shown}", xlabel="step s / number of steps T", ylabel=label)
    logarithmic_values(against, list(by_steps))
    finish(against, log=True, title=f"mean over steps, {shown}", xlabel="number of steps T", ylabel=label)
    for axes in change:
        axes.axhline(0, color="#bbbbbb", linewidth=0.8)
        labels = {"xlabel": "lag (steps)", "ylabel": "change of the mean KL (%)"}
        finish(axes, title=f"against {reference}", xticks=lags, **labels)
    return save(figure, path)


def overall(divergences: torch.Tensor) -> torch.Tensor:
    """(K,) of (K, T, B): the mean over the steps of the mean over the sequences."""
    return divergences.nanmean(dim=-1).nanmean(dim=-1)
