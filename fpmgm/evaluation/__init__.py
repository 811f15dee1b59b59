# SPDX-License-Identifier: Apache-2.0
"""Measures of generated sequences; each number's name says how it was made."""

from .ngram import NGramJudge
from .text import unigram_entropy


__all__ = ["NGramJudge", "unigram_entropy"]
