# SPDX-License-Identifier: Apache-2.0
"""The parameters of `generate`: where defaults come from, that they survive saving, that each changes something."""

import json

import pytest
import torch
from transformers import AutoModel

from fpmgm import FPMDLMForMaskedDiffusion, MGMGenerationConfig
from fpmgm.models.generation_config_mgm import RETIRED
from tests.models.helpers import documented_defaults, lively_model
from tests.testing_utils import refused, tiny_model


def test_defaults_come_from_the_models_generation_config():
    model, rows = lively_model(), {"batch_size": 4, "seed": 1}
    saved = {"budget": 30, "num_steps": 4, "reuse": "full", "temperature": 0.7, "top_k": 4}
    plain = model.generate(**rows, **saved)
    model.generation_config = MGMGenerationConfig(**saved)
    assert torch.equal(model.generate(**rows), plain)
    assert torch.equal(model.generate(**rows, temperature=0.7, top_k=4), plain)
    assert not torch.equal(model.generate(**rows, temperature=2.0, top_k=None), plain)
    given = model.generate(generation_config=MGMGenerationConfig(budget=12, return_dict_in_generate=True))
    assert given.block_evaluations == 12
    assert model.generation_config.to_dict() == MGMGenerationConfig(**saved).to_dict()  # no call changed it


def test_a_budget_in_the_call_replaces_saved_iterations_and_the_other_way_round():
    model = tiny_model()
    model.generation_config = MGMGenerationConfig(num_steps=4, iterations=2, return_dict_in_generate=True)
    assert model.generate().iterations == [2] * 4
    assert model.generate(budget=30).block_evaluations == 30
    model.generation_config = MGMGenerationConfig(budget=30, return_dict_in_generate=True)
    assert model.generate(iterations=[1, 5]).iterations == [1, 5]
    with pytest.raises(ValueError, match="`budget`=12 and `iterations`"):
        MGMGenerationConfig(budget=12, iterations=[4, 4])  # would spend more than the budget


def test_defaults_and_tokens_survive_saving_and_loading(tmp_path):
    model, rows = tiny_model(), {"batch_size": 3, "seed": 1}
    saved = {"budget": 20, "allocation": "cosine", "reuse": "full", "gamma_masked": [0.1, 0.2], "top_p": 0.9}
    model.generation_config = MGMGenerationConfig(**saved)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "generation_config.json").read_text())
    assert saved.items() <= written.items()
    assert written["temperature"] == 1.0 and written["final"] == "sample"  # every default can be read there

    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is FPMDLMForMaskedDiffusion
    assert type(loaded.generation_config) is MGMGenerationConfig
    for name, value in saved.items():
        assert getattr(loaded.generation_config, name) == value
    ids = torch.tensor([[1, 2, 10, 10, 4]])
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert torch.equal(loaded.generate(**rows), model.generate(**rows))
    assert not torch.equal(loaded.generate(**rows), loaded.generate(**rows, top_p=None, temperature=2.0))
    (tmp_path / "generation_config.json").unlink()  # as in a checkpoint from elsewhere
    assert AutoModel.from_pretrained(tmp_path).generation_config.to_dict() == MGMGenerationConfig().to_dict()


def test_a_tuned_plan_is_used_for_its_budget_as_a_whole(tmp_path):
    model, call = lively_model(), {"batch_size": 20, "seed": 1, "return_dict_in_generate": True}
    plan = {"num_steps": 3, "allocation": "fixed", "reuse": "3sr", "gamma_unchanged": 0.5}
    by_hand = model.generate(**call, budget=24, **plan)
    plain, other = model.generate(**call, budget=24), model.generate(**call, budget=30)
    reuse_only = model.generate(**call, budget=24, reuse="none")
    model.generation_config = model.generation_config.updated(tuned_plans={24: plan})
    model.save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path).double()

    tuned = model.generate(**call, budget=24)
    assert torch.equal(tuned.sequences, by_hand.sequences) and not torch.equal(tuned.sequences, plain.sequences)
    assert tuned.tuned_plan == plan and tuned.num_steps == 3 and by_hand.tuned_plan is None
    cooler = model.generate(**call, budget=24, temperature=0.5)  # no part of the plan: it is used
    assert cooler.tuned_plan == plan and not torch.equal(cooler.sequences, tuned.sequences)
    # Another budget, a value of the plan set by the caller, or no plans at all: it is not.
    for options, expected in (({"budget": 30}, other), ({"budget": 24, "reuse": "none"}, reuse_only)):
        found = model.generate(**call, **options)
        assert found.tuned_plan is None and torch.equal(found.sequences, expected.sequences)
    assert torch.equal(model.generate(**call, budget=24, tuned_plans={}).sequences, plain.sequences)
    assert model.generate(**call, num_steps=3, iterations=6).tuned_plan is None
    assert model.generate(**call, budget=24, iterations_per_step=2).num_steps == 6
    model.generation_config.budget = 24  # also as the model's own default
    assert torch.equal(model.generate(**call).sequences, tuned.sequences)


