# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of other implementations, read without running their code; explicit models made fixed-point ones."""

from .cka import layer_similarity, linear_cka, strongest_boundary
from .image_tokenizers import load_image_tokenizer, load_llamagen_vq, load_xqgan
from .maskgit import load_halton_maskgit
from .mdlm import load_mdlm
from .to_fixed_point import PAPER_MAP, auto_layer_map, convert_to_fixed_point


__all__ = [
    "PAPER_MAP",
    "auto_layer_map",
    "convert_to_fixed_point",
    "layer_similarity",
    "linear_cka",
    "load_halton_maskgit",
    "load_image_tokenizer",
    "load_llamagen_vq",
    "load_mdlm",
    "load_xqgan",
    "strongest_boundary",
]
