# SPDX-License-Identifier: Apache-2.0
"""What users of transformers expect of any model: export, weights elsewhere, integer weights, refusals by name."""

import pytest
import torch
from torch import nn
from torch.export import Dim
from transformers import AutoModel

from .testing_utils import refused, tiny_image_model, tiny_model


MAKERS = {"text": tiny_model, "images": tiny_image_model}
every_kind = pytest.mark.parametrize("kind", MAKERS)


def masked_rows(model, batch_size: int) -> torch.Tensor:
    """(B, L), one token known."""
    ids = torch.full((batch_size, model.config.max_position_embeddings), model.config.mask_token_id)
    ids[:, 1] = 3
    return ids


class Denoise(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids, num_iterations=2).logits


@every_kind
@torch.no_grad()
def test_a_denoising_step_is_exported_for_any_batch_and_length(kind):
    model = MAKERS[kind]()
    ids = masked_rows(model, 3)
    sizes = {0: Dim.DYNAMIC} if kind == "images" else {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    exported = torch.export.export(Denoise(model), (ids,), dynamic_shapes={"input_ids": sizes}).module()
    fewer = ids[:2] if kind == "images" else ids[:2, :-3]
    torch.testing.assert_close(exported(fewer), model(fewer, num_iterations=2).logits)


@every_kind
def test_weights_that_lie_on_the_disk_give_the_same_tokens(kind, tmp_path):
    model = MAKERS[kind]()
    model.save_pretrained(tmp_path)
    places = {name: "disk" if name == "fixed_point" else "cpu" for name, _ in model.named_children()}
    offloaded = AutoModel.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "offloaded")
    assert next(offloaded.fixed_point.parameters()).is_meta
    tokens = offloaded.generate(masked_rows(model, 2), num_steps=3, iterations=2, seed=0)
    assert torch.equal(tokens, model.generate(masked_rows(model, 2), num_steps=3, iterations=2, seed=0))


class IntegerLinear(nn.Module):
    """A linear map as quantisers of weights leave it: whole numbers, and what they are multiplied by."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.scale, self.bias = linear.weight.detach().abs().max() / 127, linear.bias
        self.register_buffer("weight", (linear.weight.detach() / self.scale).round().to(torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.is_floating_point()
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


@every_kind
@torch.no_grad()
def test_integers_may_take_the_place_of_the_weights_of_linear_maps(kind):
    model, rounded = MAKERS[kind](), MAKERS[kind]()
    plain = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    for name in plain:
        model.set_submodule(name, IntegerLinear(model.get_submodule(name)))
        rounded.get_submodule(name).weight.copy_(model.get_submodule(name).weight * model.get_submodule(name).scale)
    ids = masked_rows(model, 2)
    assert len(plain) > 3 and torch.equal(model(ids).logits, rounded(ids).logits)
    assert model.generate(ids, num_steps=2, iterations=1, seed=0).shape == ids.shape


@every_kind
@pytest.mark.parametrize(
    ("name", "instead"), [("output_hidden_states", "fixed_point_state"), ("output_attentions", "never built")]
)
def test_what_models_do_not_return_is_refused_by_name(kind, name, instead):
    model = MAKERS[kind](attn_implementation="eager")
    ids = masked_rows(model, 1)
    refused(rf"(?s){name}.*{instead}", model, ids, **{name: True})
    setattr(model.config, name, True)
    for call in (model, lambda ids: model.generate(ids, num_steps=2, iterations=1)):
        refused(rf"`config.{name}`=True.*{instead}", call, ids)
