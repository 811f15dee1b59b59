# SPDX-License-Identifier: Apache-2.0
"""A causal language model as the judge of generated text: generative perplexity (equation 4).

Shapes: B texts of a batch, L tokens of the longest, V the judge's vocabulary.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.import_utils import is_gguf_available

from ..models.arguments import check_whole
from ..models.modes import evaluating
from ..models.text_input import encode_text, padded, read_tokenizer, special_ids, text_list, tokenizer_contents
from .store import ResultStore, configuration, digest, fingerprint, finish


@dataclass(frozen=True)
class Judge:
    """A causal language model with its tokenizer, under the name that its scores carry."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @cached_property
    def weights(self) -> str:
        """Short name of the weights, which scores on disk carry."""
        return fingerprint(self.model)

    @property
    def reading(self) -> str:
        """Short name of the configuration, the adapters that act and the tokenizer as they are now, which scores on
        disk carry too."""
        return digest([configuration(self.model), tokenizer_contents(self.tokenizer)])


def load_judge(
    judge: "str | Path | Judge" = "gpt2-large",
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Judge:
    """Load a judge; one that is loaded already is returned as it is.

    Args:
        judge (`str`, `Path` or [`Judge`], defaults to `"gpt2-large"`): Hub name or folder of a causal language model,
            or a `.gguf` file (its architecture must be one that transformers reads).
        device (`str` or `torch.device`, *optional*): Where to run. `None`: the GPU where there is one.
        dtype (`torch.dtype`, *optional*): Of the weights. `None`: `torch.float32`.

    Raises:
        `ValueError`: for a `.gguf` file that does not exist, a folder without a tokenizer that can be read, a model
            that sees the tokens that it is to predict, or the place or type of a judge that is loaded already.
        `ImportError`: for a `.gguf` file where the package gguf is not installed.
    """
    if isinstance(judge, Judge):
        if device is not None or dtype is not None:
            raise ValueError(
                f"`device`={device} and `dtype`={dtype} are for a judge that is to be loaded, not for {judge.name!r}: "
                "leave them out, or move `judge.model` before."
            )
        return judge
    name, source, options = str(judge), str(judge), {}
    if Path(judge).is_dir():
        name = Path(judge).name
    if name.endswith(".gguf"):
        path = Path(judge)
        if not path.is_file():
            raise ValueError(f"`judge`={name!r} does not exist: give a .gguf file, a folder or a hub name.")
        if not is_gguf_available():
            raise ImportError("a .gguf judge needs gguf: pip install 'fpmgm[eval]'")
        name, source, options = path.name, str(path.parent), {"gguf_file": path.name}
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = read_tokenizer(source, **options)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype or torch.float32, **options)
    judge = Judge(name, model.to(device).eval(), tokenizer)
    check_causal(judge)
    return judge


@torch.no_grad()
def check_causal(judge: Judge) -> None:
    """Raise a `ValueError` for a model whose prediction sees the token that it is of, as an encoder's does."""
    ids = torch.tensor([[0, 0], [0, 1]], device=judge.model.device)
    first, other = judge.model(ids).logits[:, 0].float()
    if (first - other).abs().max() > 0.01 * first.abs().max():
        raise ValueError(
            f"`judge`={judge.name!r}, a {type(judge.model).__name__}, sees the tokens that it is to predict: give a "
            "causal language model, such as 'gpt2-large'."
        )


def generative_perplexity(
    texts: Iterable[str],
    judge: str | Path | Judge = "gpt2-large",
    *,
    batch_size: int = 8,
    max_length: int = 1024,
    add_start_token: bool = False,
    cache_dir: str | Path | None = None,
    progress_bar: bool = False,
) -> dict[str, Any]:
    """How well a causal language model predicts generated texts, by both means in use (Section E.1).

    A text is tokenized anew by the judge and cut to `max_length`. Its first token is given, not predicted (unless
    `add_start_token`). The judge's end of text is a token in a text, of which only the first is scored; the names of
    its other special tokens are text. With `torch.distributed`
    initialized, the processes share the batches and all return the same.

    Args:
        texts (`Iterable[str]`): Generated texts.
        judge (`str`, `Path` or [`Judge`], defaults to `"gpt2-large"`): See [`load_judge`].
        batch_size (`int`, defaults to 8): Texts per batch.
        max_length (`int`, defaults to 1024): Tokens of a text that are read.
        add_start_token (`bool`, defaults to `False`): Put the judge's BOS before each text, so that the first token
            is scored too.
        cache_dir (`str` or `Path`, *optional*): Keeps the scores of finished batches, so that a run that was
            interrupted goes on. `None`: nothing is kept.
        progress_bar (`bool`, defaults to `False`): Whether to show the batches.

    Returns:
        `dict`: `generative_perplexity`, exp of the mean over texts of the mean −log p of their tokens (equation 4),
        with `generative_perplexity_standard_error` over texts; `generative_perplexity_token_weighted`, exp of the mean
        over all tokens, as the duo and SDTT evaluations report; and the `protocol`.

    Raises:
        `ValueError`: if no text has a token to score, `max_length` is beyond the judge, or it has no BOS to add.
    """
    judge, texts, batch_size = load_judge(judge), text_list(texts), check_whole("batch_size", batch_size, 1, "texts")
    max_length = _check(judge, max_length, add_start_token)
    protocol = {
        "metric": "generative perplexity",
        "judge": judge.name,
        "judge_weights": judge.weights,
        "judge_reading": judge.reading,
        "tokenization": "the text, anew, by the judge's tokenizer; of special tokens only the end of text is one",
        "max_length": max_length,
        "first_token": "predicted from BOS" if add_start_token else "given",
        "end_of_text": "the first of a text is scored, later ones are not",
        "dtype": str(judge.model.dtype).removeprefix("torch."),
    }
    store = ResultStore(cache_dir, protocol)
    keys = [digest(text) for text in texts]
    starts = range(0, len(texts), batch_size)

    def score(index: int) -> list[list]:
        chunk = texts[starts[index] : starts[index] + batch_size]
        return token_log_probabilities(judge, chunk, max_length, add_start_token)

    title = f"scoring by {judge.name}" if progress_bar else None
    found = finish(store, [keys[start : start + batch_size] for start in starts], score, title)
    return summary([found[key] for key in keys], protocol)


