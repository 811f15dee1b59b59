# SPDX-License-Identifier: Apache-2.0
"""What several tests of the models share: a model for sampling, and the defaults that a docstring states."""

import re

import torch

from fpmgm import FPMaskGITModel, FPMDLMForMaskedDiffusion
from tests.testing_utils import tiny_image_model, tiny_model


def lively_model(seed: int = 0, **overrides) -> FPMDLMForMaskedDiffusion:
    """A float64 model with many likely tokens and a slow contraction, so that wrong reuse changes what is drawn."""
    return tiny_model(seed, scale=0.2, **{"input_injection": "diagonal", **overrides}).double()


def lively_image_model(seed: int = 0, **overrides) -> FPMaskGITModel:
    """The same for images."""
    return tiny_image_model(seed, scale=0.25, **{"input_injection": "diagonal", **overrides}).double()


def count_calls(model, module_class: type | tuple[type, ...]) -> list:
    """A list that grows by one at each call of a module of this class or these: before it runs, since recomputing may
    stop early."""
    calls = []
    for module in model.modules():
        if isinstance(module, module_class):
            module.register_forward_pre_hook(lambda module, args: calls.append(module))
    return calls


def most_confident_first(predict, ids, mask: int, uniforms, counts) -> torch.Tensor:
    """`ids` (B, L) after steps that draw at every mask from `predict(ids)` (B, L, V), with `uniforms` (T, B, L), and
    keep the `counts[step][row]` most probable draws."""
    ids = ids.clone()
    for step, of_rows in enumerate(counts):
        p = predict(ids)
        for row, count in enumerate(of_rows):
            draws = []
            for i in (ids[row] == mask).nonzero().flatten().tolist():
                token = int((p[row, i].cumsum(0) <= uniforms[step, row, i]).sum())
                draws.append((-round(p[row, i, token].log().item(), 9), i, token))  # of equals the first
            for _, i, token in sorted(draws)[:count]:
                ids[row, i] = token
    return ids


def record_calls(model) -> list[dict]:
    """The arguments of every forward call, with the tokens under `input_ids`."""
    calls = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append({"input_ids": args[0], **kwargs}), with_kwargs=True
    )
    return calls


def documented_defaults(documented_class: type) -> dict[str, str]:
    """Name → default as written, without quotes: "None" for *optional* entries that name no other."""
    defaults = {}
    for names, description in re.findall(
        r"^ +([a-z]\w*(?:, \w+)*) \((`.+?)\):", documented_class.__doc__, re.MULTILINE
    ):
        names = names.split(", ")
        stated = re.search(r"defaults? to (.+)", description)
        if stated is None:
            values = ["None" if "*optional*" in description else "missing"] * len(names)
        elif " and " in stated[1]:
            values = stated[1].split(" and ")
        else:
            values = [stated[1]] * len(names)
        defaults.update({name: value.strip("`").strip('"') for name, value in zip(names, values, strict=True)})
    return defaults
