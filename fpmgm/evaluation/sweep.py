# SPDX-License-Identifier: Apache-2.0
"""A sweep over arguments of `generate`: one row of measures for each setting (Sections D.1.2, F.9, F.10)."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .judge import Judge, decode_for, generative_perplexity
from .mauve import mauve_score
from .ngram import NGramJudge
from .samples import check_plan, sample_sequences
from .store import rank
from .text import distinct_n, repetition_rate, unigram_entropy
from .truth import TruthJudge


AnyJudge = Judge | NGramJudge | TruthJudge


def grid(**choices: Sequence[Any]) -> list[dict[str, Any]]:
    """Settings that take one value of each name: all combinations, the last name changing fastest.

    >>> grid(reuse=["none", "3sr"], budget=[24, 48])[:2]
    [{'reuse': 'none', 'budget': 24}, {'reuse': 'none', 'budget': 48}]
    """
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def sweep(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    judge: AnyJudge,
    settings: Sequence[dict[str, Any]],
    *,
    num_samples: int = 1024,
    batch_size: int = 8,
    judge_batch_size: int = 8,
    length: int | None = None,
    max_length: int = 1024,
    references: list[str] | None = None,
    seed: int = 0,
    cache_dir: str | Path | None = None,
    progress_bar: bool = False,
) -> list[dict[str, Any]]:
    """A row of measures for each setting.

    Args:
        model, tokenizer: A checkpoint.
        judge ([`Judge`], [`NGramJudge`] or [`TruthJudge`]): Of generative perplexity; a language model also gives
            MAUVE's features, and the truth the excess and distances from texts of its own.
        settings (`Sequence[dict]`): Arguments of `generate`, such as `{"num_steps": 8, "iterations": 4}`. All are
            checked before the first is run.
        num_samples (`int`, defaults to 1024): Sequences per row.
        batch_size, judge_batch_size (`int`, defaults to 8 and 8): Sequences per call of the model and of the judge.
        length (`int`, *optional*): Tokens of a sequence. `None`: the model's longest.
        max_length (`int`, defaults to 1024): Tokens of a text that a language model reads as the judge.
        references (`list[str]`, *optional*): `num_samples` human texts for MAUVE. `None`: no MAUVE.
        seed (`int`, defaults to 0): Of the samples, the same in every row.
        cache_dir (`str` or `Path`, *optional*): Keeps finished batches, so that a sweep that was interrupted goes on.
            `None`: nothing is kept.
        progress_bar (`bool`, defaults to `False`): Whether to show the settings and their batches.

    Returns:
        `list[dict]`: Rows with the setting, the measures of [`measure_samples`], `num_steps`, `iterations` (of each
        step), `block_evaluations`, `milliseconds_per_sequence` (generation only), `tuned_plan`, `sampling` (its
        protocol, with the setting as `options`) and `sample` (the first text).

    Raises:
        `ValueError`: without settings, or for one that `generate` would not take.
    """
    _check(model, settings)
    rows = []
    several = progress_bar and len(settings) > 1 and rank() == 0
    for setting in logging.tqdm(settings, desc="settings", disable=not several):
        samples = sample_sequences(
            model, num_samples, batch_size=batch_size, length=length, seed=seed, cache_dir=cache_dir,
            progress_bar=progress_bar, **setting,
        )  # fmt: skip
        measures = measure_samples(
            samples.sequences.tolist(), tokenizer, judge, references=references, batch_size=judge_batch_size,
            max_length=max_length, cache_dir=cache_dir, progress_bar=progress_bar,
        )  # fmt: skip
        rows.append(
            {
                **setting,
                **measures,
                "num_steps": samples.num_steps,
                "iterations": samples.iterations,
                "block_evaluations": samples.block_evaluations,
                "milliseconds_per_sequence": samples.milliseconds_per_sequence,
                "tuned_plan": samples.tuned_plan,
                "sampling": samples.protocol,
                "sample": tokenizer.decode(samples.sequences[0]),
            }
        )
    return rows


def _check(model: PreTrainedModel, settings: Sequence[dict[str, Any]]) -> None:
    """Raise at once what `generate` would raise in the middle."""
    if not settings:
        raise ValueError("`settings` is empty: give at least one, such as {}, the checkpoint's defaults.")
    for setting in settings:
        check_plan(model, setting)


def measure_samples(
    sequences: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    judge: AnyJudge,
    *,
    references: list[str] | None = None,
    batch_size: int = 8,
    max_length: int = 1024,
    cache_dir: str | Path | None = None,
    progress_bar: bool = False,
) -> dict[str, Any]:
    """All measures of token sequences: perplexity of their texts, entropy and repetition of their ids, MAUVE.

    Args:
        sequences (`Sequence[Sequence[int]]`): Token ids.
        tokenizer (`PreTrainedTokenizerBase`): Theirs.
        judge ([`Judge`], [`NGramJudge`] or [`TruthJudge`]): A language model scores the decoded texts. Special tokens
            stay in them where the judge has the same end of text, and are dropped otherwise. An n-gram judge and the
            truth score the ids; the truth also gives the distances of [`TruthJudge`].
        references (`list[str]`, *optional*): As many human texts, for MAUVE; special tokens are dropped from the
            generated ones. `None`: no MAUVE.
        batch_size, max_length, cache_dir, progress_bar: See [`generative_perplexity`].

    Raises:
        `ValueError`: for references under an n-gram judge, which has no features, or under the truth, which has its
            own.
    """
    options = {"batch_size": batch_size, "max_length": max_length, "cache_dir": cache_dir}
    if isinstance(judge, NGramJudge | TruthJudge):
        if references is not None:
            raise ValueError(
                f"`references` are texts for MAUVE under a language model, but `judge` is {judge.name!r}: leave them "
                "out."
            )
        measures, special_tokens = judge.generative_perplexity(sequences), "kept"
    else:
        texts, special_tokens = decode_for(judge, tokenizer, sequences)
        measures = generative_perplexity(texts, judge, progress_bar=progress_bar, **options)
    protocol = {"generative_perplexity": {**measures.pop("protocol"), "special_tokens": special_tokens}}
    if isinstance(judge, TruthJudge):
        found = judge.distances(sequences)
        protocol["distances"] = found.pop("protocol")
        measures |= found
    measures["unigram_entropy"] = unigram_entropy(sequences)
    measures |= {f"distinct_{n}": distinct_n(sequences, n) for n in (1, 2, 3)}
    measures["repetition_4"] = repetition_rate(sequences, 4)
    protocol["tokens"] = "entropy (equation 5, nats), distinct-n and repetition: of the sequences' own token ids"
    if references is not None:
        plain = tokenizer.batch_decode(sequences, skip_special_tokens=True)
        found = mauve_score(plain, references, judge, num_samples=len(plain), **options)
        measures |= {"mauve": found["mauve"], "mauve_star": found["mauve_star"]}
        protocol["mauve"] = found["protocol"]
    return {**measures, "protocol": protocol}
