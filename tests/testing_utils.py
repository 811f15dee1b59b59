# SPDX-License-Identifier: Apache-2.0
"""Tiny models and data that the tests share."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, PreTrainedTokenizerFast, TrainingArguments

from fpmgm import FPMaskGITConfig, FPMaskGITModel, FPMDLMConfig, FPMDLMForMaskedDiffusion
from fpmgm.models.modeling_xqgan import XQGANConfig, XQGANModel


ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("FPMGM_SHARED", ROOT.parent / "shared"))

needs_shared = pytest.mark.skipif(
    not (SHARED / "parity").is_dir(), reason="needs the fixtures of the original implementations (FPMGM_SHARED)"
)


# The option that makes blocks run again in the backward pass: transformers renamed it after 5.17.
RENAMED = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
CHECKPOINTING = "activation_checkpointing" if RENAMED else "gradient_checkpointing"


def checkpoint_activations(model: torch.nn.Module, **options) -> None:
    """Make blocks run again in the backward pass."""
    getattr(model, f"{CHECKPOINTING}_enable")(**options)


def refused(message: str, call: Callable, *arguments, **options) -> str:
    """Assert that a call is a user's mistake, a plain `ValueError` whose text matches `message`; give that text."""
    __tracebackhide__ = True
    with pytest.raises(ValueError, match=message) as caught:
        call(*arguments, **options)
    assert type(caught.value) is ValueError  # and not one of a reader of JSON or Unicode
    return str(caught.value)


def run_python(*arguments: str, cwd: Path = ROOT, fails: bool = False, **environment: str):
    """What Python prints in a process of its own, of one thread; that it succeeds, or fails, is asserted."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert (done.returncode != 0) == fails, done.stdout[-2000:] + done.stderr[-6000:]
    return done


def stacks(pre: int, fixed_point: int = 0, post: int = 0) -> dict[str, int]:
    """How many blocks each stack has, as fields of a configuration."""
    return {"num_pre_layers": pre, "num_fixed_point_layers": fixed_point, "num_post_layers": post}


def tiny_config(**overrides) -> FPMDLMConfig:
    """A configuration of a few hundred weights; vocabulary 11 with mask id 10, length 8."""
    defaults = {
        "vocab_size": 11,
        "mask_token_id": 10,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "conditioning_size": 8,
        "max_position_embeddings": 8,
        "dropout": 0.0,
    }
    return FPMDLMConfig(**{**defaults, **overrides})


def tiny_model(seed: int = 0, scale: float = 0.3, **overrides) -> FPMDLMForMaskedDiffusion:
    """A text model with every weight drawn at random, in evaluation."""
    return _shaken(FPMDLMForMaskedDiffusion, tiny_config(**overrides), seed, scale)


def tiny_image_config(**overrides) -> FPMaskGITConfig:
    """A configuration of a few thousand weights; 7 codes (mask id 7) on a 3 × 3 grid, 3 classes, one register."""
    defaults = {
        "codebook_size": 7,
        "num_classes": 3,
        "grid_size": 3,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "num_pre_layers": 1,
        "num_post_layers": 1,
        "dropout": 0.0,
    }
    return FPMaskGITConfig(**{**defaults, **overrides})


def tiny_image_model(seed: int = 0, scale: float = 0.3, **overrides) -> FPMaskGITModel:
    """An image model with every weight drawn at random, in evaluation."""
    return _shaken(FPMaskGITModel, tiny_image_config(**overrides), seed, scale)


def tiny_image_tokenizer(seed: int = 0, scale: float = 0.3, **overrides) -> XQGANModel:
    """A tokenizer for `tiny_image_model`: 12 pixels, 3 × 3 of 7 codes, every weight drawn at random."""
    defaults = {
        "image_size": 12,
        "patch_size": 4,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "codebook_size": 7,
        "codebook_dim": 4,
    }
    return _shaken(XQGANModel, XQGANConfig(**{**defaults, **overrides}), seed, scale)


def word_tokenizer(words: list[str], **special: str) -> PreTrainedTokenizerFast:
    """A token for each word, whose id is its place; the first stands for unknown ones. `special`: `eos_token` etc."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def saved_adapter(folder: Path, base: torch.nn.Module, **options) -> torch.nn.Module:
    """`base` with an adapter that does something, the one saved in `folder/base`, the other in `folder/adapter`."""
    from peft import LoraConfig, get_peft_model

    base.save_pretrained(folder / "base")
    torch.manual_seed(1)
    model = get_peft_model(AutoModel.from_pretrained(folder / "base"), LoraConfig(r=2, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * parameter.requires_grad * torch.randn_like(parameter))
    model.save_pretrained(folder / "adapter")
    return model


def _shaken(model_class, config, seed: int, scale: float):
    """A model whose every weight is moved at random: a fresh one is the identity, and its head may be zero.

    The same seed gives the same weights, and the global generator is left alone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(scale * torch.randn(parameter.shape))
    return model.eval()
