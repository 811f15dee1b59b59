# SPDX-License-Identifier: Apache-2.0
"""`pipeline("masked-generation")` against `generate` by hand."""

import pytest
import torch
from transformers import pipeline

from fpmgm.data import train_tokenizer
from tests.models.helpers import lively_model
from tests.testing_utils import refused


TOKENIZER = train_tokenizer(["the cat sat on the mat", "the dog ran"] * 5, 270)
MASK = TOKENIZER.mask_token_id
PLAN = {"num_steps": 4, "iterations": [2, 2, 2, 2]}


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    folder = tmp_path_factory.mktemp("writer")
    model = lively_model(vocab_size=len(TOKENIZER), mask_token_id=MASK, max_position_embeddings=16).double()
    for part in (model, TOKENIZER):
        part.save_pretrained(folder)
    return pipeline("masked-generation", model=str(folder), device="cpu", dtype=torch.float64, **PLAN)


def by_hand(model, ids, seed, **options):
    out = model.generate(torch.tensor([ids]), seed=[seed], **PLAN, **options, return_dict_in_generate=True)
    return TOKENIZER.decode(out.sequences[0], skip_special_tokens=True), out.block_evaluations


def test_it_writes_what_generate_writes(write):
    the, cat = (TOKENIZER(text, add_special_tokens=False)["input_ids"] for text in ("the", " cat"))
    end = TOKENIZER.eos_token_id
    expected = {
        "": [MASK] * 16,
        "the<|mask|*3> cat": [end, *the, *[MASK] * 3, *cat, end],
        f"the{TOKENIZER.mask_token}": [end, *the, MASK, end],
    }
    for prompt, ids in expected.items():
        (text,) = write(prompt, seed=5)
        assert (text["generated_text"], text["block_evaluations"]) == by_hand(write.model, ids, 5)
    (text,) = write("the", seed=5, max_new_tokens=4, temperature=0.5)
    assert text["generated_text"] == by_hand(write.model, [*the, *[MASK] * 4], 5, temperature=0.5)[0]
    assert "FPMDLMForMaskedDiffusion" in repr(write)  # of which transformers asks the model what it makes
    assert len({write("", seed=seed)[0]["generated_text"] for seed in range(4)}) > 1


def test_a_prompt_gets_its_seed_in_any_batch(write):
    prompts = ["the", "the cat sat", "on", "a mat and"]
    alone = [write(prompt, seed=7 + i, max_new_tokens=4) for i, prompt in enumerate(prompts)]
    assert write(prompts, seed=7, max_new_tokens=4) == alone
    assert list(write((prompt for prompt in prompts), seed=7, max_new_tokens=4)) == alone
    write.tokenizer.pad_token = write.tokenizer.eos_token
    for write.tokenizer.padding_side in ("left", "right"):
        assert write(prompts, seed=7, max_new_tokens=4, batch_size=3) == alone


def test_a_text_that_ends_is_cut(write):
    the = TOKENIZER("the", add_special_tokens=False)["input_ids"]
    ids = write.model.generate(torch.tensor([the + [MASK] * 8]), seed=[1], **PLAN)[0].tolist()
    options = {"seed": 1, "max_new_tokens": 8, "stop_at_eos": True, "eos_token_id": ids[len(the) + 2]}
    end = ids.index(options["eos_token_id"], len(the))
    assert write("the", **options)[0]["generated_text"] == TOKENIZER.decode(ids[: end + 1], skip_special_tokens=True)


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ("the cat", {}, r"`prompts`: 'the cat' has no blank: write `<\|mask\|\*20>`"),
        (["the<|mask|>", 3], {}, "`prompts` holds 3, of type int"),
        ("the", {"max_new_tokens": 0}, "`max_new_tokens`=0 must"),
        ("", {"seed": 1.5}, "`seed`=1.5 must"),
        ("", {"seed": 2**63}, "`seed`=9223372036854775808, .* must fit into 64 bits"),
        ("", {"bugdet": 24}, r"`bugdet`: did you mean `budget`\?"),
        ("", {"num_return_sequences": 2}, "num_return_sequences"),
    ],
)
def test_a_mistake_is_named(write, prompts, options, message):
    refused(message, write, prompts, **options)
