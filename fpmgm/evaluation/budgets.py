# SPDX-License-Identifier: Apache-2.0
"""The budget report: quality, diversity and cost of a checkpoint's samples at several budgets (Tables 2, 6, 9, 12)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .judge import Judge, decode_for, generative_perplexity
from .mauve import mauve_score
from .samples import sample_sequences
from .text import distinct_n, repetition_rate, unigram_entropy


SHOWN = {  # measure → its name in a table
    "generative_perplexity": "Gen. PPL ↓",
    "unigram_entropy": "Entropy ↑",
    "mauve": "MAUVE ↑",
    "milliseconds_per_sequence": "ms per sequence",
    "plan": "steps (iterations)",
}


def evaluate_budgets(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    judge: Judge,
    budgets: Sequence[int],
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
    """A row of measures for each setting and budget.

    Args:
        model, tokenizer: A checkpoint.
        judge ([`Judge`]): Of generative perplexity, and MAUVE's features.
        budgets (`Sequence[int]`): Block evaluations per sequence.
        settings (`Sequence[dict]`): Options of `generate` beside the budget, such as `{"reuse": "3sr"}`.
        num_samples (`int`, defaults to 1024): Sequences per row.
        batch_size, judge_batch_size (`int`, defaults to 8 and 8): Sequences per call of the model and of the judge.
        length (`int`, *optional*): Tokens of a sequence. `None`: the model's longest.
        max_length (`int`, defaults to 1024): Tokens of a text that the judge reads.
        references (`list[str]`, *optional*): `num_samples` human texts for MAUVE. `None`: no MAUVE.
        seed (`int`, defaults to 0): Of the samples, the same in every row.
        cache_dir (`str` or `Path`, *optional*): Keeps finished batches. `None`: nothing is kept.
        progress_bar (`bool`, defaults to `False`): Whether to show the batches.

    Returns:
        `list[dict]`: Rows with `budget`, the setting, the measures of [`measure_samples`], `num_steps`, `iterations`,
        `block_evaluations`, `milliseconds_per_sequence` (generation only), `tuned_plan`, `sampling` (its protocol) and
        `sample` (the first text).
    """
    rows = []
    for setting in settings:
        for budget in budgets:
            samples = sample_sequences(
                model, num_samples, batch_size=batch_size, length=length, seed=seed, cache_dir=cache_dir,
                progress_bar=progress_bar, budget=budget, **setting,
            )  # fmt: skip
            measures = measure_samples(
                samples.sequences.tolist(), tokenizer, judge, references=references, batch_size=judge_batch_size,
                max_length=max_length, cache_dir=cache_dir, progress_bar=progress_bar,
            )  # fmt: skip
            rows.append(
                {
                    "budget": budget,
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


def measure_samples(
    sequences: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    judge: Judge,
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
        judge ([`Judge`]): Scores the decoded texts. Special tokens stay in them where the judge has the same end of
            text, and are dropped otherwise.
        references (`list[str]`, *optional*): As many human texts, for MAUVE; special tokens are dropped from the
            generated ones. `None`: no MAUVE.
        batch_size, max_length, cache_dir, progress_bar: See [`generative_perplexity`].
    """
    texts, special_tokens = decode_for(judge, tokenizer, sequences)
    options = {"batch_size": batch_size, "max_length": max_length, "cache_dir": cache_dir}
    measures = generative_perplexity(texts, judge, progress_bar=progress_bar, **options)
    protocol = {"generative_perplexity": {**measures.pop("protocol"), "special_tokens": special_tokens}}
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


def budget_table(rows: Sequence[dict[str, Any]], name: str) -> str:
    """Rows of [`evaluate_budgets`] in Markdown: a column per budget, a group of lines per setting.

    Args:
        rows (`Sequence[dict]`): Rows of one or several settings.
        name (`str`): The model's.
    """
    budgets = sorted({row["budget"] for row in rows})
    groups: dict[str, dict[int, dict]] = {}
    for row in rows:
        groups.setdefault(setting_name(row, name), {})[row["budget"]] = row
    lines = [
        f"| Method | Metric | {' | '.join(map(str, budgets))} |",
        f"|---|---|{'---|' * len(budgets)}",
    ]
    for title, group in groups.items():
        shown = [measure for measure in SHOWN if measure == "plan" or any(measure in row for row in group.values())]
        for measure in shown:
            cells = [_cell(group.get(budget), measure) for budget in budgets]
            lines.append(f"| {title} | {SHOWN[measure]} | {' | '.join(cells)} |")
            title = ""
    return "\n".join(lines) + "\n"


def setting_name(row: dict[str, Any], name: str) -> str:
    """The model's name with what a row sets beside the budget.

    >>> setting_name({"reuse": "3sr", "top_p": 0.9}, "fp_mdlm")
    'fp_mdlm, reuse 3sr, top_p 0.9'
    """
    options = row.get("sampling", {"options": row})["options"]
    return ", ".join([name, *(f"{key} {value}" for key, value in options.items() if key != "budget")])


def _cell(row: dict[str, Any] | None, measure: str) -> str:
    if row is None:
        return ""
    if measure == "plan":
        steps, iterations = row["num_steps"], row["iterations"]
        if not any(iterations):
            return str(steps)
        first, last = iterations[0], iterations[-1]
        return f"{steps} ({first})" if len(set(iterations)) == 1 else f"{steps} ({first}…{last})"
    return f"{row[measure]:.3f}" if measure != "milliseconds_per_sequence" else f"{row[measure]:.1f}"