def summary(scores: Sequence[tuple[float, int, bool]], protocol: dict[str, Any]) -> dict[str, Any]:
    """What [`generative_perplexity`] returns, from each text's sum of log p, scored tokens, and whether it was cut."""
    scored = [(log_p, count) for log_p, count, _ in scores if count > 0]
    if not scored:
        raise ValueError("`texts` has no text of two tokens or more: there is nothing to score.")
    means = torch.tensor([-log_p / count for log_p, count in scored], dtype=torch.float64)
    tokens = sum(count for _, count in scored)
    perplexity = _exp(means.mean().item())
    error = means.std().item() / math.sqrt(len(means)) if len(means) > 1 else None
    return {
        "generative_perplexity": perplexity,
        "generative_perplexity_standard_error": None if error is None else perplexity * error,
        "generative_perplexity_token_weighted": _exp(-sum(log_p for log_p, _ in scored) / tokens),
        "protocol": {
            **protocol,
            "generative_perplexity": "exp of the mean over texts of the mean over tokens (equation 4)",
            "generative_perplexity_token_weighted": "exp of the mean over all tokens",
            "num_samples": len(scores),
            "num_unscored": len(scores) - len(scored),
            "num_truncated": sum(cut for _, _, cut in scores),
            "num_tokens": tokens,
        },
    }


def decode_for(
    judge: Judge, tokenizer: PreTrainedTokenizerBase, sequences: Sequence[Sequence[int]]
) -> tuple[list[str], str]:
    """Texts for a judge, and whether special tokens are `"kept"` in them or `"dropped"`.

    The end of text is kept where the judge's is the model's, as for models with GPT-2's tokenizer under GPT-2. Others,
    such as a BOS of its own, never are: their names would be read as text.
    """
    keep = tokenizer.eos_token is not None and tokenizer.eos_token == judge.tokenizer.eos_token
    if keep:
        others = special_ids(tokenizer) - {tokenizer.eos_token_id}
        sequences = [[token for token in row if token not in others] for row in sequences]
    return tokenizer.batch_decode(sequences, skip_special_tokens=not keep), "kept" if keep else "dropped"


@torch.no_grad()
def token_log_probabilities(
    judge: Judge, texts: list[str], max_length: int = 1024, add_start_token: bool = False
) -> list[tuple[float, int, bool]]:
    """For each text of one batch: the sum of log p over its scored tokens, their number, and whether it was cut."""
    tokenizer, device = judge.tokenizer, judge.model.device
    encoded = _encode(tokenizer, texts)
    if add_start_token:
        encoded = [[tokenizer.bos_token_id, *ids] for ids in encoded]
    cut = [len(ids) > max_length for ids in encoded]
    input_ids, real = (x.to(device) for x in padded(ids[:max_length] for ids in encoded))  # (B, L)
    if input_ids.shape[1] < 2:
        return [(0.0, 0, c) for c in cut]
    with evaluating(judge.model):
        logits = judge.model(input_ids, attention_mask=real.long()).logits[:, :-1]  # (B, L − 1, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_p = -F.cross_entropy(logits.transpose(1, 2), input_ids[:, 1:], reduction="none").double()  # (B, L − 1)
    ends = (input_ids == tokenizer.eos_token_id) & real if tokenizer.eos_token_id is not None else ~real & real
    scored = real & ~(ends & (ends.cumsum(dim=1) > 1))  # the first end of text is scored, later ones are not
    scored = scored[:, 1:]
    sums, counts = (log_p * scored).sum(dim=1).tolist(), scored.sum(dim=1).tolist()
    return list(zip(sums, counts, cut, strict=True))


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Ids of texts in which `tokenizer`'s end of text stands where one ended, and all else is plain text."""
    end = tokenizer.eos_token
    parts = [[text] if end is None else text.split(end) for text in texts]
    ids = iter(encode_text(tokenizer, [part for text in parts for part in text]))
    rows = []
    for text in parts:
        row = next(ids)
        for _ in text[1:]:
            row = [*row, tokenizer.eos_token_id, *next(ids)]
        rows.append(row)
    return rows


def _check(judge: Judge, max_length: int, add_start_token: bool) -> int:
    max_length = check_whole("max_length", max_length, minimum=2, unit="tokens")
    check_positions(judge, max_length)
    if add_start_token and judge.tokenizer.bos_token_id is None:
        raise ValueError(f"`add_start_token`=True, but the tokenizer of {judge.name!r} has no BOS: leave it out.")
    return max_length


def check_positions(judge: Judge, max_length: int) -> None:
    """Raise a `ValueError` for texts of more tokens than a judge has positions."""
    longest = getattr(judge.model.config, "max_position_embeddings", max_length)
    if max_length > longest:
        raise ValueError(
            f"`max_length`={max_length} must be at most {longest}, the positions of the judge {judge.name!r}."
        )


def _exp(value: float) -> float:
    return math.exp(min(value, 700))