@pytest.mark.parametrize(
    ("plans", "message"),
    [
        ({"96": {"temperature": 0.5}}, r"`tuned_plans`\['96'\] sets \['temperature'\], but may set"),
        ({"96": {"iterations": 4}}, r"`tuned_plans`\['96'\] sets \['iterations'\]"),
        ({"96": {"reuse": "some"}}, r"`tuned_plans`\['96'\]: `reuse`='some' must be one of"),
        ({"many": {}}, "`tuned_plans` has 'many': {}, but must map budgets, such as '96', to dicts"),
        ({"96": 4}, "`tuned_plans` has '96': 4"),
    ],
)
def test_tuned_plans_are_checked(plans, message):
    refused(message, MGMGenerationConfig, tuned_plans=plans)


@pytest.mark.parametrize("name", RETIRED)
def test_files_of_earlier_versions_are_read_where_retired_options_are_off(name):
    assert MGMGenerationConfig(**{name: False}).to_dict() == MGMGenerationConfig().to_dict()
    refused(rf"unknown generation argument\(s\) \['{name}'\]", MGMGenerationConfig, **{name: True})


EFFECTIVE_VALUES = {
    "budget": 33,
    "num_steps": 3,
    "iterations": [1, 1, 1],
    "iterations_per_step": 1,
    "allocation": "increasing",
    "reuse": "full",
    "gamma_unchanged": 0.3,
    "gamma_masked": [0.0, 0.4],
    "gamma_changed": 0.9,
    "gamma_remasked": 0.9,
    "tolerance": 0.1,
    "solver": "anderson",
    "freeze": True,
    "refresh_every": 2,
    "freeze_tolerance": 0.1,
    "tuned_plans": {"24": {"num_steps": 3, "reuse": "none"}},
    "remask": 0.5,
    "order": "confidence",
    "entropy_bound": 5.0,
    "confidence_threshold": 0.2,
    "margin_threshold": 0.01,
    "block_length": 3,
    "stop_at_eos": True,
    "eos_token_id": 3,
    "pad_token_id": 9,
    "temperature": 0.5,
    "top_k": 2,
    "top_p": 0.5,
}
# What a parameter needs beside it to have anything to act on.
NEEDED = {
    "gamma_remasked": {"remask": 0.5},
    "refresh_every": {"freeze": True},
    "freeze_tolerance": {"freeze": True},
    "entropy_bound": {"order": "entropy"},
    "confidence_threshold": {"order": "threshold"},
    "margin_threshold": {"order": "margin"},
    "stop_at_eos": {"eos_token_id": 2},
    "eos_token_id": {"eos_token_id": 2, "stop_at_eos": True},
    "pad_token_id": {"eos_token_id": 2, "stop_at_eos": True},
}
# Tested by name above or (guidance) with images, or (progress_bar, token ids) without influence on the tokens.
OTHER_FIELDS = {
    "final",
    "guidance_scale",
    "guidance_schedule",
    "progress_bar",
    "return_dict_in_generate",
    "bos_token_id",
}


@pytest.mark.parametrize("name", EFFECTIVE_VALUES)
def test_every_parameter_changes_the_tokens(name):
    model, call = lively_model(), {"batch_size": 20, "seed": 0, "budget": 24, **NEEDED.get(name, {})}
    changed = {**call, name: EFFECTIVE_VALUES[name]}
    if name == "iterations":
        del changed["budget"]
    before, after = model.generate(**call), model.generate(**changed)
    assert before.shape != after.shape or not torch.equal(before, after)


def test_the_generation_docstring_states_every_field_and_its_default():
    defaults = {k: v for k, v in vars(MGMGenerationConfig()).items() if not k.startswith("_")}
    del defaults["transformers_version"]
    assert set(defaults) == set(EFFECTIVE_VALUES) | OTHER_FIELDS
    assert documented_defaults(MGMGenerationConfig) == {name: str(value) for name, value in defaults.items()}


def test_a_default_that_is_changed_in_place_stays_one_configurations_own():
    config = MGMGenerationConfig()
    config.tuned_plans["96"], config.gamma_masked[0] = {"num_steps": 8}, 0.1
    assert MGMGenerationConfig().tuned_plans == {} and MGMGenerationConfig().gamma_masked == [0.75, 0.9]
