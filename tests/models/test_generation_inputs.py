# SPDX-License-Identifier: Apache-2.0
"""What `generate` reads: ids and masks of any type that can hold them, and what Hugging Face's tools send."""

import re
import warnings

import numpy as np
import pytest
import torch
from transformers import BertTokenizerFast, GenerationConfig, pipeline

from fpmgm import MGMGenerationConfig
from tests.models.helpers import lively_model
from tests.testing_utils import tiny_image_model, tiny_model


M = 10  # of tiny_config
IDS = [[1, 2, M, M, M, 6, M, M], [0, M, M, 4, M, M, M, 9]]
MASK = [[0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0]]


@pytest.mark.parametrize(
    "kind",
    [
        lambda x: x,
        tuple,
        np.array,
        lambda x: np.array(x, dtype=np.uint16),
        torch.tensor,
        lambda x: torch.tensor(x, dtype=torch.int32),
        lambda x: torch.tensor(x, dtype=torch.uint8),
    ],
    ids=["list", "tuple", "int64 array", "uint16 array", "int64", "int32", "uint8"],
)
def test_ids_and_masks_of_whole_numbers(kind):
    model, call = lively_model(), {"seed": 1, "budget": 24}
    expected = model.generate(torch.tensor(IDS), attention_mask=torch.tensor(MASK), **call)
    assert torch.equal(model.generate(kind(IDS), attention_mask=kind(MASK), **call), expected)


