# SPDX-License-Identifier: Apache-2.0
"""A picture of how alike the layers of a model are (Figure 6)."""

from pathlib import Path

import torch
from matplotlib.figure import Figure


def plot_similarity(similarity: torch.Tensor, path: str | Path) -> Path:
    """Draw the similarities of all pairs of layers, and those of neighbours, whose lowest is the boundary.

    Args:
        similarity (`torch.Tensor`): (K, K) in [0, 1], K at least 2, such as `layer_similarity` gives.
        path (`str` or `Path`): Picture to write; the suffix is the format.
    """
    similarity, depth = similarity.numpy(), len(similarity)
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    heat, line = figure.subplots(1, 2)
    edges = (0.5, depth + 0.5)
    image = heat.imshow(similarity, origin="lower", extent=(*edges, *edges), vmin=0, vmax=1, cmap="viridis")
    heat.set(xlabel="layer", ylabel="layer", xticks=range(1, depth + 1), yticks=range(1, depth + 1))
    heat.set_title("linear CKA, mean over times")
    figure.colorbar(image, ax=heat)

    neighbours = similarity.diagonal(1)
    boundary = int(neighbours.argmin()) + 1
    line.plot(range(1, depth), neighbours, marker="o")
    line.axvline(boundary, color="tab:red", linestyle="--", label=f"boundary: {boundary} | {boundary + 1}")
    line.set(xlabel="layer and the next", ylabel="linear CKA", xticks=range(1, depth), ylim=(0, 1.05))
    line.set_title("neighbours")
    line.legend()
    line.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    return Path(path)
