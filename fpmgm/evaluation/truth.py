# SPDX-License-Identifier: Apache-2.0
"""A causal language model as the truth: texts without end whose every probability is known, and a judge of others.

For a model q of the truth p, per token and in nats, where H = −E_p log p is the truth's entropy rate:

    excess of samples       −E_q log p − H     0 is perfect; a lower entropy of q can push it below
    excess of likelihood    −ELBO of q on texts of p, − H, at least 0 but for noise

Both are in the truth's own tokens, without a tokenizer between.

Shapes: N texts, B of a batch, L tokens of a text without the start token, V vocabulary, D width of the truth, R draws.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from ..models.arguments import check_whole
from ..models.modes import evaluating
from ..models.noise import stream_generator
from ..models.text_input import token_rows
from .distances import energy_distance
from .judge import summary
from .likelihood import elbo_draws
from .mauve import mauve_of_features
from .store import digest, fingerprint


@dataclass(frozen=True)
class TruthJudge:
    """A causal language model that scores ids by what they would be worth as its own.

    Args:
        name (`str`): What its scores carry.
        model (`PreTrainedModel`): The truth, with a `bos_token_id`.
        references (`torch.LongTensor`): (N, L) texts of its own, such as those of [`sample_texts`].
        surprise (`torch.Tensor`): (N,) −log p of each of them, in nats. Its mean estimates the entropy rate.

    Raises:
        `ValueError`: for fewer than two references, whose error nothing tells, or another number of surprises.

    Example:

    ```python
    >>> from fpmgm.evaluation import load_truth
    >>> judge = load_truth("worlds/stories260K", length=128)  # doctest: +SKIP
    >>> judge.generative_perplexity(model.generate(batch_size=64, budget=96))["excess"]  # doctest: +SKIP

    ```
    """

    name: str
    model: PreTrainedModel
    references: torch.LongTensor
    surprise: torch.Tensor

    def __post_init__(self):
        if len(self.references) < 2 or len(self.surprise) != len(self.references):
            raise ValueError(
                f"`references` are {len(self.references)} and `surprise` {len(self.surprise)}: give two texts at "
                "least, and the surprise of each."
            )

    @cached_property
    def weights(self) -> str:
        """Short name of the weights and the references, which scores on disk carry."""
        return digest([fingerprint(self.model), self.references.tolist()])

    @property
    def length(self) -> int:
        """Tokens L of a text; the entropy rate is that of this length."""
        return self.references.shape[1]

    @property
    def entropy_rate(self) -> float:
        """Nats per token of the truth, estimated on its references."""
        return self.surprise.mean().item() / self.length

    @property
    def entropy_rate_standard_error(self) -> float:
        """Over the references."""
        return self.surprise.std().item() / self.length / math.sqrt(len(self.surprise))

    @torch.no_grad()
    def log_probabilities(self, sequences: Sequence[Sequence[int]], batch_size: int = 64) -> torch.Tensor:
        """(N, L) float64: log p of each token given the start token and those before it; −∞ for ids beyond V."""
        rows, start, device = self._checked(sequences), check_truth(self.model, self.length), self.model.device
        found = []
        for batch in rows.split(batch_size):
            known = batch.clamp(max=self.model.config.vocab_size - 1).to(device)
            given = torch.cat([torch.full_like(known[:, :1], start), known[:, :-1]], dim=1)  # (B, L)
            with evaluating(self.model):
                log_p = self.model(given).logits.double().log_softmax(dim=-1)  # (B, L, V)
            log_p = log_p.gather(2, known[:, :, None]).squeeze(2)
            found.append(log_p.cpu().masked_fill(batch != known.cpu(), -math.inf))
        return torch.cat(found)

    @torch.no_grad()
    def features(self, sequences: Sequence[Sequence[int]], batch_size: int = 64) -> np.ndarray:
        """(N, D) float32: the truth's last hidden state, the mean over a text's tokens."""
        rows, device = self._checked(sequences), self.model.device
        rows = rows.clamp(max=self.model.config.vocab_size - 1)
        with evaluating(self.model):
            states = [self.model.base_model(batch.to(device)).last_hidden_state for batch in rows.split(batch_size)]
        return torch.cat([state.float().mean(dim=1).cpu() for state in states]).numpy()

    def generative_perplexity(self, sequences: Sequence[Sequence[int]], batch_size: int = 64) -> dict[str, Any]:
        """What [`fpmgm.evaluation.generative_perplexity`] returns, of (N, L) ids; and `excess`, its logarithm less the
        entropy rate, with `excess_standard_error` over texts, the references' error included (`None` for one text).

        Raises:
            `ValueError`: for texts of another length than the references.
        """
        log_p = self.log_probabilities(sequences, batch_size)
        protocol = {
            "metric": "generative perplexity",
            "judge": self.name,
            "judge_weights": self.weights,
            "tokenization": "none: the sequences' own token ids",
            "max_length": self.length,
            "first_token": "predicted from BOS",
            "end_of_text": "scored like any token",
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "entropy_rate": self.entropy_rate,
            "entropy_rate_standard_error": self.entropy_rate_standard_error,
            "num_references": len(self.references),
        }
        means = -log_p.mean(dim=1)  # (N,)
        error = means.std().item() / math.sqrt(len(means)) if len(means) > 1 else None
        return {
            **summary([(row.sum().item(), len(row), False) for row in log_p], protocol),
            "excess": means.mean().item() - self.entropy_rate,
            "excess_standard_error": None if error is None else math.hypot(error, self.entropy_rate_standard_error),
        }

    def distances(self, sequences: Sequence[Sequence[int]], num_permutations: int = 200, seed: int = 0) -> dict:
        """How far texts are from as many of the references, on the truth's features.

        Returns:
            `dict`: `energy_distance`, with what it would be between two sets of the truth's own texts
            (`energy_distance_same`, the 2.5 % and 97.5 % quantiles over permutations); `mauve` where mauve-text is
            installed; and the `protocol`.
        """
        count = min(len(sequences), len(self.references))
        ours, theirs = self.features(sequences)[:count], self.features(self.references[:count])
        found = energy_distance(ours, theirs, num_permutations, seed)
        protocol = {
            "features": f"{self.name}, last hidden state, mean over tokens",
            "num_samples": count,
            "num_permutations": num_permutations,
            "seed": seed,
        }
        if find_spec("mauve") is not None:
            found["mauve"] = float(mauve_of_features(ours, theirs).mauve)
        return {**found, "protocol": protocol}

    def likelihood_excess(
        self, model: PreTrainedModel, num_texts: int | None = None, **options: Any
    ) -> dict[str, Any]:
        """−ELBO of a masked model on the first `num_texts` references, less the truth's own −log p of the same texts.

        Args:
            model (`PreTrainedModel`): A masked generative model of text.
            num_texts (`int`, *optional*): From 2 to the number of references. `None`: all of them.
            options: `num_draws`, `num_iterations`, `batch_size`, … of [`elbo_perplexity`].

        Returns:
            `dict`: `likelihood_excess` and its standard error over texts, in nats per token; `elbo_nats_per_token`;
            `likelihood_draws`.
        """
        most = len(self.references)
        num_texts = most if num_texts is None else check_whole("num_texts", num_texts, minimum=2, unit="texts")
        if num_texts > most:
            raise ValueError(f"`num_texts`={num_texts}, but there are {most} references: give fewer, or load more.")
        texts = self.references[:num_texts]
        nats, _, _ = elbo_draws(model, texts.tolist(), **options)  # (R, N)
        rates = nats.mean(dim=0) / self.length  # (N,)
        excess = rates - self.surprise[: len(texts)].cpu() / self.length
        return {
            "likelihood_excess": excess.mean().item(),
            "likelihood_excess_standard_error": excess.std().item() / math.sqrt(len(excess)),
            "elbo_nats_per_token": rates.mean().item(),
            "likelihood_draws": len(nats),
            "likelihood_texts": len(texts),
        }

    def _checked(self, sequences: Sequence[Sequence[int]]) -> torch.LongTensor:
        rows = token_rows(sequences)
        lengths = {len(row) for row in rows}
        if lengths != {self.length}:
            raise ValueError(
                f"`sequences` have {sorted(lengths)} tokens, but the entropy rate of {self.name!r} is known for texts "
                f"of {self.length}: sample that `length`, or load the truth for another one."
            )
        return torch.tensor(rows)


def load_truth(
    truth: str | Path, length: int, num_texts: int = 2000, seed: int = 0, device: str | torch.device | None = None
) -> TruthJudge:
    """A causal language model as the judge, with references that are sampled now.

    Args:
        truth (`str` or `Path`): Folder or hub name.
        length (`int`): Tokens of the texts to judge.
        num_texts (`int`, defaults to 2000): References; the error of the entropy rate falls with their root.
        seed (`int`, defaults to 0): Of the references.
        device (`str` or `torch.device`, *optional*): Where to run. `None`: the GPU where there is one.

    Raises:
        `ValueError`: for fewer than two texts, or if the model has no start token or too few positions.
    """
    check_whole("num_texts", num_texts, minimum=2, unit="texts")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(truth).to(device).eval()
    keys = [(seed, row) for row in range(num_texts)]
    parts = [sample_texts(model, keys[start : start + 500], length) for start in range(0, num_texts, 500)]
    references, surprise = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    return TruthJudge(f"the truth {Path(truth).name}", model, references, surprise)


@torch.no_grad()
def sample_texts(truth: PreTrainedModel, keys: Sequence[tuple], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts of a causal language model at temperature 1, each from its start token and from a key of its own.

    Keys and values are kept. A text depends on its key alone, but for rounding: how many others are drawn with it
    changes no more than that.

    Args:
        truth (`PreTrainedModel`): A causal language model with a `bos_token_id`.
        keys (`Sequence[tuple]`): One for each of the B texts, such as (seed, row): what its randomness comes from.
        length (`int`): Tokens L of a text. The start token is not one of them: it is given, and never drawn.

    Returns:
        `torch.LongTensor` (B, L) and `torch.Tensor` (B,) float64: the ids, and −log p of each text in nats.

    Raises:
        `ValueError`: if the model has no start token, or too few positions.
    """
    start, device = check_truth(truth, length), truth.device
    streams = [stream_generator(*key, "truth") for key in keys]
    uniforms = torch.stack([torch.rand(length, generator=g, dtype=torch.float64) for g in streams]).to(device)
    cache, token = DynamicCache(config=truth.config), torch.full((len(keys), 1), start, device=device)
    tokens, surprise = [], torch.zeros(len(keys), dtype=torch.float64, device=device)
    with evaluating(truth):
        for position in range(length):
            logits = truth(token, past_key_values=cache, use_cache=True).logits[:, -1].double()  # (B, V)
            log_p = logits.log_softmax(dim=-1)
            sums = log_p.exp().cumsum(dim=-1)
            drawn = uniforms[:, position, None] * sums[:, -1:]  # of the total in its own rounding
            token = torch.searchsorted(sums, drawn, right=True).clamp(max=logits.shape[-1] - 1)  # (B, 1)
            surprise -= log_p.gather(1, token).squeeze(1)
            tokens.append(token)
    return torch.cat(tokens, dim=1), surprise


def check_truth(truth: PreTrainedModel, length: int) -> int:
    """The start token of a causal language model that has room for it and `length` tokens."""
    start = truth.config.bos_token_id
    if start is None:
        raise ValueError(f"`truth`={truth.name_or_path!r} has no `bos_token_id` for its texts to start from.")
    longest = getattr(truth.config, "max_position_embeddings", length)
    if not 1 <= length <= longest:
        raise ValueError(
            f"`length`={length} must lie between 1 and the {longest} positions of `truth`={truth.name_or_path!r}."
        )
    return start
