# SPDX-License-Identifier: Apache-2.0
"""Configurations: every field does something, is documented, survives saving, and refuses bad values."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fpmgm import FPMaskGITConfig, FPMaskGITModel, FPMDLMConfig, FPMDLMForMaskedDiffusion
from tests.models.helpers import documented_defaults
from tests.testing_utils import refused, tiny_config, tiny_image_config, tiny_image_model, tiny_model


MASK = 10  # of tiny_config
SHAKEN = {tiny_config: tiny_model, tiny_image_config: tiny_image_model}
FRESH = {tiny_config: FPMDLMForMaskedDiffusion, tiny_image_config: FPMaskGITModel}


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(MASK, shape, generator=torch.Generator().manual_seed(0))


def two_models(config, name, value) -> list[nn.Module]:
    """With the same weights, the second with another value of a field."""
    models = [SHAKEN[config](), SHAKEN[config](**{name: value})]
    models[1].load_state_dict(models[0].state_dict())
    return models


# --- what a field does -----------------------------------------------------------------------------------------------


def changes_shapes(config, name, value):
    one, other = (FRESH[config](config(**given)).named_parameters() for given in ({}, {name: value}))
    return [(key, p.shape) for key, p in one] != [(key, p.shape) for key, p in other]


def changes_logits(config, name, value):
    """The same weights give other logits."""
    call = {"input_ids": torch.arange(config().max_position_embeddings)[None] % 8, "timesteps": torch.tensor([0.5])}
    one, other = (model(**call).logits for model in two_models(config, name, value))
    return not torch.allclose(one, other, atol=1e-4)


def changes_fresh_weights(config, name, value):
    def fresh(**overrides):
        torch.manual_seed(0)
        return FRESH[config](config(**overrides)).state_dict()

    base, other = fresh(), fresh(**{name: value})
    return any(not torch.equal(base[key], other[key]) for key in base)


def changes_training(config, name, value):
    """The same weights give another loss in training mode, and the same one in evaluation mode."""
    base, other = two_models(config, name, value)
    length, mask = base.config.max_position_embeddings, base.config.mask_token_id
    call = {"input_ids": torch.full((2, length), mask), "labels": random_ids(2, length) % mask}
    assert torch.equal(base(**call).loss, other(**call).loss)
    return not torch.allclose(base.train()(**call).loss, other.train()(**call).loss)


def changes_the_forbidden_id(config, name, value):
    """The mask id is the one without probability, and the one that `generate` starts from."""
    base, other = two_models(config, name, value)
    call, starts = {"input_ids": torch.full((1, 3), 5), "labels": torch.full((1, 3), 2)}, []
    for model in (base, other):
        model.register_forward_pre_hook(lambda module, args: starts.append(args[0]) if args else None)
        model.generate(length=3, num_steps=1, iterations=1)
    return base(**call).loss != other(**call).loss and [s.unique().tolist() for s in starts] == [[MASK], [value]]


def changes_the_longest_sequence(config, name, value):
    ids = random_ids(1, value)
    refused(name, tiny_model(), ids)
    model = tiny_model(**{name: value})
    return model(ids).logits.shape[1] == value and model.generate(num_steps=1, iterations=1).shape == (1, value)


def changes_what_the_trainer_draws(config, name, value):
    # Consumed by the trainer alone, which draws the iterations of each optimizer step.
    from fpmgm.trainers import MGMTrainer

    trainer = SimpleNamespace(
        model=SimpleNamespace(config=config(**{name: value})),
        args=SimpleNamespace(seed=0),
        state=SimpleNamespace(global_step=0),
    )
    return value[0] in MGMTrainer.draw_iterations(trainer)


def is_kept_for_the_tokenizer(config, name, value):
    # Metadata: no code of the model reads it, the saved checkpoint carries it.
    made = config(**{name: value})
    return type(made).from_dict(made.to_dict()).to_dict()[name] == value


OF_ALL = {
    "hidden_size": (changes_shapes, 32),
    "num_attention_heads": (changes_logits, 4),
    "intermediate_size": (changes_shapes, 40),
    "dropout": (changes_training, 0.5),
    "num_pre_layers": (changes_shapes, 2),
    "num_fixed_point_layers": (changes_shapes, 2),
    "num_post_layers": (changes_shapes, 2),
    "input_injection": (changes_shapes, "linear"),
    "injection_init": (changes_fresh_weights, "identity"),
    "num_fixed_point_iterations": (changes_logits, 3),
    "no_grad_iterations": (changes_what_the_trainer_draws, [9, 9]),
    "grad_iterations": (changes_what_the_trainer_draws, [9, 9]),
}
OF_TEXT = {
    **OF_ALL,
    "vocab_size": (changes_shapes, 12),
    "mask_token_id": (changes_the_forbidden_id, 4),
    "conditioning_size": (changes_shapes, 4),
    "max_position_embeddings": (changes_the_longest_sequence, 11),
    "time_conditioning": (changes_logits, True),
    "rope_theta": (changes_logits, 50.0),
    "layer_norm_eps": (changes_logits, 0.1),
    "tie_word_embeddings": (changes_shapes, True),
    "bos_token_id": (is_kept_for_the_tokenizer, 3),
    "eos_token_id": (is_kept_for_the_tokenizer, 3),
    "pad_token_id": (is_kept_for_the_tokenizer, 3),
}
OF_IMAGES = {
    **OF_ALL,
    "codebook_size": (changes_shapes, 9),
    "num_classes": (changes_shapes, 4),
    "grid_size": (changes_shapes, 2),
    "num_register_tokens": (changes_shapes, 2),
    "rms_norm_eps": (changes_logits, 0.1),
    "tie_word_embeddings": (changes_shapes, False),
}
TESTED_ELSEWHERE = {"class_dropout": "test_mgm_trainer.py"}
KINDS = {FPMDLMConfig: (tiny_config, OF_TEXT), FPMaskGITConfig: (tiny_image_config, OF_IMAGES)}
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
def test_the_table_of_effects_covers_every_field(kind):
    assert {*kind.own_fields()} - TESTED_ELSEWHERE.keys() == KINDS[kind][1].keys()


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, (_, effects) in KINDS.items() for name in effects])
def test_every_configuration_field_has_an_effect(kind, name):
    config, (effect, value) = KINDS[kind][0], KINDS[kind][1][name]
    assert getattr(config(), name) != value
    assert effect(config, name, value)


@every_kind
def test_the_docstring_states_every_field_and_its_default(kind):
    documented, config = documented_defaults(kind), kind()
    assert {*documented} == {*kind.own_fields()}
    for name, text in documented.items():
        default = getattr(config, name)
        assert default == float(text) if isinstance(default, float) else str(default) == text, name


@every_kind
def test_configuration_survives_a_round_trip(kind):
    changes = {"no_grad_iterations": [1, 2], "grad_iterations": (2, 5), "input_injection": "diagonal"}
    config = KINDS[kind][0](**changes, **({"pad_token_id": 0} if kind is FPMDLMConfig else {"num_register_tokens": 0}))
    again = kind.from_dict(config.to_dict())
    for name in kind.own_fields():
        assert getattr(again, name) == getattr(config, name), name
    assert config.grad_iterations == [2, 5]


def test_what_follows_from_the_fields_of_an_image_model():
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


# --- values that are refused -----------------------------------------------------------------------------------------

BAD_IN_ALL = [  # values of the first field named
    {"num_fixed_point_layers": 0, "num_pre_layers": 0, "num_post_layers": 0},
    {"num_post_layers": -1},
    {"num_pre_layers": True},
    {"num_fixed_point_iterations": 0},
    {"intermediate_size": 0},
    {"intermediate_size": True},
    {"hidden_size": "16"},
    {"grad_iterations": [0, 3]},
    {"grad_iterations": [4, 3]},
    {"grad_iterations": [3]},
    {"no_grad_iterations": [-1, 2]},
    {"no_grad_iterations": [0.5, 2]},
    {"input_injection": "add"},
    {"injection_init": "zero"},
    {"injection_init": "identity", "input_injection": "diagonal"},
    {"dropout": 1.0},
    {"dropout": -0.1},
]
BAD_IN_TEXT = [
    {"num_attention_heads": 3},
    {"num_attention_heads": 16},  # heads of size 1: no pairs to rotate
    {"hidden_size": 18},
    {"vocab_size": 0},
    {"mask_token_id": 11},
    {"mask_token_id": -1},
    {"conditioning_size": 1.5},
    {"max_position_embeddings": 0},
]
BAD_IN_IMAGES = [
    {"codebook_size": 0},
    {"num_classes": 0},
    {"num_classes": 4, "id2label": {0: "a"}},
    {"num_classes": 4, "num_labels": 3},
    {"grid_size": 2.0},
    {"num_attention_heads": 17},
    {"num_register_tokens": -1},
    {"class_dropout": -0.1},
    {"vocab_size": 5},
    {"mask_token_id": 5},
]


@pytest.mark.parametrize(
    ("config", "bad"),
    [(tiny_config, bad) for bad in BAD_IN_ALL + BAD_IN_TEXT]
    + [(tiny_image_config, bad) for bad in BAD_IN_ALL + BAD_IN_IMAGES],
    ids=lambda value: str(value) if isinstance(value, dict) else value.__name__,
)
def test_bad_configurations_name_the_field(config, bad):
    refused(f"`{next(iter(bad))}`", config, **bad)
