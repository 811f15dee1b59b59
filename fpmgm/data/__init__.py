# SPDX-License-Identifier: Apache-2.0
"""Text becomes blocks of token ids, pictures become grids of codes."""

from transformers.utils import is_datasets_available


if not is_datasets_available():
    raise ImportError("fpmgm.data needs datasets: pip install 'fpmgm[train]'")

from ..models.image_processing import make_image_processor
from .codes import load_codes
from .image_codes import load_images, prepare_codes
from .text import load_text, pack
from .tokenizer import add_mask_token, train_tokenizer


__all__ = [
    "add_mask_token",
    "load_codes",
    "load_images",
    "load_text",
    "make_image_processor",
    "pack",
    "prepare_codes",
    "train_tokenizer",
]
