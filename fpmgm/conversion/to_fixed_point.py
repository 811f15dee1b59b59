# SPDX-License-Identifier: Apache-2.0
"""From an explicit model to a fixed-point one: which layers become P, F and H (Section 3.4, Appendix C.3).

The shared block starts as a layer of the teacher that is iterated. A short training against the teacher
(`ConversionTrainer`) does the rest.
"""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..models.noise import stream_generator
from .cka import explicit_layers, layer_similarity, strongest_boundary


STACKS = {"pre": "pre_layers", "fixed_point": "fixed_point.layers", "post": "post_layers"}
PAPER_MAP = {"pre": [1], "fixed_point": [6], "post": [12]}
INJECTION_NOISE = 1e-3  # standard deviation of what is added to the injection's weights for u


def convert_to_fixed_point(
    model: nn.Module,
    layer_map: dict[str, list[int]] | str = PAPER_MAP,
    *,
    batches: Iterable[torch.Tensor] | None = None,
    initialize: bool = True,
    input_injection: str = "diagonal",
    **overrides: Any,
) -> nn.Module:
    """A fixed-point student of an explicit model.

    Args:
        model (`PreTrainedModel`): The teacher, with `num_fixed_point_layers=0`; it is left as it is.
        layer_map (`dict[str, list[int]]` or `str`): The teacher's layers, counted from 1, that become the stacks
            `"pre"`, `"fixed_point"` and `"post"`; the default is the paper's for 12 layers. `"auto"`: as many as the
            stacks have by `overrides` (1 by default), chosen by [`auto_layer_map`] on `batches`.
        batches (`Iterable[torch.Tensor]`, *optional*): (B, L) ids for `"auto"`.
        initialize (`bool`, defaults to `True`): Copy embeddings, layers, final norm, head and time embedding. `False`:
            a fresh model of the same shape, the paper's ablation; its injection starts as z = h/2 + u/2.
        input_injection (`str`, defaults to `"diagonal"`): How the shared stack sees its input. `"diagonal"` starts as
            z = h/2 + u/2 and stays a contraction. `"mlp"` (the paper's) and `"linear"` start as z = h, so that F is
            the layer itself, which need not have a fixed point: reuse may then carry a growing state. `"none"`: no
            injection, a looped model.
        overrides: Fields of the student's configuration.

    Returns:
        A model of the teacher's class, with random parts from PyTorch's global generator, in evaluation mode. Its
        configuration keeps the `layer_map`.

    Raises:
        `ValueError`: for a fixed-point teacher, one with adapters, a layer beyond its depth, a number of layers in
            `overrides` that is not that of `layer_map`, `batches` that nothing reads, or tied embeddings of a teacher
            that has none.

    Example:

    ```python
    >>> from fpmgm import FPMDLMConfig, FPMDLMForMaskedDiffusion, convert_to_fixed_point
    >>> mdlm = FPMDLMForMaskedDiffusion(FPMDLMConfig(vocab_size=11, mask_token_id=10, hidden_size=8,
    ...     num_attention_heads=2, intermediate_size=16, conditioning_size=4, max_position_embeddings=6,
    ...     num_pre_layers=4, num_fixed_point_layers=0, num_post_layers=0))
    >>> student = convert_to_fixed_point(mdlm, {"pre": [1], "fixed_point": [3], "post": [4]})
    >>> bool((student.fixed_point.layers[0].up_proj.weight == mdlm.pre_layers[2].up_proj.weight).all())
    True

    ```
    """
    if hasattr(model, "peft_config"):
        raise ValueError(
            f"`model` has the adapter(s) {list(model.peft_config)}, which no layer of the student would have: put "
            "them into its weights by `PeftModel.from_pretrained(base, adapter).merge_and_unload()` and convert that."
        )
    layers = explicit_layers(model)
    if layer_map == "auto":
        sizes = {name: overrides.get(f"num_{name}_layers", 1) for name in STACKS}
        layer_map, _ = auto_layer_map(model, () if batches is None else batches, sizes)
    elif batches is not None:
        raise ValueError(
            f"`batches` are for `layer_map`='auto', but `layer_map`={layer_map} is given: leave them out."
        )
    if initialize and overrides.get("tie_word_embeddings") and not model.config.tie_word_embeddings:
        raise ValueError(
            "`tie_word_embeddings`=True with `initialize`=True: the teacher has embeddings and a head of its own, of "
            "which one would be lost. Leave it out, or start afresh with `initialize`=False."
        )
    check_layer_map(layer_map, len(layers))
    student = type(model)(
        student_config(model.config, layer_map, initialize, {"input_injection": input_injection, **overrides})
    )
    student.generation_config = copy.deepcopy(model.generation_config)
    if initialize:
        copy_weights(model, student, layer_map)
        add_noise(student)
    return student.to(model.device, model.dtype).eval()


