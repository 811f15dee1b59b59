# SPDX-License-Identifier: Apache-2.0
"""What a training starts from: tokenizers that fit, adapters that can be trained or are whole, and no warning that a
user cannot act on."""

import logging
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast

from fpmgm.data import train_tokenizer

from ..testing_utils import refused, saved_adapter, tiny_image_model
from .training_utils import image_rows, make_trainer, token_rows, training_model, weights


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["the cat sat on the mat and the dog ran"] * 9, 270)


def fitting_model(tokenizer, **overrides):
    return training_model(vocab_size=len(tokenizer), mask_token_id=tokenizer.mask_token_id, **overrides)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_in_half_precision_are_warned_of(tmp_path, caplog, dtype):
    with caplog.at_level(logging.WARNING):
        make_trainer(tmp_path, training_model().to(dtype), max_steps=1).train()
        make_trainer(tmp_path, training_model().to(dtype), max_steps=1, peft_config=LoraConfig(r=2)).train()
    warned = [text for text in caplog.messages if "half precision" in text]
    if dtype == torch.float32:
        assert warned == []
    else:  # an adapter of it is in float32
        assert len(warned) == 1 and str(dtype) in warned[0] and "`dtype=torch.float32`" in warned[0]


# --- tokenizers ------------------------------------------------------------------------------------------------------


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path, tokenizer):
    sizes = {"vocab_size": len(tokenizer) + 80, "mask_token_id": len(tokenizer) + 79}
    both = rf"mask id {tokenizer.mask_token_id}, but .*`mask_token_id`={len(tokenizer) + 79}"
    refused(both, make_trainer, tmp_path, training_model(**sizes), processing_class=tokenizer)
    small = training_model(vocab_size=len(tokenizer) - 1, mask_token_id=len(tokenizer) - 2)
    message = rf"`processing_class` has {len(tokenizer)} tokens.*`vocab_size`={len(tokenizer) - 1}"
    refused(message, make_trainer, tmp_path, small, processing_class=tokenizer)
    without = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    refused(r"no mask token.*add_mask_token", make_trainer, tmp_path, processing_class=without)
    larger = training_model(vocab_size=len(tokenizer) + 3, mask_token_id=tokenizer.mask_token_id)  # padded to 64, say
    make_trainer(tmp_path, larger, processing_class=tokenizer)
    make_trainer(tmp_path, tiny_image_model(), train_dataset=image_rows(4), processing_class=tokenizer)


def test_no_warning_is_left_that_a_user_cannot_act_on(tmp_path, tokenizer, caplog):
    model = fitting_model(tokenizer)
    assert model.config.eos_token_id is None
    with caplog.at_level("WARNING"), warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer = make_trainer(
            tmp_path, model, processing_class=tokenizer, peft_config=LoraConfig(r=2), eval_dataset=token_rows(4),
            save_strategy="steps", save_steps=3,
        )  # fmt: skip
        trainer.train()
        trainer.evaluate()
        trainer.save_model(str(tmp_path / "adapter"))
        plain = type(trainer.args)(output_dir=str(tmp_path), report_to="none")
        assert plain.dataloader_pin_memory == torch.cuda.is_available()
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []
    end = tokenizer.eos_token_id
    assert model.config.eos_token_id == end and model.generation_config.eos_token_id in (end, [end])
    assert len(AutoTokenizer.from_pretrained(tmp_path / "adapter")) == len(tokenizer)


# --- adapters --------------------------------------------------------------------------------------------------------


def test_a_frozen_adapter_says_how_it_is_trained(tmp_path):
    saved_adapter(tmp_path, training_model(scale=0.3))
    base, adapter = tmp_path / "base", str(tmp_path / "adapter")
    frozen = [
        AutoModel.from_pretrained(adapter),
        PeftModel.from_pretrained(AutoModel.from_pretrained(base), adapter),
        adapter,
    ]
    for model in frozen:
        trainer = make_trainer(tmp_path / "out", model, eval_dataset=token_rows(4))
        assert trainer.evaluate()["eval_loss"] > 0
        refused(r"nothing to train.*`is_trainable=True`", trainer.train)
    with pytest.raises(ValueError, match=r"nothing to train.*requires_grad_\(True\)"):
        make_trainer(tmp_path / "out", training_model().requires_grad_(False)).train()

    loaded = AutoModel.from_pretrained(base)
    loaded.load_adapter(adapter, is_trainable=True)
    for model in (loaded, PeftModel.from_pretrained(AutoModel.from_pretrained(base), adapter, is_trainable=True)):
        before = weights(model)
        make_trainer(tmp_path / "out", model, learning_rate=1e-2).train()
        changed = {name for name, old in before.items() if not model.get_parameter(name).equal(old)}
        assert changed == {name for name in before if "lora_" in name}
