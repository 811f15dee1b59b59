# SPDX-License-Identifier: Apache-2.0
"""Files that are damaged, incomplete or absurd: an error that names them, and soon."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, GenerationConfig

from fpmgm import FPMDLMForMaskedDiffusion, MGMGenerationConfig
from tests.testing_utils import refused, saved_adapter, tiny_image_model, tiny_model


IDS = torch.tensor([[1, 2, 10, 4]])


def without(folder, *names, file="model.safetensors") -> None:
    weights = load_file(folder / file)
    save_file({k: v for k, v in weights.items() if k not in names}, folder / file, metadata={"format": "pt"})


# --- what is saved ---------------------------------------------------------------------------------------------------

SAVED = [
    *((tiny_model, {"input_injection": kind}) for kind in ("mlp", "linear", "diagonal")),
    *((make, {"tie_word_embeddings": tied}) for make in (tiny_model, tiny_image_model) for tied in (True, False)),
]


@pytest.mark.parametrize(("make", "overrides"), SAVED)
def test_saving_and_loading_keeps_every_weight(tmp_path, make, overrides):
    model = make(**overrides)
    model.save_pretrained(tmp_path)
    loaded, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(model) and not loaded.training and not report["missing_keys"]
    saved, tied = model.state_dict(), model.config.tie_word_embeddings
    assert loaded.state_dict().keys() == saved.keys()
    assert [name for name, value in loaded.state_dict().items() if not torch.equal(value, saved[name])] == []
    assert (loaded.lm_head.weight is loaded.embed_tokens.weight) == tied
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) != tied
    ids = torch.arange(model.config.max_position_embeddings)[None] % 7
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert make is tiny_model or not [path for path in tmp_path.glob("*.py") if "fpmdlm" in path.name]


# --- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loader", [AutoModel, AutoModelForMaskedLM, FPMDLMForMaskedDiffusion])
def test_weights_that_a_checkpoint_lacks_are_named(tmp_path, loader):
    tiny_model().save_pretrained(tmp_path)
    without(tmp_path, "post_layers.0.up_proj.weight", "lm_head.weight")
    message = r"lacks 2 of the weights: lm_head.weight, post_layers.0.up_proj.weight. Get the whole checkpoint"
    for options in ({}, {"output_loading_info": True}, {"dtype": torch.bfloat16}, {"device_map": "cpu"}):
        refused(message, loader.from_pretrained, tmp_path, **options)
    model, report = loader.from_pretrained(tmp_path, ignore_mismatched_sizes=True, output_loading_info=True)
    assert report["missing_keys"] == {"lm_head.weight", "post_layers.0.up_proj.weight"}
    assert not model.lm_head.weight.any()  # as in a fresh model


@pytest.mark.parametrize("make", [tiny_model, tiny_image_model])
def test_a_tied_weight_that_is_lacking_is_named(tmp_path, make):
    make(tie_word_embeddings=True).save_pretrained(tmp_path)
    without(tmp_path, "embed_tokens.weight")
    refused(r"lacks .* embed_tokens.weight", AutoModel.from_pretrained, tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_needs_its_own_weights_and_those_of_its_base(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model = saved_adapter(tmp_path, tiny_model())
    expected = model(IDS).logits
    assert torch.equal(AutoModel.from_pretrained(adapter)(IDS).logits, expected)

    names = sorted(load_file(adapter / "adapter_model.safetensors"))
    without(adapter, names[0], file="adapter_model.safetensors")
    refused(r"lacks 1 of the weights: .*lora_A.* Get the whole adapter", AutoModel.from_pretrained, adapter)
    model.save_pretrained(adapter)
    without(base, "post_layers.0.up_proj.weight")
    refused(r"lacks 1 of the weights: post_layers.0.up_proj.weight", AutoModel.from_pretrained, adapter)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_whose_weights_are_not_found_is_refused_not_random(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    expected = saved_adapter(tmp_path, tiny_model(), use_dora=True)(IDS).logits
    loaded = PeftModel.from_pretrained(AutoModel.from_pretrained(base), adapter)
    torch.testing.assert_close(loaded(IDS).logits, expected)
    try:  # another version of transformers may find them
        found = AutoModel.from_pretrained(adapter)
    except ValueError as error:
        assert "lora_magnitude_vector" in str(error) and "let PEFT load it" in str(error)
    else:
        torch.testing.assert_close(found(IDS).logits, expected)


# --- generation_config.json -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"budget": 4', "generation_config.json cannot be read"),
        ("", "generation_config.json cannot be read"),
        ("[]", "generation_config.json cannot be read"),
        ("null", "generation_config.json cannot be read"),
        ('{"budget": "many"}', r"generation_config.json cannot be read .*`budget`='many' must be a whole number"),
        ('{"temperature": NaN}', r"generation_config.json cannot be read .*`temperature`=nan"),
        ('{"bugdet": 4}', r"generation_config.json cannot be read .*did you mean `budget`"),
        (json.dumps({"tuned_plans": {str(i): {"num_steps": 1} for i in range(1, 20_000)}}), "at most 1,000 plans"),
        (json.dumps({"tuned_plans": {"9" * 5000: {}}}), "must map budgets"),
        (json.dumps({"iterations": [1] * 10**6, "budget": None}), "`iterations`="),
        (b'{"budget": \xff}', "generation_config.json cannot be read"),
    ],
    ids=lambda text: str(text[:20]),
)
def test_damaged_parameters_of_generate_are_named(tmp_path, text, message):
    tiny_model().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(message, AutoModel.from_pretrained, tmp_path)


def test_a_configuration_given_to_from_pretrained_must_be_ours(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    ours = MGMGenerationConfig(budget=12, temperature=0.5)
    model = AutoModel.from_pretrained(tmp_path, generation_config=ours)
    assert (model.generation_config.budget, model.generation_config.temperature) == (12, 0.5)
    with pytest.raises(ValueError, match=r"`generation_config` is a GenerationConfig.*`fpmgm.MGMGenerationConfig`"):
        AutoModel.from_pretrained(tmp_path, generation_config=GenerationConfig())


# --- config.json ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "field", "value"),
    [
        (tiny_model, "rope_theta", float("nan")),
        (tiny_model, "rope_theta", 0),
        (tiny_model, "rope_theta", "10000"),
        (tiny_model, "layer_norm_eps", 0),
        (tiny_model, "layer_norm_eps", float("nan")),
        (tiny_model, "num_pre_layers", 10**7),
        (tiny_model, "hidden_size", 10**12),
        (tiny_model, "vocab_size", 10**30),
        (tiny_model, "max_position_embeddings", 10**30),
        (tiny_model, "dropout", float("nan")),
        (tiny_model, "dropout", "0.1"),
        (tiny_model, "time_conditioning", "no"),
        (tiny_model, "tie_word_embeddings", 1),
        (tiny_model, "grad_iterations", 3),
        (tiny_model, "grad_iterations", [3, 10**30]),
        (tiny_model, "num_fixed_point_iterations", 10**30),
        (tiny_image_model, "rms_norm_eps", 0),
        (tiny_image_model, "rms_norm_eps", float("inf")),
        (tiny_image_model, "num_post_layers", 10**7),
        (tiny_image_model, "grid_size", 10**9),
        (tiny_image_model, "num_register_tokens", 10**9),
        (tiny_image_model, "class_dropout", None),
    ],
)
def test_absurd_configurations_are_named(tmp_path, make, field, value):
    make().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    for loader in (AutoConfig, AutoModel):
        refused(f"`{field}`=", loader.from_pretrained, tmp_path)


@pytest.mark.parametrize("make", [tiny_model, tiny_image_model])
def test_misspelt_fields_are_refused_and_unknown_ones_of_a_saved_configuration_kept(make, tmp_path, caplog):
    config = make().config
    for name, near in (("hidden_sise", "hidden_size"), ("num_prelayers", "num_pre_layers"), ("drop_out", "dropout")):
        refused(f"`{name}`=3 is no field of {type(config).__name__}: did you mean `{near}`", type(config), **{name: 3})
    refused("`num_hidden_layers`=3 cannot be set", type(config), num_hidden_layers=3)
    # What transformers and its users set passes.
    others = {"torch_dtype": "float32", "attn_implementation": "eager", "name_or_path": "x", "architectures": ["A"]}
    assert type(config)(**others, problem_type=None, output_hidden_states=False)._attn_implementation == "eager"
    make().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hidden_sise": 3, "note": "mine"}))
    loaded = AutoModel.from_pretrained(tmp_path)
    assert (loaded.config.hidden_size, loaded.config.hidden_sise, loaded.config.note) == (16, 3, "mine")
