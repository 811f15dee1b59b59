# SPDX-License-Identifier: Apache-2.0
"""Likelihood of text under a masked generative model: the evidence lower bound and the perplexity that follows.

−log p(x) ≤ E_t [ 1/t · Σ over masked positions of −log p(token | what is visible at t) ], with the training's schedule
(Section 2, equation 2 weighted by the ELBO's weight).

Shapes: N sequences, B of a batch, L tokens of the longest, P masked positions of a batch, R draws.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..models.arguments import SEED, check_whole
from ..models.head import losses_of_positions
from ..models.modes import evaluating
from ..models.noise import (
    antithetic_times,
    loss_weight,
    mask_uniforms,
    masked_probability,
    stream_generator,
)
from ..models.text_input import padded, scored_rows
from .store import ResultStore, configuration, digest, fingerprint, finish


logger = logging.get_logger(__name__)

FIRST_DRAWS, MOST_DRAWS = 4, 256  # where `num_draws` is left to the error
RELATIVE_ERROR = 0.02  # of a perplexity, the standard error over draws


def elbo_perplexity(
    model: PreTrainedModel,
    sequences: Iterable[Sequence[int]],
    *,
    num_draws: int | None = None,
    num_iterations: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    cache_dir: str | Path | None = None,
    progress_bar: bool = False,
) -> dict[str, Any]:
    """Upper bound of the perplexity per token, by passes over the text with antithetic times.

    In a pass each sequence is masked once; the N times are spread evenly over the interval from a shift of the pass.
    The noise depends on `seed`, the pass and the sequence's place only: two models, or two numbers of iterations, see
    the same masks. With `torch.distributed` initialized, the processes share the batches and all return the same.

    Args:
        model (`PreTrainedModel`): A masked generative model of text.
        sequences (`Dataset` or `Iterable[Sequence[int]]`): N sequences of token ids of at most the model's length, as
            in training: what `fpmgm.data.pack` gives. Rows with a `completion_mask` or `labels`, as of
            `fpmgm.trainers.encode_prompts`, are scored where these say, and visible elsewhere.
        num_draws (`int`, *optional*): Passes R. `None`: as many as bring the standard error of the perplexity under
            2 %, from 4 to 256.
        num_iterations (`int`, *optional*): Fixed-point iterations. `None`: the model's `num_fixed_point_iterations`.
        batch_size (`int`, defaults to 8): Sequences per batch.
        seed (`int`, defaults to 0): Of times and masks.
        cache_dir (`str` or `Path`, *optional*): Keeps finished batches. `None`: nothing is kept.
        progress_bar (`bool`, defaults to `False`): Whether to show the batches.

    Returns:
        `dict`: `perplexity`, with `perplexity_standard_error` over the passes (`None` for one pass); `nats_per_token`,
        its logarithm; `standard_error_draws`, that of `nats_per_token` over the passes, the noise of the estimate for
        this text; `standard_error_texts`, over the sequences, what another text of the same kind may change; and the
        `protocol`.

    Raises:
        `ValueError`: if there is no sequence, one is empty, too long, no row of ids or holds the mask id, or
            iterations are asked of a model without fixed-point layers.
    """
    nats, lengths, protocol = elbo_draws(
        model, sequences, num_draws=num_draws, num_iterations=num_iterations, batch_size=batch_size, seed=seed,
        cache_dir=cache_dir, progress_bar=progress_bar,
    )  # fmt: skip
    return {**_summary(nats, lengths), "protocol": protocol}


def elbo_draws(
    model: PreTrainedModel,
    sequences: Iterable[Sequence[int]],
    *,
    num_draws: int | None = None,
    num_iterations: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    cache_dir: str | Path | None = None,
    progress_bar: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """What [`elbo_perplexity`], with the same arguments, takes the mean of: −ELBO in nats of each pass and sequence,
    (R, N) float64; the scored tokens of each sequence, (N,); and the protocol."""
    rows, scored = scored_rows(sequences, mask_token_id=model.config.mask_token_id)
    _check_rows(rows, scored, model.config)
    batch_size = check_whole("batch_size", batch_size, minimum=1, unit="sequences")
    seed = SEED.check("seed", seed)
    if num_draws is not None:
        check_whole("num_draws", num_draws, minimum=1, unit="passes")
    num_iterations = check_iterations("num_iterations", num_iterations, model.config)
    protocol = {
        "metric": "negative ELBO per token",
        "model": model.name_or_path,
        "model_weights": fingerprint(model),
        "model_configuration": configuration(model),
        "text": digest(rows),
        "num_sequences": len(rows),
        "num_tokens": sum(map(sum, scored)),
        "times": "antithetic over the sequences of a pass, in [1e-3, 1]",
        "num_iterations": num_iterations,
        "seed": seed,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    if not all(map(all, scored)):
        protocol["scored"] = digest(scored)
    store = ResultStore(cache_dir, protocol)  # passes are independent: more of them go on from fewer
    count = len(rows)
    spans = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    lengths = torch.tensor([sum(positions) for positions in scored])

    def passes(number: int) -> torch.Tensor:
        """(`number`, N) −ELBO of each pass and sequence."""
        batches = [(draw, span) for draw in range(number) for span in spans]

        def bound(index: int) -> list[float]:
            draw, span = batches[index]
            noise = corruption(span, count, model.config.max_position_embeddings, (seed, "likelihood", draw))
            batch = ([some[row] for row in span] for some in (rows, scored))
            return negative_elbo(model, *batch, *noise, num_iterations).tolist()

        keys = [[f"{draw}:{row}" for row in span] for draw, span in batches]
        found = finish(store, keys, bound, "likelihood" if progress_bar else None)
        return torch.tensor([[found[f"{draw}:{row}"] for row in range(count)] for draw in range(number)]).double()

    nats = passes(FIRST_DRAWS if num_draws is None else num_draws)
    while num_draws is None and (needed := _draws_needed(nats, lengths)) > len(nats):
        nats = passes(needed)
    return nats, lengths, {**protocol, "num_draws": len(nats)}


def _check_rows(rows: list[list[int]], scored: list[list[bool]], config) -> None:
    if not rows or min(map(sum, scored)) == 0:
        raise ValueError(
            "`sequences` must hold at least one sequence, and none of them empty or without a position to score."
        )
    for i, row in enumerate(rows):
        if len(row) > config.max_position_embeddings or not 0 <= min(row) <= max(row) < config.vocab_size:
            raise ValueError(
                f"`sequences`[{i}] has {len(row)} tokens, ids from {min(row)} to {max(row)}: the model reads "
                f"{config.max_position_embeddings} of a vocabulary of {config.vocab_size}."
            )


def check_iterations(name: str, iterations: int | None, config) -> int | None:
    """Fixed-point iterations, which messages call `name`; `None`: the configuration's, or none without such layers."""
    if config.num_fixed_point_layers == 0:
        if iterations is not None:
            raise ValueError(f"`{name}`={iterations!r}, but the model has no fixed-point layers: leave it out.")
        return None
    if iterations is None:
        return config.num_fixed_point_iterations
    return check_whole(name, iterations, minimum=1, unit="fixed-point iterations")


