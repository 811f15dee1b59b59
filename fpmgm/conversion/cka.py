# SPDX-License-Identifier: Apache-2.0
"""How alike the layers of a model are: linear centred kernel alignment of their outputs (Appendix C.3.1).

Shapes: K layers, N tokens, D hidden size, B batch, L length.
"""

import math
from collections.abc import Iterable

import torch
from torch import nn

from ..models.modes import evaluating
from ..models.noise import mask_tokens, mask_uniforms, masked_probability


TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)


def linear_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    """‖XᵀY‖² / (‖XᵀX‖ ‖YᵀY‖) of centred features of the same tokens (Appendix C.3.1), in [0, 1].

    Args:
        x, y (`torch.Tensor`): (N, D) and (N, E).

    Raises:
        `ValueError`: for features that are the same for all tokens, or not finite: they are like nothing.

    Examples:
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 5.0]])
        >>> round(linear_cka(x, 3 * x @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]])), 6)  # blind to rotation and scale
        1.0
    """
    x, y = (z.double() - z.double().mean(dim=0) for z in (x, y))
    similarity = ((x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())).item()
    if not math.isfinite(similarity):
        raise ValueError(
            f"features of {len(x)} tokens do not vary, or are not finite: give more texts, or a model that has learnt."
        )
    return similarity


@torch.no_grad()
def layer_similarity(
    model: nn.Module, batches: Iterable[torch.Tensor], times: tuple[float, ...] = TIMES, seed: int = 0
) -> torch.Tensor:
    """Linear CKA between the outputs of all layers in the order in which they run, a mean over times, (K, K).

    Of a fixed-point model each iteration of the shared layers counts (`num_fixed_point_iterations` of them).

    Args:
        model (`PreTrainedModel`): Explicit or fixed-point.
        batches (`Iterable[torch.Tensor]`): (B, L) ids of real text or image codes; each is masked at every time.
        times (`tuple[float, ...]`, defaults to (0.1, 0.3, 0.5, 0.7, 0.9)): Diffusion times.
        seed (`int`, defaults to 0): Seed of the masks.

    Raises:
        `ValueError`: for no batch, or ids of another shape.
    """
    batches = list(batches)
    if not batches:
        raise ValueError("`batches` is empty: give some real text as (batch, length) ids.")
    if shapes := [tuple(ids.shape) for ids in batches if ids.dim() != 2]:
        raise ValueError(f"`batches` holds ids of shape {shapes[0]}: give (batch, length), such as `ids.split(8)`.")
    outputs, similarities = [], []
    shared = model.fixed_point.layers if model.config.num_fixed_point_layers else []
    layers = [*model.pre_layers, *shared, *model.post_layers]
    hooks = [layer.register_forward_hook(_keeper(outputs)) for layer in layers]
    try:
        for time in times:
            features = []  # for each batch, in running order, the outputs (N, D)
            for i, input_ids in enumerate(batches):
                t = torch.full((len(input_ids),), time)
                uniforms = mask_uniforms(input_ids.shape[1], *((seed, i, row) for row in range(len(input_ids))))
                masked = uniforms < masked_probability(t)[:, None]
                noisy, _ = mask_tokens(input_ids, masked, model.config.mask_token_id)
                outputs.clear()
                with evaluating(model):
                    model(noisy.to(model.device), timesteps=t.to(model.device), output_logits=False)
                features.append(list(outputs))
            features = [torch.cat(parts) for parts in zip(*features, strict=True)]  # each (N, D)
            similarities.append(torch.tensor([[linear_cka(x, y) for y in features] for x in features]))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(similarities).mean(dim=0)


def strongest_boundary(similarity: torch.Tensor) -> int:
    """The number b of layers before the sharpest drop: layers b and b + 1 are least alike of all neighbours.

    Examples:
        >>> strongest_boundary(torch.tensor([[1.0, 0.9, 0.2], [0.9, 1.0, 0.3], [0.2, 0.3, 1.0]]))
        2
    """
    return int(similarity.diagonal(offset=1).argmin()) + 1


def explicit_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of an explicit model in order; a `ValueError` for a fixed-point model."""
    if model.config.num_fixed_point_layers:
        raise ValueError(
            f"`model` has `num_fixed_point_layers`={model.config.num_fixed_point_layers}, but only an explicit model "
            "(0), such as `load_mdlm` gives, has layers to choose from."
        )
    return [*model.pre_layers, *model.post_layers]


def _keeper(kept: list[torch.Tensor]):
    return lambda module, args, output: kept.append(output.flatten(0, -2).float().cpu())
