# SPDX-License-Identifier: Apache-2.0
"""Measures of generated sequences and pictures; each number's name says how it was made.

`fpmgm.evaluation.metrics` holds them as metrics of Hugging Face's `evaluate`.
"""

from ..models.image_tokenizer import to_uint8
from .budget_report import budget_table, evaluate_budgets
from .comparison import clearly_below, compare_values, over_seeds, plus_minus, pool_settings
from .distances import energy_distance
from .extractors import EfficientNetLiteExtractor, InceptionExtractor
from .frontier import common_entropies, perplexity_at_entropy, standard_error_at_entropy, undominated
from .image_metrics import (
    FeatureExtractor,
    ImageStatistics,
    evaluate_images,
    extract_features,
    frechet_distance,
    image_statistics,
    inception_score,
)
from .judge import Judge, generative_perplexity, load_judge
from .latency import measure_latency
from .likelihood import elbo_perplexity
from .mauve import mauve_score
from .ngram import NGramJudge
from .provenance import provenance
from .samples import Samples, sample_sequences
from .search import Trial, sampling_candidates, successive_halving
from .sweep import AnyJudge, grid, measure_samples, sweep
from .text import distinct_n, repetition_rate, unigram_entropy
from .truth import TruthJudge, load_truth, sample_texts


__all__ = [
    "AnyJudge",
    "EfficientNetLiteExtractor",
    "FeatureExtractor",
    "ImageStatistics",
    "InceptionExtractor",
    "Judge",
    "NGramJudge",
    "Samples",
    "Trial",
    "TruthJudge",
    "budget_table",
    "clearly_below",
    "common_entropies",
    "compare_values",
    "distinct_n",
    "elbo_perplexity",
    "energy_distance",
    "evaluate_budgets",
    "evaluate_images",
    "extract_features",
    "frechet_distance",
    "generative_perplexity",
    "grid",
    "image_statistics",
    "inception_score",
    "load_judge",
    "load_truth",
    "mauve_score",
    "measure_latency",
    "measure_samples",
    "perplexity_at_entropy",
    "over_seeds",
    "plus_minus",
    "pool_settings",
    "provenance",
    "repetition_rate",
    "sample_sequences",
    "sample_texts",
    "sampling_candidates",
    "standard_error_at_entropy",
    "successive_halving",
    "sweep",
    "to_uint8",
    "undominated",
    "unigram_entropy",
]
