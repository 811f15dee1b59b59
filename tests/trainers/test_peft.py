# SPDX-License-Identifier: Apache-2.0
"""Adapters of PEFT against the same model with the adapted matrices written out: W + (alpha / r) B A."""

import copy
import json
import re

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS
from torch import nn
from transformers import AutoModel

from fpmgm.models.kinds import KINDS
from fpmgm.trainers import peft as ours
from fpmgm.trainers.peft import LoraArguments
from tests.testing_utils import refused, stacks

from .training_utils import LENGTH, MASK, VOCABULARY, make_trainer, token_rows, training_model, weights


RANK, ALPHA = 4, 10


def lora(**options) -> LoraConfig:
    return LoraConfig(**{"r": RANK, "lora_alpha": ALPHA, **options})


def adapted(seed: int = 0, config: LoraConfig | None = None, **overrides) -> PeftModel:
    """A float64 model with an adapter that does something (a fresh one has B = 0)."""
    torch.manual_seed(seed)
    model = get_peft_model(training_model(**overrides).double(), config or lora())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(0.1 * torch.randn_like(p))
    return model.eval()


def factors(model: nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """B (out, r) and A (r, in) by the name of the matrix that they adapt."""
    found = {}
    for name, p in model.named_parameters():
        if "lora_A" in name:
            place = re.sub(r"^base_model\.model\.|\.lora_A\.default\.weight$", "", name)
            found[f"{place}.weight"] = (model.get_parameter(name.replace("lora_A", "lora_B")), p)
    return found


def written_out(model: nn.Module, base: nn.Module) -> nn.Module:
    """`base` with the adapters of `model` added to its matrices."""
    dense = copy.deepcopy(base)
    with torch.no_grad():
        for name, (b, a) in factors(model).items():
            dense.get_parameter(name).add_(ALPHA / RANK * b @ a)
    return dense


# --- what is adapted -------------------------------------------------------------------------------------------------


def test_without_names_the_projections_of_all_blocks_are_adapted():
    model = training_model()
    expected = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and re.match(r"(pre_layers|post_layers|fixed_point\.layers)\.0\.", name)
    }
    assert len(expected) == 3 * 4
    assert factors(get_peft_model(model, LoraConfig(r=8))).keys() == expected


def test_a_registration_of_the_user_stays_and_peft_need_not_be_installed(monkeypatch):
    monkeypatch.setitem(DEFAULTS, "fpmdlm", ["qkv_proj"])
    ours.register_target_modules()
    assert DEFAULTS["fpmdlm"] == ["qkv_proj"]
    monkeypatch.delitem(DEFAULTS, "fpmdlm")
    monkeypatch.setattr(ours, "is_peft_available", lambda: False)
    ours.register_target_modules()
    assert "fpmdlm" not in DEFAULTS
    with pytest.raises(ImportError, match=r"fpmgm\[train\]"):
        ours.lora_config(LoraArguments(use_peft=True))


@pytest.mark.parametrize("layers", [(1, 1, 1), (4, 0, 0)])
def test_every_linear_map_can_be_adapted(layers):
    overrides = stacks(*layers)
    model = adapted(config=lora(target_modules="all-linear"), **overrides)
    linear = {f"{name}.weight" for name, m in training_model(**overrides).named_modules() if isinstance(m, nn.Linear)}
    assert factors(model).keys() == linear - {"lm_head.weight"}
    ids = torch.randint(0, VOCABULARY, (2, LENGTH))
    dense = written_out(model, training_model(**overrides).double())
    torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-10, atol=1e-10)


def test_the_gradient_is_that_of_the_matrices_written_out():
    # With W' = W + sBA and G = dL/dW': dL/dB = sGAᵀ, dL/dA = sBᵀG. F's matrices are used at each of the iterations.
    model = adapted(config=lora(target_modules=[*KINDS["fpmdlm"].lora_target_modules, "state_proj", "out_proj"]))
    dense = written_out(model, training_model().double())
    labels = torch.randint(0, MASK, (3, LENGTH))
    masked = torch.rand(3, LENGTH) < 0.5
    inputs = {
        "input_ids": labels.masked_fill(masked, MASK),
        "labels": labels.masked_fill(~masked, -100),
        "loss_weights": torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64),
    }
    for one in (model, dense):
        one.train()
        one(**inputs, num_iterations=3, num_no_grad_iterations=2).loss.backward()
    assert len(factors(model)) == 14
    for name, (b, a) in factors(model).items():
        gradient = dense.get_parameter(name).grad
        assert gradient.abs().max() > 1e-6
        torch.testing.assert_close(b.grad, ALPHA / RANK * gradient @ a.T, rtol=1e-9, atol=1e-14)
        torch.testing.assert_close(a.grad, ALPHA / RANK * b.T @ gradient, rtol=1e-9, atol=1e-14)
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, _ in model.named_parameters() if "lora_" in name
    }


# --- training --------------------------------------------------------------------------------------------------------


