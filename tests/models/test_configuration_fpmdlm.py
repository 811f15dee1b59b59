# SPDX-License-Identifier: Apache-2.0
"""FP-MDLM's configuration: every field does something, is documented, survives saving, and refuses bad values."""

from types import SimpleNamespace

import pytest
import torch

from fpmgm import FPMDLMConfig, FPMDLMForMaskedDiffusion
from tests.models.helpers import documented_defaults
from tests.testing_utils import tiny_config, tiny_model


MASK = 10  # of tiny_config


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(MASK, shape, generator=torch.Generator().manual_seed(0))


def shapes(**overrides) -> list:
    return [
        (name, tuple(p.shape)) for name, p in FPMDLMForMaskedDiffusion(tiny_config(**overrides)).named_parameters()
    ]


def changes_shapes(name, value):
    return shapes() != shapes(**{name: value})


def changes_logits(name, value):
    """The same weights give other logits."""
    base, other = tiny_model(), tiny_model(**{name: value})
    other.load_state_dict(base.state_dict())
    call = {"input_ids": random_ids(1, 7), "timesteps": torch.tensor([0.5])}
    return not torch.allclose(base(**call).logits, other(**call).logits, atol=1e-4)


def changes_fresh_weights(name, value):
    def fresh(**overrides):
        torch.manual_seed(0)
        return FPMDLMForMaskedDiffusion(tiny_config(**overrides)).state_dict()

    base, other = fresh(), fresh(**{name: value})
    return any(not torch.equal(base[key], other[key]) for key in base)


def changes_training(name, value):
    """The same weights give another loss in training mode, and the same one in evaluation mode."""
    base, other = tiny_model(), tiny_model(**{name: value})
    other.load_state_dict(base.state_dict())
    call = {"input_ids": torch.full((2, 7), MASK), "labels": random_ids(2, 7)}
    assert torch.equal(base(**call).loss, other(**call).loss)
    return not torch.allclose(base.train()(**call).loss, other.train()(**call).loss)


def changes_the_forbidden_id(name, value):
    """The mask id is the one without probability, and the one that `generate` starts from."""
    base, other = tiny_model(), tiny_model(**{name: value})
    other.load_state_dict(base.state_dict())
    call, starts = {"input_ids": torch.full((1, 3), 5), "labels": torch.full((1, 3), 2)}, []
    for model in (base, other):
        model.register_forward_pre_hook(lambda module, args: starts.append(args[0]) if args else None)
        model.generate(length=3, num_steps=1, iterations=1)
    return base(**call).loss != other(**call).loss and [s.unique().tolist() for s in starts] == [[MASK], [value]]


def changes_the_longest_sequence(name, value):
    ids = random_ids(1, value)
    with pytest.raises(ValueError, match=name):
        tiny_model()(ids)
    model = tiny_model(**{name: value})
    return model(ids).logits.shape[1] == value and model.generate(num_steps=1, iterations=1).shape == (1, value)


def changes_what_the_trainer_draws(name, value):
    # Consumed by the trainer alone, which draws the iterations of each optimizer step.
    from fpmgm.trainers import MGMTrainer

    trainer = SimpleNamespace(
        model=SimpleNamespace(config=tiny_config(**{name: value})),
        args=SimpleNamespace(seed=0),
        state=SimpleNamespace(global_step=0),
    )
    return value[0] in MGMTrainer.draw_iterations(trainer)


def is_kept_for_the_tokenizer(name, value):
    # Metadata: no code of the model reads it, the saved checkpoint carries it.
    return FPMDLMConfig.from_dict(tiny_config(**{name: value}).to_dict()).to_dict()[name] == value


