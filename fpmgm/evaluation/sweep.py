# SPDX-License-Identifier: Apache-2.0
"""A sweep over arguments of `generate`: one row of measures for each setting (Sections D.1.2, F.9, F.10)."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..models.text_input import text_list, token_rows
from .judge import Judge, check_positions, decode_for, generative_perplexity
from .mauve import check_count, mauve_score
from .ngram import NGramJudge
from .samples import check_setting, sample_sequences
from .store import rank
from .text import distinct_n, repetition_rate, unigram_entropy
from .truth import TruthJudge


AnyJudge = Judge | NGramJudge | TruthJudge
TAKEN = {Judge: ("batch_size", "max_length"), TruthJudge: ("batch_size",), NGramJudge: ()}  # options of judging


def grid(**choices: Iterable[Any]) -> list[dict[str, Any]]:
    """Settings that take one value of each name: all combinations, the last name changing fastest.

    Examples:
        >>> grid(reuse=["none", "3sr"], budget=[24, 48])[:2]
        [{'reuse': 'none', 'budget': 24}, {'reuse': 'none', 'budget': 48}]
    """
    for name, values in choices.items():
        if isinstance(values, str) or not isinstance(values, Iterable):
            raise ValueError(f"`{name}`={values!r}: give the values to try, such as [{values!r}].")
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def sweep(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    judge: AnyJudge,
    settings: Iterable[dict[str, Any]],
    *,
    num_samples: int = 1024,
    batch_size: int = 8,
    judge_batch_size: int | None = None,
    length: int | None = None,
    max_length: int | None = None,
    references: Iterable[str] | None = None,
    seed: int = 0,
    cache_dir: str | Path | None = None,
    progress_bar: bool = False,
) -> list[dict[str, Any]]:
    """A row of measures for each setting.

    Args:
        model, tokenizer: A checkpoint.
        judge ([`Judge`], [`NGramJudge`] or [`TruthJudge`]): Of generative perplexity; a language model also gives
            MAUVE's features, and the truth the excess and distances from texts of its own.
        settings (`Iterable[dict]`): Arguments of `generate`, such as `{"num_steps": 8, "iterations": 4}`. All are
            checked before the first is run.
        num_samples (`int`, defaults to 1024): Sequences per row.
        batch_size (`int`, defaults to 8): Sequences per call of the model.
        judge_batch_size (`int`, *optional*): Texts per call of a language model as the judge. `None`: 8, for the truth
            64.
        length (`int`, *optional*): Tokens of a sequence. `None`: the model's longest.
        max_length (`int`, *optional*): Tokens of a text that a language model reads as the judge. `None`: 1024.
        references (`Iterable[str]`, *optional*): `num_samples` human texts for MAUVE. `None`: no MAUVE.
        seed (`int`, defaults to 0): Of the samples, the same in every row.
        cache_dir (`str` or `Path`, *optional*): Keeps finished batches, so that a sweep that was interrupted goes on.
            `None`: nothing is kept.
        progress_bar (`bool`, defaults to `False`): Whether to show the settings and their batches.

    Returns:
        `list[dict]`: Rows with the setting, the measures of [`measure_samples`], `num_steps`, `iterations` (of each
            step), `tokens_per_step`, `block_evaluations`, `mean_block_evaluations`, `milliseconds_per_sequence`
            (generation only) and the device that it was `timed_on`, `tuned_plan`, `sampling` (its protocol, with the
            setting as `options`) and `sample` (the first text).

    Raises:
        `ValueError`: without settings, for one that `generate` would not take, or from [`measure_samples`].
    """
    settings = list_settings(settings)
    for setting in settings:
        check_setting(model, setting, length)
    references = None if references is None else text_list(references, "references")
    check_judging(judge, references, judge_batch_size, max_length)
    if references is not None:
        check_count("references", references, num_samples)
    tokens = model.config.max_position_embeddings if length is None else length
    if isinstance(judge, TruthJudge) and judge.length != tokens:
        raise ValueError(
            f"`length`={tokens}, but the entropy rate of {judge.name!r} is known for texts of {judge.length}: sample "
            "that `length`, or load the truth for another one."
        )
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
        found = {name: value for name, value in vars(samples).items() if name not in ("sequences", "protocol")}
        sample = tokenizer.decode(samples.sequences[0])
        rows.append({**setting, **measures, **found, "sampling": samples.protocol, "sample": sample})
    return rows


def list_settings(settings: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """`settings` as a list of one or more, each of them once."""
    if isinstance(settings, str | Mapping) or not isinstance(settings, Iterable):
        raise ValueError(f"`settings`={settings!r}: give several, such as [{{'reuse': '3sr'}}].")
    settings = list(settings)
    if not settings:
        raise ValueError("`settings` is empty: give at least one, such as {}, the checkpoint's defaults.")
    twice = next((setting for i, setting in enumerate(settings) if setting in settings[:i]), None)
    if twice is not None:
        raise ValueError(f"`settings` have {twice} twice: give each once.")
    return settings


def check_judging(
    judge: AnyJudge, references: Iterable[str] | None, batch_size: int | None, max_length: int | None
) -> dict[str, int]:
    """What is given of what the judge takes: a language model both, the truth no length but its own, counts none.

    Raises:
        `ValueError`: for what it does not take, and more tokens than it reads.
    """
    taken = TAKEN[type(judge)]
    given = {"batch_size": batch_size, "max_length": max_length}
    given = {name: value for name, value in given.items() if value is not None}
    idle = {name: value for name, value in given.items() if name not in taken}
    if idle:
        raise ValueError(f"{idle} does nothing for `judge`, which is {judge.name!r}: leave it out.")
    if isinstance(judge, Judge):
        check_positions(judge, 1024 if max_length is None else max_length)
    elif references is not None:
        raise ValueError(
            f"`references` are texts for MAUVE under a language model, but `judge` is {judge.name!r}: leave them out."
        )
    return given


def measure_samples(
    sequences: Iterable[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    judge: AnyJudge,
    *,
    references: Iterable[str] | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    cache_dir: str | Path | None = None,
    progress_bar: bool = False,
) -> dict[str, Any]:
    """All measures of token sequences: perplexity of their texts, entropy and repetition of their ids, MAUVE.

    Args:
        sequences (`Dataset` or `Iterable[Sequence[int]]`): Token ids.
        tokenizer (`PreTrainedTokenizerBase`): Theirs.
        judge ([`Judge`], [`NGramJudge`] or [`TruthJudge`]): A language model scores the decoded texts. Special tokens
            stay in them where the judge has the same end of text, and are dropped otherwise. An n-gram judge and the
            truth score the ids; the truth also gives the distances of [`TruthJudge`].
        references (`Iterable[str]`, *optional*): As many human texts, for MAUVE; special tokens are dropped from the
            generated ones. `None`: no MAUVE.
        batch_size (`int`, *optional*): Texts per call of a language model. `None`: 8, of the truth 64.
        max_length (`int`, *optional*): Tokens of a text that a language model reads. `None`: 1024.
        cache_dir (`str` or `Path`, *optional*): Keeps a language model's scores of finished batches. `None`: nothing
            is kept.
        progress_bar (`bool`, defaults to `False`): Whether to show a language model's batches.

    Raises:
        `ValueError`: for what only a language model takes under another judge: references, `max_length`, and under an
            n-gram judge `batch_size`.
    """
    sequences = token_rows(sequences)
    options = check_judging(judge, references, batch_size, max_length)
    if isinstance(judge, NGramJudge | TruthJudge):
        measures, special_tokens = judge.generative_perplexity(sequences, **options), "kept"
    else:
        texts, special_tokens = decode_for(judge, tokenizer, sequences)
        measures = generative_perplexity(texts, judge, cache_dir=cache_dir, progress_bar=progress_bar, **options)
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
        found = mauve_score(plain, references, judge, num_samples=len(plain), cache_dir=cache_dir, **options)
        measures |= {"mauve": found["mauve"], "mauve_star": found["mauve_star"]}
        protocol["mauve"] = found["protocol"]
    return {**measures, "protocol": protocol}
