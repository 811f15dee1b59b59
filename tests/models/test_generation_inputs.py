# SPDX-License-Identifier: Apache-2.0
"""What `generate` reads: ids and masks of any type that can hold them, and what Hugging Face's tools send."""

import warnings

import numpy as np
import pytest
import torch
from transformers import BertTokenizerFast, pipeline

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


def test_an_overflow_never_writes_the_mask():
    model = tiny_image_model()
    assert model.generate(guidance_scale=1e300, class_labels=1, temperature=1e-300, budget=9).lt(7).all()


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