FIELD_EFFECTS = {
    "vocab_size": (changes_shapes, 12),
    "mask_token_id": (changes_the_forbidden_id, 4),
    "hidden_size": (changes_shapes, 32),
    "num_attention_heads": (changes_logits, 4),
    "intermediate_size": (changes_shapes, 24),
    "conditioning_size": (changes_shapes, 4),
    "max_position_embeddings": (changes_the_longest_sequence, 11),
    "dropout": (changes_training, 0.5),
    "num_pre_layers": (changes_shapes, 2),
    "num_fixed_point_layers": (changes_shapes, 2),
    "num_post_layers": (changes_shapes, 2),
    "input_injection": (changes_shapes, "linear"),
    "injection_init": (changes_fresh_weights, "identity"),
    "num_fixed_point_iterations": (changes_logits, 3),
    "no_grad_iterations": (changes_what_the_trainer_draws, [9, 9]),
    "grad_iterations": (changes_what_the_trainer_draws, [9, 9]),
    "time_conditioning": (changes_logits, True),
    "rope_theta": (changes_logits, 50.0),
    "layer_norm_eps": (changes_logits, 0.1),
    "tie_word_embeddings": (changes_shapes, True),
    "bos_token_id": (is_kept_for_the_tokenizer, 3),
    "eos_token_id": (is_kept_for_the_tokenizer, 3),
    "pad_token_id": (is_kept_for_the_tokenizer, 3),
}


def own_fields() -> set[str]:
    return set(FPMDLMConfig.own_fields())


def test_the_table_of_effects_covers_every_field():
    assert own_fields() == set(FIELD_EFFECTS)


@pytest.mark.parametrize("name", FIELD_EFFECTS)
def test_every_configuration_field_has_an_effect(name):
    effect, value = FIELD_EFFECTS[name]
    assert getattr(tiny_config(), name) != value
    assert effect(name, value)


def test_the_docstring_states_every_field_and_its_default():
    documented, config = documented_defaults(FPMDLMConfig), FPMDLMConfig()
    assert set(documented) == own_fields()
    for name, text in documented.items():
        default = getattr(config, name)
        assert default == float(text) if isinstance(default, float) else str(default) == text, name


def test_configuration_survives_a_round_trip():
    config = tiny_config(no_grad_iterations=[1, 2], grad_iterations=(2, 5), input_injection="diagonal", pad_token_id=0)
    again = FPMDLMConfig.from_dict(config.to_dict())
    assert {name: getattr(again, name) for name in own_fields()} == {
        name: getattr(config, name) for name in own_fields()
    }
    assert config.grad_iterations == [2, 5]


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"num_attention_heads": 3}, "num_attention_heads"),
        ({"num_attention_heads": 16}, "num_attention_heads"),  # heads of size 1: no pairs to rotate
        ({"hidden_size": 18}, "hidden_size"),
        ({"hidden_size": "16"}, "hidden_size"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"mask_token_id": 11}, "mask_token_id"),
        ({"mask_token_id": -1}, "mask_token_id"),
        ({"num_pre_layers": 0, "num_fixed_point_layers": 0, "num_post_layers": 0}, "num_fixed_point_layers"),
        ({"num_post_layers": -1}, "num_post_layers"),
        ({"num_pre_layers": True}, "num_pre_layers"),
        ({"num_fixed_point_iterations": 0}, "num_fixed_point_iterations"),
        ({"intermediate_size": 0}, "intermediate_size"),
        ({"conditioning_size": 1.5}, "conditioning_size"),
        ({"max_position_embeddings": 0}, "max_position_embeddings"),
        ({"grad_iterations": [0, 3]}, "grad_iterations"),
        ({"grad_iterations": [4, 3]}, "grad_iterations"),
        ({"grad_iterations": [3]}, "grad_iterations"),
        ({"no_grad_iterations": [-1, 2]}, "no_grad_iterations"),
        ({"no_grad_iterations": [0.5, 2]}, "no_grad_iterations"),
        ({"input_injection": "add"}, "input_injection"),
        ({"injection_init": "zero"}, "injection_init"),
        ({"input_injection": "diagonal", "injection_init": "identity"}, "injection_init"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": -0.1}, "dropout"),
    ],
    ids=str,
)
def test_bad_configurations_name_the_field(bad, named):
    with pytest.raises(ValueError, match=f"`{named}`"):
        tiny_config(**bad)