def _draws_needed(nats: torch.Tensor, lengths: torch.Tensor) -> int:
    """Passes that the standard error asks for, from those done (R, N); at most twice as many at a time."""
    done, error = len(nats), _summary(nats, lengths)["standard_error_draws"]
    if not nats.any() and done < MOST_DRAWS:  # nothing was masked, which tells nothing
        return min(2 * done, MOST_DRAWS)
    if error <= RELATIVE_ERROR:
        return done
    if done >= MOST_DRAWS:
        logger.warning(
            f"After {done} passes the standard error of the perplexity is {error:.1%}: give more text, or say by "
            "`num_draws` how many passes you want."
        )
        return done
    return min(math.ceil(done * (error / RELATIVE_ERROR) ** 2), 2 * done, MOST_DRAWS)


def corruption(rows: range, total: int, length: int, key: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """Times (B,) and uniforms (B, L) of the sequences `rows` among `total`: antithetic in a pass named by `key`."""
    shift = torch.rand((), generator=stream_generator(*key, "shift")).item()
    return antithetic_times(shift, torch.tensor(rows), total), mask_uniforms(length, *((*key, row) for row in rows))


@torch.no_grad()
def negative_elbo(
    model: PreTrainedModel,
    sequences: Sequence[Sequence[int]],
    scored: Sequence[Sequence[bool]],
    times: torch.Tensor,
    uniforms: torch.Tensor,
    num_iterations: int | None = None,
) -> torch.Tensor:
    """(B,) one draw of −ELBO of each sequence in nats, masked where its uniforms are under the schedule's share.

    Args:
        model (`PreTrainedModel`): A masked generative model of text.
        sequences (`Sequence[Sequence[int]]`): B sequences.
        scored (`Sequence[Sequence[bool]]`): Which of their positions are masked and scored.
        times (`torch.Tensor`): (B,) in (0, 1].
        uniforms (`torch.Tensor`): (B, at least L) in [0, 1).
        num_iterations (`int`, *optional*): Fixed-point iterations. `None`: the model's own number.
    """
    (clean, real), candidates = padded(sequences), padded(scored)[0].bool()  # (B, L)
    masked = (uniforms[:, : clean.shape[1]] < masked_probability(times)[:, None]) & candidates
    positions = masked.flatten().nonzero().squeeze(1)  # (P,)
    totals = torch.zeros(len(clean), dtype=torch.float64)
    if len(positions) == 0:
        return totals
    device, targets = model.device, clean.flatten()[positions].to(model.device)  # (P,)
    noisy = clean.masked_fill(masked, model.config.mask_token_id)
    with evaluating(model):
        losses = losses_of_positions(
            model,
            targets,
            input_ids=noisy.to(device),
            timesteps=times.to(device),
            attention_mask=None if bool(real.all()) else real.long().to(device),
            num_iterations=num_iterations,
            logits_positions=positions,
        )
    totals.index_add_(0, positions // clean.shape[1], losses.cpu())
    return totals * loss_weight(times.double())


def _summary(nats: torch.Tensor, lengths: torch.Tensor) -> dict[str, float | None]:
    """Mean, perplexity and standard errors from the −ELBO of each pass and sequence, (R, N)."""
    tokens = lengths.sum()
    draws = nats.sum(dim=1) / tokens  # (R,) nats per token of each pass
    mean = draws.mean().item()
    deviations = nats.mean(dim=0) - mean * lengths  # (N,) of a ratio of sums
    count = len(lengths)
    spread = (deviations.square().sum() * count / max(count - 1, 1)).sqrt() / tokens
    perplexity = math.exp(min(mean, 700))
    error = draws.std().item() / math.sqrt(len(draws)) if len(draws) > 1 else None
    return {
        "perplexity": perplexity,
        "perplexity_standard_error": None if error is None else perplexity * error,
        "nats_per_token": mean,
        "standard_error_draws": error,
        "standard_error_texts": spread.item() if count > 1 else None,
    }
