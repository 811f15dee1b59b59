# SPDX-License-Identifier: Apache-2.0
"""Likelihood of text under a masked generative model: the evidence lower bound and the perplexity that follows.

−log p(x) ≤ E_t [ 1/t · Σ over masked positions of −log p(token | what is visible at t) ], with the training's schedule
(Section 2, equation 2 weighted by the ELBO's weight).

Shapes: N sequences, B of a batch, L tokens of the longest, P masked positions of a batch, R draws.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ..models.noise import (
    antithetic_times,
    loss_weight,
    mask_tokens,
    mask_uniforms,
    masked_probability,
    stream_generator,
)
from .store import ResultStore, digest, fingerprint, finish


def elbo_perplexity(
    model: PreTrainedModel,
    sequences: Sequence[Sequence[int]],
    *,
    num_draws: int = 1,
    num_iterations: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    cache_dir: str | Path | None = None,
    progress_bar: bool = False,
) -> dict[str, Any]:
    """Upper bound of the perplexity per token, by `num_draws` passes over the text with antithetic times.

    In a pass each sequence is masked once; the N times are spread evenly over the interval from a shift of the pass.
    The noise depends on `seed`, the pass and the sequence's place only: two models, or two numbers of iterations, see
    the same masks. With `torch.distributed` initialized, the processes share the batches and all return the same.

    Args:
        model (`PreTrainedModel`): A masked generative model of text.
        sequences (`Sequence[Sequence[int]]`): N sequences of token ids of at most the model's length, as in training
            (see `fpmgm.data.pack`).
        num_draws (`int`, defaults to 1): Passes R.
        num_iterations (`int`, *optional*): Fixed-point iterations. `None`: the model's `num_fixed_point_iterations`.
        batch_size (`int`, defaults to 8): Sequences per batch.
        seed (`int`, defaults to 0): Of times and masks.
        cache_dir (`str` or `Path`, *optional*): Keeps finished batches. `None`: nothing is kept.
        progress_bar (`bool`, defaults to `False`): Whether to show the batches.

    Returns:
        `dict`: `perplexity`; `nats_per_token`, its logarithm; `standard_error_draws`, that of `nats_per_token` over
        the passes, the noise of the estimate for this text (`None` for one pass); `standard_error_texts`, over the
        sequences, what another text of the same kind may change; and the `protocol`.

    Raises:
        `ValueError`: if there is no sequence, or iterations are asked of a model without fixed-point layers.
    """
    if len(sequences) == 0 or min(map(len, sequences)) == 0:
        raise ValueError("`sequences` must hold at least one sequence, and none of them empty.")
    layers = model.config.num_fixed_point_layers
    if num_iterations is not None and layers == 0:
        raise ValueError(f"`num_iterations`={num_iterations}, but the model has no fixed-point layers: leave it out.")
    if num_iterations is None and layers:
        num_iterations = model.config.num_fixed_point_iterations
    protocol = {
        "metric": "negative ELBO per token",
        "model": model.name_or_path,
        "model_weights": fingerprint(model),
        "text": digest([list(map(int, row)) for row in sequences]),
        "num_sequences": len(sequences),
        "num_tokens": sum(map(len, sequences)),
        "num_draws": num_draws,
        "times": "antithetic over the sequences of a pass, in [1e-3, 1]",
        "num_iterations": num_iterations,
        "seed": seed,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    # Passes are independent: more of them go on from fewer.
    store = ResultStore(cache_dir, {k: v for k, v in protocol.items() if k != "num_draws"})
    count = len(sequences)
    spans = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    batches = [(draw, rows) for draw in range(num_draws) for rows in spans]

    def bound(index: int) -> list[float]:
        draw, rows = batches[index]
        noise = corruption(rows, count, model.config.max_position_embeddings, (seed, "likelihood", draw))
        return negative_elbo(model, [sequences[row] for row in rows], *noise, num_iterations).tolist()

    keys = [[f"{draw}:{row}" for row in rows] for draw, rows in batches]
    found = finish(store, keys, bound, "likelihood" if progress_bar else None)
    nats = torch.tensor([[found[f"{draw}:{row}"] for row in range(count)] for draw in range(num_draws)])  # (R, N)
    return {**_summary(nats.double(), torch.tensor([len(row) for row in sequences])), "protocol": protocol}


def corruption(rows: range, total: int, length: int, key: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """Times (B,) and uniforms (B, L) of the sequences `rows` among `total`: antithetic in a pass named by `key`."""
    shift = torch.rand((), generator=stream_generator(*key, "shift")).item()
    return antithetic_times(shift, torch.tensor(rows), total), mask_uniforms(length, *((*key, row) for row in rows))


@torch.no_grad()
def negative_elbo(
    model: PreTrainedModel,
    sequences: Sequence[Sequence[int]],
    times: torch.Tensor,
    uniforms: torch.Tensor,
    num_iterations: int | None = None,
) -> torch.Tensor:
    """(B,) one draw of −ELBO of each sequence in nats, masked where its uniforms are under the schedule's share.

    Args:
        model (`PreTrainedModel`): A masked generative model of text.
        sequences (`Sequence[Sequence[int]]`): B sequences.
        times (`torch.Tensor`): (B,) in (0, 1].
        uniforms (`torch.Tensor`): (B, at least L) in [0, 1).
        num_iterations (`int`, *optional*): Fixed-point iterations. `None`: the model's own number.
    """
    rows = [torch.as_tensor(row, dtype=torch.long) for row in sequences]
    clean = pad_sequence(rows, batch_first=True)  # (B, L)
    lengths = torch.tensor([len(row) for row in rows])
    real = torch.arange(clean.shape[1]) < lengths[:, None]
    masked = (uniforms[:, : clean.shape[1]] < masked_probability(times)[:, None]) & real
    positions = masked.flatten().nonzero().squeeze(1)  # (P,)
    totals = torch.zeros(len(rows), dtype=torch.float64)
    if len(positions) == 0:
        return totals
    device, targets = model.device, clean.flatten()[positions].to(model.device)  # (P,)
    noisy, labels = mask_tokens(clean, masked, model.config.mask_token_id)
    losses = torch.zeros(len(positions), dtype=torch.float64)

    def collect(logits: torch.Tensor, chunk: slice) -> torch.Tensor:  # the logits are never all there at once
        losses[chunk] = F.cross_entropy(logits, targets[chunk], reduction="none").double().cpu()
        return logits.new_zeros(())

    model(
        noisy.to(device),
        labels=labels.to(device),
        timesteps=times.to(device),
        attention_mask=None if bool(real.all()) else real.long().to(device),
        num_iterations=num_iterations,
        logits_positions=positions,
        logits_loss=collect,
    )
    totals.index_add_(0, positions // clean.shape[1], losses)
    return totals * loss_weight(times.double())


def _summary(nats: torch.Tensor, lengths: torch.Tensor) -> dict[str, float | None]:
    """Mean, perplexity and standard errors from the −ELBO of each pass and sequence, (R, N)."""
    tokens = lengths.sum()
    draws = nats.sum(dim=1) / tokens  # (R,) nats per token of each pass
    mean = draws.mean().item()
    deviations = nats.mean(dim=0) - mean * lengths  # (N,) of a ratio of sums
    count = len(lengths)
    spread = (deviations.square().sum() * count / max(count - 1, 1)).sqrt() / tokens
    return {
        "perplexity": math.exp(min(mean, 700)),
        "nats_per_token": mean,
        "standard_error_draws": draws.std().item() / math.sqrt(len(draws)) if len(draws) > 1 else None,
        "standard_error_texts": spread.item() if count > 1 else None,
    }
