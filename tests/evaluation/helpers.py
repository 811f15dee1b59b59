# SPDX-License-Identifier: Apache-2.0
"""A causal language model of a few thousand random weights, as a judge, with a byte-level tokenizer."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fpmgm import FPMDLMForMaskedDiffusion
from fpmgm.data import train_tokenizer
from fpmgm.evaluation import Judge
from tests.testing_utils import tiny_model


TEXTS = [
    "The quick brown fox jumps.",
    "over",
    "A lazy dog sleeps.<|endoftext|>Then it wakes<|endoftext|> up.",
    "x",
    "",
    "One more line of text, much longer than what the judge reads at once, which is 24 tokens.",
]


def tiny_judge(seed: int = 0, length: int = 24) -> Judge:
    """In float64, so that padding and batches change nothing; ids are bytes, so texts have many tokens."""
    tokenizer = train_tokenizer(["no pair of letters twice"], 258)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=len(tokenizer), n_positions=length, n_embd=16, n_layer=2, n_head=2,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, initializer_range=0.3,
        )  # fmt: skip
        model = GPT2LMHeadModel(config)
    return Judge("tiny", model.double().eval(), tokenizer)


def judged_model(seed: int = 0, **options) -> FPMDLMForMaskedDiffusion:
    """A tiny model of the judge's tokens."""
    tokenizer = tiny_judge().tokenizer
    return tiny_model(seed, vocab_size=len(tokenizer), mask_token_id=tokenizer.mask_token_id, **options)
