# SPDX-License-Identifier: Apache-2.0
"""MAUVE: the gap between the distributions of generated and of human text (Section F.1.5)."""

import base64
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..models.arguments import check_whole
from ..models.modes import evaluating
from ..models.text_input import encode_text, padded, text_list
from .judge import Judge, check_positions, load_judge
from .store import ResultStore, digest, finish


def mauve_score(
    texts: Iterable[str],
    references: Iterable[str],
    featurizer: str | Path | Judge | Callable[[list[str]], np.ndarray] = "gpt2-large",
    *,
    num_samples: int = 5000,
    max_length: int | None = None,
    batch_size: int | None = None,
    scaling_factor: float = 5.0,
    seed: int = 25,
    cache_dir: str | Path | None = None,
) -> dict[str, Any]:
    """MAUVE of generated texts against references, by the authors' package mauve-text (GPL-3.0, not part of fpmgm).

    The score moves with the number of texts, their length, the features and the scaling factor: compare scores of one
    protocol only.

    Args:
        texts, references (`Iterable[str]`): Generated and human texts; the first `num_samples` of each are used.
        featurizer (`str`, `Path`, [`Judge`] or `Callable`, defaults to `"gpt2-large"`): A causal language model, whose
            last hidden state at a text's last token is its feature, or a function from texts to an array (N, D).
        num_samples (`int`, defaults to 5000): Texts on each side.
        max_length (`int`, *optional*): Tokens of a text that a language model reads. `None`: 1024.
        batch_size (`int`, *optional*): Texts per batch of a language model. `None`: 8.
        scaling_factor (`float`, defaults to 5.0): The constant c of the divergence curve.
        seed (`int`, defaults to 25): Of the clustering; both defaults are the package's.
        cache_dir (`str` or `Path`, *optional*): Keeps a language model's features of finished batches. `None`: nothing
            is kept.

    Returns:
        `dict`: `mauve` in (0, 1], higher is closer; `mauve_star`, its smoothed variant; and the `protocol`.

    Raises:
        `ValueError`: if either side has fewer than `num_samples` texts, a function is given what only a language model
            takes, or `max_length` is beyond the model.
        `ImportError`: if mauve-text is not installed.
    """
    check_whole("num_samples", num_samples, minimum=1, unit="texts")
    texts, references = text_list(texts), text_list(references, "references")
    check_count("texts", texts, num_samples)
    check_count("references", references, num_samples)
    if callable(featurizer):
        given = {"max_length": max_length, "batch_size": batch_size, "cache_dir": cache_dir}
        given = {name: value for name, value in given.items() if value is not None}
        if given:
            raise ValueError(f"{given} is for a language model, but `featurizer` is a function: leave it out.")
        name, features = getattr(featurizer, "__name__", type(featurizer).__name__), featurizer
    else:
        judge = load_judge(featurizer)
        max_length = 1024 if max_length is None else check_whole("max_length", max_length, minimum=1, unit="tokens")
        batch_size = 8 if batch_size is None else check_whole("batch_size", batch_size, minimum=1, unit="texts")
        check_positions(judge, max_length)
        name = f"{judge.name}, last hidden state at the last token"

        def features(chunk: list[str]) -> np.ndarray:
            return last_token_features(judge, chunk, max_length, batch_size, cache_dir)

    generated, human = (np.asarray(features(given[:num_samples])) for given in (texts, references))
    found = mauve_of_features(generated, human, scaling_factor, seed)
    return {
        "mauve": float(found.mauve),
        "mauve_star": float(found.mauve_star),
        "protocol": {
            "metric": "MAUVE",
            "featurizer": name,
            "max_length": max_length,
            "num_samples": num_samples,
            "num_references": num_samples,
            "num_buckets": found.num_buckets,
            "scaling_factor": scaling_factor,
            "seed": seed,
        },
    }


def check_count(name: str, texts: list[str], num_samples: int) -> None:
    """Raise where there is no MAUVE of so many of these texts: without its package, and for fewer of them."""
    _package()
    if len(texts) < num_samples:
        raise ValueError(
            f"`{name}` are {len(texts)}, fewer than `num_samples`={num_samples}: give more texts, or a smaller "
            "`num_samples` for both sides (scores of different numbers do not compare)."
        )


def mauve_of_features(generated: np.ndarray, human: np.ndarray, scaling_factor: float = 5.0, seed: int = 25) -> Any:
    """What mauve-text finds for two sets of features, (N, D): `mauve`, `mauve_star`, `num_buckets`, …"""
    return _package().compute_mauve(generated, human, mauve_scaling_factor=scaling_factor, seed=seed)


def _package() -> Any:
    try:
        import mauve
    except ImportError as error:
        raise ImportError("MAUVE needs mauve-text: pip install 'fpmgm[eval]'") from error
    return mauve


def last_token_features(
    judge: Judge,
    texts: list[str],
    max_length: int = 1024,
    batch_size: int = 8,
    cache_dir: str | Path | None = None,
) -> np.ndarray:
    """(N, D) float32: the judge's last hidden state at each text's last token, of at most `max_length`.

    An empty text is the judge's end of text.
    """
    protocol = {"feature": "last hidden state", "judge_weights": judge.weights, "judge_reading": judge.reading}
    protocol["max_length"] = max_length
    store, keys = ResultStore(cache_dir, protocol), [digest(text) for text in texts]
    starts = range(0, len(texts), batch_size)

    def encode(index: int) -> list[str]:
        features = _batch_features(judge, texts[starts[index] : starts[index] + batch_size], max_length)
        return [base64.b64encode(row.tobytes()).decode() for row in features]

    found = finish(store, [keys[start : start + batch_size] for start in starts], encode)
    return np.stack([np.frombuffer(base64.b64decode(found[key]), dtype=np.float32) for key in keys])


@torch.no_grad()
def _batch_features(judge: Judge, texts: list[str], max_length: int) -> np.ndarray:
    encoded = encode_text(judge.tokenizer, texts)
    if not all(encoded) and judge.tokenizer.eos_token_id is None:
        raise ValueError(
            f"`texts` has one without a token, and the tokenizer of {judge.name!r} no end of text that could stand "
            "for it: leave it out."
        )
    input_ids, real = padded((ids or [judge.tokenizer.eos_token_id])[:max_length] for ids in encoded)  # (B, L)
    device = judge.model.device
    with evaluating(judge.model):
        states = judge.model.base_model(input_ids.to(device), attention_mask=real.long().to(device)).last_hidden_state
    return states[torch.arange(len(real)), real.sum(dim=1) - 1].float().cpu().numpy()  # (B, D)
