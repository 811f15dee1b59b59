# SPDX-License-Identifier: Apache-2.0
"""FP-MaskGIT's configuration: every field does something, is documented, survives saving, and refuses bad values."""

import pytest
import torch
from safetensors.torch import load_file

from fpmgm import FPMaskGITConfig, FPMaskGITModel
from tests.models.helpers import documented_defaults
from tests.testing_utils import tiny_image_config, tiny_image_model


# What shows a field's effect: other shapes, other logits of the same weights, other fresh weights.
SHAPES = {
    "codebook_size": 9, "num_classes": 4, "grid_size": 2, "hidden_size": 32, "intermediate_size": 40,
    "num_register_tokens": 2, "num_pre_layers": 2, "num_fixed_point_layers": 2, "num_post_layers": 2,
    "input_injection": "linear",
}  # fmt: skip
LOGITS = {"num_attention_heads": 4, "num_fixed_point_iterations": 3, "rms_norm_eps": 0.1}
TESTED_ELSEWHERE = {
    "dropout": "test_modeling_fpmaskgit.py",
    "tie_word_embeddings": "test_modeling_fpmaskgit.py",
    "class_dropout": "test_mgm_trainer_images.py",
    "no_grad_iterations": "test_configuration_fpmdlm.py",  # the trainer draws them alike for all models
    "grad_iterations": "test_configuration_fpmdlm.py",
    "injection_init": "test_modeling_fpmdlm.py",
}


def own_fields() -> set[str]:
    return set(FPMaskGITConfig.own_fields())


def test_the_tables_cover_every_field():
    assert own_fields() == {*SHAPES, *LOGITS, *TESTED_ELSEWHERE}


@pytest.mark.parametrize("name", SHAPES)
def test_a_field_changes_the_shapes(name):
    base, other = (FPMaskGITModel(tiny_image_config(**overrides)) for overrides in ({}, {name: SHAPES[name]}))
    assert [p.shape for p in base.parameters()] != [p.shape for p in other.parameters()]


@pytest.mark.parametrize("name", LOGITS)
def test_a_field_changes_the_logits(name):
    base, other = tiny_image_model(), tiny_image_model(**{name: LOGITS[name]})
    other.load_state_dict(base.state_dict())
    ids = torch.arange(9)[None] % 8
    assert not torch.allclose(base(ids).logits, other(ids).logits, atol=1e-4)


def test_the_docstring_states_every_field_and_its_default():
    documented, config = documented_defaults(FPMaskGITConfig), FPMaskGITConfig()
    assert set(documented) == own_fields()
    for name, text in documented.items():
        default = getattr(config, name)
        assert default == float(text) if isinstance(default, float) else str(default) == text, name


def test_what_follows_from_the_fields():
    config = tiny_image_config()
    assert (config.vocab_size, config.mask_token_id, config.max_position_embeddings) == (8, 7, 9)
    assert (config.conditioning_size, config.num_hidden_layers) == (16, 3)
    assert config.num_labels == 3 and config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}


def test_classes_have_hugging_faces_names(tmp_path):
    names = {0: "tench", 1: "cassette player", 2: "church", 3: "French horn"}
    for given in ({"id2label": names}, {"id2label": names, "num_classes": 4}, {"num_labels": 4}):
        config = tiny_image_config(**{"num_classes": None, **given})
        assert config.num_classes == config.num_labels == 4
    tiny_image_model(num_classes=None, id2label=names).save_pretrained(tmp_path)
    again = FPMaskGITConfig.from_pretrained(tmp_path)
    assert again.id2label == names and again.num_classes == 4
    assert load_file(tmp_path / "model.safetensors")["class_embedding.weight"].shape == (5, 16)


def test_configuration_survives_a_round_trip():
    config = tiny_image_config(no_grad_iterations=[1, 2], grad_iterations=(2, 5), num_register_tokens=0)
    again = FPMaskGITConfig.from_dict(config.to_dict())
    assert {name: getattr(again, name) for name in own_fields()} == {
        name: getattr(config, name) for name in own_fields()
    }


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"codebook_size": 0}, "codebook_size"),
        ({"num_classes": 0}, "num_classes"),
        ({"num_classes": 4, "id2label": {0: "a"}}, "num_classes"),
        ({"num_classes": 4, "num_labels": 3}, "num_classes"),
        ({"grid_size": 2.0}, "grid_size"),
        ({"num_attention_heads": 17}, "num_attention_heads"),
        ({"intermediate_size": True}, "intermediate_size"),
        ({"num_register_tokens": -1}, "num_register_tokens"),
        ({"num_pre_layers": 0, "num_fixed_point_layers": 0, "num_post_layers": 0}, "num_fixed_point_layers"),
        ({"grad_iterations": [0, 3]}, "grad_iterations"),
        ({"input_injection": "add"}, "input_injection"),
        ({"dropout": 1.0}, "dropout"),
        ({"class_dropout": -0.1}, "class_dropout"),
        ({"vocab_size": 5}, "vocab_size"),
        ({"mask_token_id": 5}, "mask_token_id"),
    ],
    ids=str,
)
def test_bad_configurations_name_the_field(bad, named):
    with pytest.raises(ValueError, match=f"`{named}`"):
        tiny_image_config(**bad)
