# SPDX-License-Identifier: Apache-2.0
"""The measures of text as metrics of Hugging Face's `evaluate`: `GenerativePerplexity().compute(predictions=…)`."""

from typing import Any


try:
    import evaluate
    from datasets import Features, Sequence, Value
except ImportError as error:
    raise ImportError("fpmgm.evaluation.metrics needs evaluate: pip install 'fpmgm[eval]'") from error

from .judge import generative_perplexity
from .mauve import mauve_score
from .text import distinct_n, repetition_rate, unigram_entropy


TEXTS = Features({"predictions": Value("string")})
TOKENS = Features({"predictions": Sequence(Value("int64"))})
PAIRS = Features({"predictions": Value("string"), "references": Value("string")})


def _describe(description: str, inputs: str, features: Features, citation: str = "") -> evaluate.MetricInfo:
    return evaluate.MetricInfo(
        description=description, citation=citation, inputs_description=inputs, features=features
    )


class GenerativePerplexity(evaluate.Metric):
    """[`generative_perplexity`] of `predictions`, texts; its options are those of `compute`.

    Example:

    ```python
    >>> from fpmgm.evaluation.metrics import GenerativePerplexity
    >>> metric = GenerativePerplexity()
    >>> metric.add_batch(predictions=texts)  # doctest: +SKIP
    >>> metric.compute(judge="gpt2-large")["generative_perplexity"]  # doctest: +SKIP

    ```
    """

    def _info(self) -> evaluate.MetricInfo:
        return _describe(
            "Perplexity of generated texts under a causal language model.",
            "predictions: texts; judge: hub name, folder, .gguf file or Judge; options of generative_perplexity.",
            TEXTS,
        )

    def _compute(self, predictions, **options: Any) -> dict[str, Any]:
        return generative_perplexity(list(predictions), **options)


class UnigramEntropy(evaluate.Metric):
    """[`unigram_entropy`] of `predictions`, lists of token ids.

    Example:

    ```python
    >>> from fpmgm.evaluation.metrics import UnigramEntropy
    >>> round(UnigramEntropy().compute(predictions=[[1, 1, 2, 2], [3, 3, 3, 3]])["unigram_entropy"], 4)
    0.3466

    ```
    """

    def _info(self) -> evaluate.MetricInfo:
        return _describe("Mean entropy, in nats, of the tokens that a sequence uses.", "predictions: ids.", TOKENS)

    def _compute(self, predictions) -> dict[str, Any]:
        return {
            "unigram_entropy": unigram_entropy(predictions),
            "protocol": {"metric": "unigram entropy (equation 5), nats", **_counts(predictions)},
        }


class Repetition(evaluate.Metric):
    """[`distinct_n`] over all and [`repetition_rate`] within each of `predictions`, lists of token ids."""

    def _info(self) -> evaluate.MetricInfo:
        return _describe(
            "Share of different n-grams over all sequences; share of repeated ones within a sequence.",
            "predictions: ids; distinct: lengths of n-grams over all; repeated: length of those within a sequence.",
            TOKENS,
        )

    def _compute(self, predictions, distinct: tuple[int, ...] = (1, 2, 3), repeated: int = 4) -> dict[str, Any]:
        return {
            **{f"distinct_{n}": distinct_n(predictions, n) for n in distinct},
            f"repetition_{repeated}": repetition_rate(predictions, repeated),
            "protocol": {"metric": "distinct-n over all, rep-n within each sequence", **_counts(predictions)},
        }


class Mauve(evaluate.Metric):
    """[`mauve_score`] of `predictions` against `references`, both texts; its options are those of `compute`."""

    def _info(self) -> evaluate.MetricInfo:
        return _describe(
            "Gap between the distributions of generated and human texts, 1 where there is none.",
            "predictions, references: texts, equally many; featurizer and other options of mauve_score.",
            PAIRS,
        )

    def _compute(self, predictions, references, **options: Any) -> dict[str, Any]:
        return mauve_score(list(predictions), list(references), **options)


def _counts(sequences) -> dict[str, int]:
    lengths = [len(row) for row in sequences]
    return {"num_samples": len(lengths), "num_tokens": sum(lengths)}
