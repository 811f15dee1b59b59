# SPDX-License-Identifier: Apache-2.0
"""Arrays and pictures that explain what a model does."""

from transformers.utils.import_utils import is_matplotlib_available


if not is_matplotlib_available():
    raise ImportError("fpmgm.analysis needs matplotlib: pip install 'fpmgm[eval]'")

from .denoising import plot_denoising
from .frontier import plot_frontier
from .similarity import plot_similarity


__all__ = ["plot_denoising", "plot_frontier", "plot_similarity"]