def test_the_trainer_trains_the_adapter_alone_and_exports_its_average(tmp_path):
    training_model().double().save_pretrained(tmp_path / "base")
    base = AutoModel.from_pretrained(tmp_path / "base")
    trainer = make_trainer(
        tmp_path, base, peft_config=lora(), eval_dataset=token_rows(8), save_strategy="steps", save_steps=3
    )
    before = weights(trainer.model)
    trainer.train()
    changed = {name for name, old in before.items() if not torch.equal(old, trainer.model.get_parameter(name))}
    assert changed == {name for name in before if "lora_" in name} == trainer.ema.shadow.keys()
    trainer.save_model(str(tmp_path / "adapter"))

    raw = written_out(trainer.model, AutoModel.from_pretrained(tmp_path / "base"))
    with trainer.ema.applied():
        dense = written_out(trainer.model, AutoModel.from_pretrained(tmp_path / "base"))
    other = make_trainer(tmp_path / "other", dense, eval_dataset=token_rows(8))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(other.evaluate()["eval_loss"], rel=1e-6)

    ids = torch.randint(0, VOCABULARY, (2, LENGTH))
    expected, drawn = dense(ids).logits, dense.generate(batch_size=3, budget=24, seed=1)
    assert (raw(ids).logits - expected).abs().max() > 1e-4
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    onto_base = AutoModel.from_pretrained(tmp_path / "base")
    onto_base.load_adapter(str(tmp_path / "adapter"))
    loaded = [model, AutoModel.from_pretrained(tmp_path / "adapter").eval(), onto_base.eval()]
    loaded.append(copy.deepcopy(model).merge_and_unload())
    loaded[-1].save_pretrained(tmp_path / "merged")
    loaded.append(AutoModel.from_pretrained(tmp_path / "merged"))
    for one in loaded:
        torch.testing.assert_close(one(ids).logits, expected, rtol=1e-9, atol=1e-9)
        assert torch.equal(one.generate(batch_size=3, budget=24, seed=1), drawn)
    checkpoint = PeftModel.from_pretrained(AutoModel.from_pretrained(tmp_path / "base"), tmp_path / "checkpoint-3")
    torch.testing.assert_close(checkpoint.eval()(ids).logits, raw(ids).logits, rtol=1e-9, atol=1e-9)


def test_the_card_is_that_of_an_adapter(tmp_path):
    training_model().save_pretrained(tmp_path / "base")
    trainer = make_trainer(
        tmp_path, AutoModel.from_pretrained(tmp_path / "base"), peft_config=lora(), data_description="random rows"
    )
    trainer.save_model()
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.library_name, card.data.base_model) == ("peft", None)  # a folder is not on the hub
    assert {"fpmgm", "lora"} <= set(card.data.tags)
    trained = sum(b.numel() + a.numel() for b, a in factors(trainer.model).values())
    assert f"adapter of `{tmp_path / 'base'}` with {trained:,} parameters" in card.text
    assert f"| rank, alpha | {RANK}, {ALPHA} |" in card.text and "random rows" in card.text
    trainer.model.peft_config["default"].base_model_name_or_path = "someone/fp-mdlm"
    trainer.create_model_card()
    assert ModelCard.load(tmp_path / "README.md").data.base_model == "someone/fp-mdlm"


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_a_second_adapter_is_refused_and_dropout_in_f_warned_of(tmp_path, caplog):
    refused(r"`peft_config`.*\['default'\]", make_trainer, tmp_path, adapted(), peft_config=lora())
    tokens = PromptTuningConfig(num_virtual_tokens=2)
    refused("`peft_config` of PROMPT_TUNING puts tokens of its own", make_trainer, tmp_path, peft_config=tokens)
    make_trainer(tmp_path, adapted().merge_and_unload(), peft_config=lora())
    explicit = training_model(num_fixed_point_layers=0)
    with caplog.at_level("WARNING"):
        make_trainer(tmp_path, explicit, peft_config=lora(lora_dropout=0.25))
        assert "lora_dropout" not in caplog.text
        make_trainer(tmp_path, peft_config=lora(lora_dropout=0.25))
        assert "`lora_dropout`=0.25" in caplog.text


def test_the_options_of_recipes_become_a_configuration():
    assert ours.lora_config(LoraArguments()) is None
    config = ours.lora_config(LoraArguments(use_peft=True, lora_r=3, lora_alpha=7, lora_target_modules=["o_proj"]))
    values = json.loads(json.dumps(config.to_dict(), default=sorted))
    expected = {"r": 3, "lora_alpha": 7, "lora_dropout": 0.0, "target_modules": ["o_proj"]}
    assert {name: values[name] for name in expected} == expected
    arguments = LoraArguments(use_peft=True, lora_target_modules=["all-linear"])
    assert ours.lora_config(arguments).target_modules == "all-linear"
    refused(r"\['lora_r'\].*`use_peft`", LoraArguments, lora_r=8)