@pytest.mark.parametrize("kind", [bool, float, np.float64, torch.bool, torch.float32, torch.bfloat16], ids=str)
def test_masks_of_other_types(kind):
    model, call = lively_model(), {"seed": 1, "budget": 24}
    mask = torch.tensor(MASK, dtype=kind) if isinstance(kind, torch.dtype) else np.array(MASK).astype(kind)
    expected = model.generate(IDS, attention_mask=MASK, **call)
    assert torch.equal(model.generate(IDS, attention_mask=mask, **call), expected)
    if torch.is_tensor(mask):
        real, ids = mask.bool(), torch.tensor(IDS)
        outputs = [model(ids, attention_mask=m, labels=ids.clamp(max=9)) for m in (mask, torch.tensor(MASK))]
        assert torch.equal(outputs[0].loss, outputs[1].loss) and real.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": [[1.0, M]]}, "`input_ids`=.* must be whole numbers, not torch.float32"),
        ({"input_ids": [[True, False]]}, "`input_ids`=.* must be whole numbers, not torch.bool"),
        ({"input_ids": [["a", "b"]]}, "`input_ids`=.* must be numbers in rows of one length"),
        ({"input_ids": [[1, M], [M]]}, "`input_ids`=.* must be numbers in rows of one length"),
        ({"input_ids": torch.tensor([[1, M]]).to_sparse()}, "`input_ids`=.* neither sparse nor quantised"),
        ({"input_ids": torch.full((1, 2), M, device="meta")}, "`input_ids`=.* must be numbers"),
        ({"input_ids": 5}, r"`input_ids` of shape \(\)"),
        ({"input_ids": []}, r"`input_ids` of shape \(0,\)"),
        ({"input_ids": IDS, "attention_mask": [[0.5] * 8] * 2}, r"`attention_mask`=.* must hold 0 \(padding\) and 1"),
        ({"input_ids": IDS, "attention_mask": [[2] * 8] * 2}, r"`attention_mask`=.* must hold 0 \(padding\) and 1"),
        ({"input_ids": IDS, "attention_mask": [["no"] * 8] * 2}, "`attention_mask`=.* must be numbers"),
        ({"input_ids": IDS, "attention_mask": [1] * 8}, r"`attention_mask` of shape \(8,\) must have the shape"),
        ({"input_ids": IDS[:1], "attention_mask": [1] * 8, "batch_size": 2}, r"`attention_mask` of shape \(8,\)"),
        ({"budget": "24"}, "`budget`='24' must be a whole number of block evaluations"),
        ({"temperature": "0.5"}, "`temperature`='0.5' must be a number"),
        ({"top_p": "0.9"}, r"`top_p`='0.9' must lie in \(0, 1\]"),
        ({"top_k": "5"}, "`top_k`='5' must be a whole number"),
        ({"seed": "1"}, "`seed`='1' must be a whole number"),
        ({"tolerance": "0.1"}, "`tolerance`='0.1' must be at least 0"),
        ({"progress_bar": "no"}, "`progress_bar`='no' must be True or False"),
        ({"return_dict_in_generate": "no"}, "`return_dict_in_generate`='no' must be True or False"),
        ({"progress_bar": 1}, "`progress_bar`=1 must be True or False"),
        ({"batch_size": 2.0}, "`batch_size`=2.0 must be a whole number"),
        ({"length": "8"}, "`length`='8' must be a whole number"),
        ({"callback": 3}, "`callback`=3 must be a function"),
        ({"streamer": 3}, "`streamer`=3 must have `put` and `end`"),
        ({"generator": 3}, "`generator`=3 must be a torch.Generator"),
        ({"generation_config": {"budget": 3}}, r"`generation_config` is a dict, not one: give an `fpmgm.MGM"),
        (
            {"generation_config": GenerationConfig()},
            "GenerationConfig, transformers' own .* `fpmgm.MGMGenerationConfig`",
        ),
        ({"budget": 10**30}, r"`budget`=1000000000000000000000000000000 must be .* at most 1,000,000"),
        ({"budget": 10**5000}, "`budget`=<int> must be a whole number"),
        ({"num_steps": 10**9}, r"`num_steps`=1000000000 must be .* at most 100,000"),
        ({"num_steps": 2, "iterations": 10**9}, "`iterations`=1000000000 must be"),
        ({"iterations": [1] * 10**6}, "`iterations`="),
        ({"num_steps": 10**5, "iterations": 100}, "`iterations` cost 10,200,000 block evaluations"),
        ({"batch_size": 10**9}, r"`batch_size`=1000000000 must be .* at most 1,048,576"),
        ({"batch_size": 2**20, "num_steps": 10**4, "iterations": 1, "remask": 0.1}, "random numbers at"),
        ({"bugdet": 24}, r"\(`bugdet`: did you mean `budget`\?\).*'batch_size'.*'length'.*'seed'.*'streamer'"),
        ({"max_tokens": 24}, r"\(`max_tokens`: did you mean `max_new_tokens`\?\)"),
        ({"xyz": 24}, r"unknown generation argument\(s\) \['xyz'\]: known are"),
        ({"lenght": 8}, "did you mean `length`"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_model().generate(**arguments)


def test_what_is_written_for_images_is_named():
    for arguments, message in (
        ({"class_labels": [0, "a"]}, r"`class_labels`=\[0, 'a'\] must be a whole number"),
        ({"class_labels": 10**30}, "`class_labels`=1000000000000000000000000000000 must be"),
        ({"attention_mask": [[1] * 9]}, "`attention_mask` cannot be given"),
        ({"guidance_scale": 1e300, "class_labels": 1, "temperature": 1e-300, "budget": 9}, "guidance_scale"),
    ):
        try:
            tokens = tiny_image_model().generate(**arguments)
        except ValueError as error:
            assert re.search(message, str(error)), error
        else:
            assert tokens.lt(7).all()  # an overflow never writes the mask


def test_a_small_temperature_takes_the_likeliest_tokens():
    model, call = lively_model(), {"batch_size": 4, "budget": 24, "seed": 0}
    likeliest = model.generate(**call, temperature=0)
    for temperature in (1e-308, 1e-310, 5e-324):
        assert torch.equal(model.generate(**call, temperature=temperature), likeliest)


# --- what tokenizers of BERT's kind send ----------------------------------------------------------------------------


@pytest.fixture
def bert(tmp_path):
    """A tokenizer whose mask is not its last id, and a model for it, in a folder."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "mat"]
    tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate(words)})
    model = tiny_model(vocab_size=len(tokenizer), mask_token_id=tokenizer.mask_token_id)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    return tmp_path, tokenizer, model


def test_its_encodings_go_into_forward_and_generate(bert):
    _, tokenizer, model = bert
    encoded = tokenizer(["the [MASK]", "the cat sat [MASK]"], return_tensors="pt", padding=True)
    assert "token_type_ids" in encoded
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    assert torch.equal(model(**encoded).logits, model(ids, attention_mask=mask).logits)
    tokens = model.generate(**encoded, seed=0, budget=12)
    assert torch.equal(tokens, model.generate(ids, attention_mask=mask, seed=0, budget=12))
    assert torch.equal(tokens[ids != 4], ids[ids != 4]) and tokens.ne(4).all()


def test_the_fill_mask_pipeline_gives_the_models_probabilities(bert):
    folder, tokenizer, model = bert
    found = pipeline("fill-mask", str(folder), device="cpu")("the [MASK] sat", top_k=3)
    encoded = tokenizer("the [MASK] sat", return_tensors="pt")
    p = model(**encoded).logits[0, 2].softmax(dim=-1)
    assert [answer["token"] for answer in found] == p.topk(3).indices.tolist()
    assert [answer["score"] for answer in found] == pytest.approx(p.topk(3).values.tolist(), rel=1e-5)


def test_ordinary_use_warns_of_nothing(bert, tmp_path, caplog):
    folder, tokenizer, _ = bert
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = lively_model().from_pretrained(folder)
        model.generation_config = MGMGenerationConfig(budget=12)
        model.generate(**tokenizer("the [MASK]", return_tensors="pt"))
        assert model.is_gradient_checkpointing is False  # adapters still ask by this name
        model.save_pretrained(tmp_path / "again")
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
