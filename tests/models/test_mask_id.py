# SPDX-License-Identifier: Apache-2.0
"""The mask id may be any id, and the configuration is the only place that knows it.

A model whose vocabulary is reordered, so that the mask stands in the middle, is the same model.
"""

import pytest
import torch
from torch import nn

from fpmgm import MGMGenerationConfig
from fpmgm.models.head import forbid
from tests.models.helpers import lively_model
from tests.testing_utils import refused, tiny_model


LAST, MIDDLE, VOCABULARY = 10, 4, 11
# Where each id of the usual vocabulary stands in the other: the order of the tokens is kept, as draws depend on it.
PLACES = torch.tensor([0, 1, 2, 3, 5, 6, 7, 8, 9, 10, MIDDLE])


def reordered(model):
    """The same model with its mask in the middle of the vocabulary."""
    other = lively_model(mask_token_id=MIDDLE)
    weights = model.state_dict()
    for name in ("embed_tokens.weight", "lm_head.weight", "lm_head.bias"):
        weights[name] = torch.empty_like(weights[name]).index_copy(0, PLACES, weights[name])
    other.load_state_dict(weights)
    return other


def changed_afterwards(model):
    """The same, made with the last id as its mask, which its configuration then gives up."""
    other = lively_model()
    other.load_state_dict(reordered(model).state_dict())
    other.config.mask_token_id = MIDDLE
    return other


def with_a_plain_head(model):
    """The same with a head that is not our class, as an adapter makes of it."""
    other = changed_afterwards(model)
    other.lm_head = nn.Sequential(other.lm_head)
    return other


MODELS = pytest.mark.parametrize("make", [reordered, changed_afterwards, with_a_plain_head])


@MODELS
def test_loss_accuracy_and_further_losses_are_those_of_the_usual_order(make):
    usual = lively_model()
    with torch.no_grad():
        usual.lm_head.bias[LAST] += 5  # it would like to answer "mask"
    other = make(usual)
    clean, masked = torch.randint(LAST, (3, 7)), torch.rand(3, 7) < 0.5
    ids, labels = clean.masked_fill(masked, LAST), clean.masked_fill(~masked, -100)

    def call(model, places, mask):
        columns = [i for i in places.tolist() if i != mask]
        output = model(
            places[ids], labels=torch.where(masked, places[clean], -100),
            logits_loss=lambda logits, rows: logits.log_softmax(-1)[:, columns].square().mean(),
        )  # fmt: skip
        output.loss.backward()
        return output

    expected, found = call(usual, torch.arange(VOCABULARY), LAST), call(other, PLACES, MIDDLE)
    assert (labels != -100).any()
    for name in ("loss", "masked_accuracy", "logits_loss"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=0)
    slope = other.embed_tokens.weight.grad[PLACES]
    torch.testing.assert_close(slope, usual.embed_tokens.weight.grad, rtol=1e-9, atol=1e-12)


@MODELS
@pytest.mark.parametrize(
    "options",
    [
        {"reuse": "3sr"},
        {"reuse": "full", "temperature": 0},
        {"order": "confidence", "top_k": 4, "num_steps": 4},
        {"remask": 0.4, "final": "argmax", "top_p": 0.9},
        {"tolerance": 0.05},
    ],
    ids=str,
)
def test_the_same_tokens_are_written(make, options):
    usual = lively_model()
    other = make(usual)
    ids = torch.tensor([[1, LAST, LAST, 4, LAST, LAST, 9, LAST], [LAST] * 8, [LAST, LAST, 0, LAST, LAST, LAST, 9, 4]])
    attention_mask = torch.tensor([[1] * 8, [1] * 8, [1] * 6 + [0] * 2])
    call = {"seed": 3, "budget": 40, "attention_mask": attention_mask, "return_dict_in_generate": True, **options}
    expected, found = usual.generate(ids, **call), other.generate(PLACES[ids], **call)
    assert torch.equal(found.sequences, PLACES[expected.sequences]) and found.reused == expected.reused
    whole = [model.generate(batch_size=4, budget=24, seed=1, **options) for model in (usual, other)]
    assert torch.equal(whole[1], PLACES[whole[0]])


def test_a_changed_id_is_saved_and_one_that_does_not_exist_is_named(tmp_path):
    model = tiny_model()
    model.config.mask_token_id = MIDDLE
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path).generate(budget=12, seed=0).ne(MIDDLE).all()
    for wrong in (-1, VOCABULARY):
        model.config.mask_token_id = wrong
        for call in (lambda: model.generate(budget=12), lambda: model(**labelled())):
            refused(f"`mask_token_id`={wrong} must lie in", call)
    refused("`mask_token_id`", forbid, torch.zeros(1, 3), -1)


def labelled() -> dict:
    return {"input_ids": torch.zeros(1, 4, dtype=torch.long), "labels": torch.zeros(1, 4, dtype=torch.long)}


def test_ids_behind_padding_are_left_as_they_are_even_where_they_are_the_mask():
    model, M = lively_model(), LAST
    model.generation_config = MGMGenerationConfig(budget=24)
    ids = torch.tensor([[M, M, M, 2, M, M, 5, M]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0]])
    tokens = model.generate(ids, attention_mask=mask, seed=4)
    assert tokens[0, [0, 1, 3, 6, 7]].tolist() == [M, M, 2, 5, M] and tokens[0, 2:7].ne(M).all()
    assert torch.equal(tokens[:, 2:7], model.generate(ids[:, 2:7], seed=4))
