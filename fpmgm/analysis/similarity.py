# SPDX-License-Identifier: Apache-2.0
"""A picture of how alike the layers of a model are (Figure 6)."""

import itertools
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from .axes import new_figure, save


def running_layers(config: PreTrainedConfig) -> list[str]:
    """Names of the layers in the order in which they run: of a fixed-point model each iteration counts.

    Examples:
        >>> from fpmgm import FPMDLMConfig
        >>> running_layers(FPMDLMConfig(num_fixed_point_iterations=2))
        ['pre 1', 'iteration 1', 'iteration 2', 'post 1']
    """
    pre, shared, post = config.num_pre_layers, config.num_fixed_point_layers, config.num_post_layers
    if shared == 0:
        return [str(i + 1) for i in range(pre + post)]
    iterations = [
        f"iteration {n + 1}" + (f", layer {i + 1}" if shared > 1 else "")
        for n in range(config.num_fixed_point_iterations)
        for i in range(shared)
    ]
    return [*(f"pre {i + 1}" for i in range(pre)), *iterations, *(f"post {i + 1}" for i in range(post))]


def plot_similarity(similarity: torch.Tensor, path: str | Path, names: list[str] | None = None) -> Path:
    """Draw the similarities of all pairs of layers, and those of neighbours, whose lowest is the boundary.

    Args:
        similarity (`torch.Tensor`): (K, K) in [0, 1], K at least 2, such as `layer_similarity` gives.
        path (`str` or `Path`): Picture to write; the suffix is the format.
        names (`list[str]`, *optional*): K names, such as [`running_layers`] gives. `None`: numbers from 1.

    Returns:
        `Path` of the picture.
    """
    similarity, depth = similarity.numpy(), len(similarity)
    names = [str(i + 1) for i in range(depth)] if names is None else names
    rotation = 90 if max(map(len, names)) > 2 else 0
    figure = new_figure(8, 4.2)
    heat, line = figure.subplots(1, 2, width_ratios=[1.15, 1])
    image = heat.imshow(similarity, origin="lower", aspect="auto", vmin=0, vmax=1, cmap="Blues")
    heat.set_xticks(range(depth), names, rotation=rotation, fontsize=8)
    heat.set_yticks(range(depth), names, fontsize=8)
    heat.set_title("linear CKA of all pairs, mean over times", fontsize=10)
    figure.colorbar(image, ax=heat, shrink=0.8, label="1: alike up to rotation and scale")

    neighbours = similarity.diagonal(1)
    boundary = int(neighbours.argmin())
    line.plot(range(depth - 1), neighbours, marker="o", markersize=4)
    label = f"boundary: {names[boundary]} | {names[boundary + 1]}"
    line.axvline(boundary, color="tab:red", linestyle="--", label=label)
    line.set_xticks(range(depth - 1), [f"{a} | {b}" for a, b in itertools.pairwise(names)], fontsize=8)
    line.tick_params(axis="x", rotation=90)
    line.set(ylim=(0, 1.05))
    line.set_title("linear CKA of neighbours", fontsize=10)
    line.legend(fontsize=8, loc="lower left")
    line.grid(alpha=0.3)
    return save(figure, path)