def auto_layer_map(
    model: nn.Module, batches: Iterable[torch.Tensor], sizes: dict[str, int]
) -> tuple[dict[str, list[int]], torch.Tensor]:
    """A layer map from the sharpest boundary of linear CKA, and the similarities (K, K) that it was read from.

    The first layers become the pre-stack, the first ones after the boundary the shared stack, the last the post-stack;
    near either end the shared stack moves inwards, so that no layer is taken twice.

    Args:
        model (`PreTrainedModel`): The explicit teacher.
        batches (`Iterable[torch.Tensor]`): (B, L) ids.
        sizes (`dict[str, int]`): Layers of `"pre"`, `"fixed_point"` and `"post"`.

    Raises:
        `ValueError`: if `model` has fewer layers than `sizes` ask for.
    """
    depth = len(explicit_layers(model))
    if depth < sum(sizes.values()):
        raise ValueError(f"`sizes`={sizes} ask for more layers than the {depth} of `model`: ask for fewer.")
    similarity = layer_similarity(model, batches)
    boundary = strongest_boundary(similarity)
    first = max(sizes["pre"], min(boundary, depth - sizes["fixed_point"] - sizes["post"]))
    layer_map = {
        "pre": list(range(1, sizes["pre"] + 1)),
        "fixed_point": list(range(first + 1, first + sizes["fixed_point"] + 1)),
        "post": list(range(depth - sizes["post"] + 1, depth + 1)),
    }
    return layer_map, similarity


def student_config(
    config: PreTrainedConfig, layer_map: dict[str, list[int]], initialize: bool, overrides: dict[str, Any]
) -> PreTrainedConfig:
    """The teacher's `config` with the student's stacks and `overrides`, and the start of the injection."""
    sizes = {f"num_{name}_layers": len(layer_map[name]) for name in STACKS}
    for name, size in sizes.items():
        if overrides.get(name, size) != size:
            raise ValueError(
                f"`{name}`={overrides[name]} contradicts `layer_map`={layer_map}: leave it out, or name that many."
            )
    values = config.to_dict() | sizes | overrides
    for name in ("architectures", "auto_map"):
        values.pop(name, None)
    identity = initialize and values["input_injection"] in ("mlp", "linear")
    values["injection_init"] = overrides.get("injection_init", "identity" if identity else "contraction")
    values["layer_map"] = {name: list(chosen) for name, chosen in layer_map.items()}
    return type(config)(**values)


@torch.no_grad()
def copy_weights(teacher: nn.Module, student: nn.Module, layer_map: dict[str, list[int]]) -> None:
    """Copy the teacher's chosen layers into the student's stacks, and all that is outside the stacks."""
    layers = explicit_layers(teacher)
    for name, chosen in layer_map.items():
        for target, i in zip(student.get_submodule(STACKS[name]), chosen, strict=True):
            target.load_state_dict(layers[i - 1].state_dict())
    outside = {
        name: tensor
        for name, tensor in teacher.state_dict().items()
        if not name.startswith(("pre_layers.", "post_layers."))
    }
    student.load_state_dict(outside, strict=False)


@torch.no_grad()
def add_noise(student: nn.Module) -> None:
    """Add normal noise to the injection's weights for u, the same at every call: at 0, where an injection starts as
    z = h, they would pass no gradient to the pre-stack."""
    projection = getattr(student.fixed_point.injection, "input_proj", None)
    if projection is not None:
        noise = torch.randn(projection.weight.shape, generator=stream_generator("injection noise"))
        projection.weight.add_(INJECTION_NOISE * noise)


def check_layer_map(layer_map: dict[str, list[int]], depth: int) -> None:
    """Raise a `ValueError` unless `layer_map` gives each stack layers from 1 to `depth`, the shared one some."""
    if not isinstance(layer_map, dict) or set(layer_map) != set(STACKS):
        raise ValueError(f"`layer_map`={layer_map!r} must be 'auto' or give layers for each of {tuple(STACKS)}.")
    wrong = {name: chosen for name, chosen in layer_map.items() if not all(1 <= i <= depth for i in chosen)}
    if wrong:
        raise ValueError(
            f"`layer_map` names {wrong}, but the model has layers 1 to {depth}: name others, or use "
            "`layer_map`='auto', which chooses by the similarity of layers."
        )
    if not layer_map["fixed_point"]:
        raise ValueError("`layer_map` has no layer for 'fixed_point': name at least one.")
