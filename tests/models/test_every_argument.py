# SPDX-License-Identifier: Apache-2.0
"""Nothing is accepted and then ignored: each argument has a call here in which it changes the result or is refused.

What is documented as not read stands in `NOT_READ`. Fields of configurations and of `MGMGenerationConfig` have tables
of the same kind in the files that test these.
"""

import inspect

import pytest
import torch

from fpmgm import FPMaskGITModel, FPMDLMForMaskedDiffusion, MGMGenerationConfig, plan_budget
from fpmgm.models.frozen_states import FrozenStates, KeyValues
from fpmgm.models.modeling_mgm import DenoiserOptions
from tests.models.helpers import lively_image_model, lively_model
from tests.testing_utils import refused, tiny_config


M, IMAGE_MASK = 10, 7
IDS = torch.tensor([[1, 2, M, M, 5, M, 7, 0], [M, 3, M, 1, M, M, 2, 4]])
LABELS = torch.where(IDS == M, 6, -100)
CODES = torch.tensor([[1, 2, 7, 7, 5, 7, 6, 0, 7], [7, 3, 7, 1, 7, 7, 2, 4, 0]])
CODE_LABELS = torch.where(CODES == IMAGE_MASK, 4, -100)
TEXT_STATE = torch.full((2, 8, 16), 0.5, dtype=torch.float64)
IMAGE_STATE = torch.full((2, 10, 16), 0.5, dtype=torch.float64)


def slopes(output, model) -> torch.Tensor:
    """The gradient of the shared block."""
    model.zero_grad()
    output.loss.backward()
    return model.fixed_point.layers[0].up_proj.weight.grad.clone()


def run(model, call, read):
    torch.manual_seed(0)
    output = model(**call)
    return slopes(output, model) if read == "slope" else getattr(output, read)


def square(logits, rows):
    return logits.square().mean()


def kept(model, call) -> int:
    """Calls of the shared block, those in the backward pass included."""
    calls = []
    handle = model.fixed_point.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model(**call).loss.backward()
    handle.remove()
    return len(calls)


@torch.no_grad()
def stored(model, call) -> bool:
    """Whether keys and values were kept."""
    model(**call)
    return "frozen_states" in call and call["frozen_states"].filled


@torch.no_grad()
def frozen(model, call) -> float:
    """A number of the logits after other tokens were frozen."""
    states = FrozenStates.empty(model.config)
    model(**{**call, "input_ids": call["input_ids"].flip(1)} | {"active_positions": None}, frozen_states=states)
    return model(**call, frozen_states=states).logits.sum().item()


def denoiser_options(labels, state) -> dict:
    """Name → (call beside it, value, what it changes)."""
    half = torch.full(state.shape[:2], 0.5, dtype=torch.float64)
    return {
        "loss_weights": ({"labels": labels}, torch.tensor([2.0, 0.5]), "loss"),
        "logits_loss": ({"labels": labels}, square, "loss"),
        "logits_loss_weight": ({"labels": labels, "logits_loss": square}, 0.5, "loss"),
        "num_items_in_batch": ({"labels": labels}, 100, "loss"),
        "num_iterations": ({}, 2, "residuals"),
        "num_no_grad_iterations": ({"labels": labels, "num_iterations": 2}, 2, "slope"),
        "num_kept_iterations": ({"labels": labels, "num_iterations": 3}, 1, kept),
        "fixed_point_state": ({"num_iterations": 1}, state, "logits"),
        "reuse_weights": ({"fixed_point_state": state, "num_iterations": 1}, half, "logits"),
        "tolerance": ({}, 0.3, "residuals"),
        "solver": ({}, "anderson", "logits"),
        "logits_positions": ({}, torch.tensor([2, 3]), "logits"),
        "frozen_states": ({}, FrozenStates([KeyValues() for _ in range(3)]), stored),
        "active_positions": ({"logits_positions": torch.tensor([2])}, torch.tensor([2, 3]), frozen),
        "output_logits": ({}, False, "logits"),
        "training": ({}, True, "logits"),
    }


TEXT = {
    "input_ids": ({}, IDS.flip(1), "logits"),
    "timesteps": ({}, torch.tensor([0.2, 0.7]), "logits"),
    "attention_mask": ({}, torch.tensor([[1] * 8, [1] * 6 + [0] * 2]), "logits"),
    "labels": ({}, LABELS, "loss"),
    **denoiser_options(LABELS, TEXT_STATE),
}
IMAGE = {
    "input_ids": ({}, CODES.flip(1), "logits"),
    "class_labels": ({}, torch.tensor([0, 2]), "logits"),
    "labels": ({}, CODE_LABELS, "loss"),
    **denoiser_options(CODE_LABELS, IMAGE_STATE),
}
NOT_READ = {
    FPMDLMForMaskedDiffusion: {"token_type_ids"},  # tokenizers of BERT's kind send it
    FPMaskGITModel: {"timesteps"},  # so that all models are called alike
}


def text_model():
    model = lively_model(time_conditioning=True, dropout=0.3)
    return model, {"input_ids": IDS, "timesteps": torch.tensor([0.5, 0.5])}, TEXT


def image_model():
    return lively_image_model(dropout=0.3), {"input_ids": CODES}, IMAGE


@pytest.mark.parametrize("make", [text_model, image_model])
def test_the_tables_hold_every_argument_of_forward(make):
    model, _, table = make()
    own = set(inspect.signature(type(model).forward).parameters) - {"self", "options"}
    assert set(table) | NOT_READ[type(model)] == own | set(DenoiserOptions.__annotations__)


@pytest.mark.parametrize(
    ("make", "name"), [(make, name) for make, table in ((text_model, TEXT), (image_model, IMAGE)) for name in table]
)
def test_every_argument_of_forward_changes_the_result(make, name):
    model, call, table = make()
    beside, value, read = table[name]
    call = {**call, **beside}
    with torch.set_grad_enabled("labels" in beside or name == "labels"):
        if callable(read):
            assert read(model, call) != read(model, {**call, name: value})
            return
        before, after = (run(model, given, read) for given in (call, {**call, name: value}))
    if before is None or after is None:
        assert (before is None) != (after is None)
    else:
        assert before.shape != after.shape or not torch.allclose(before, after, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(
    ("make", "call", "message"),
    [
        (text_model, {"input_ids": torch.zeros(1, 9, dtype=torch.long)}, "`input_ids`"),
        (text_model, {"input_ids": torch.zeros(4, dtype=torch.long)}, "`input_ids`"),
        (text_model, {"num_iterations": 0}, "`num_iterations`"),
        (text_model, {"num_no_grad_iterations": -1}, "`num_no_grad_iterations`"),
        (text_model, {"num_kept_iterations": -1}, "`num_kept_iterations`"),
        (text_model, {"timesteps": None}, "`timesteps`"),
        (image_model, {"input_ids": CODES[:, :8]}, r"`input_ids` of shape \(2, 8\) must be \(batch, 9\)"),
        (image_model, {"input_ids": CODES.view(2, 3, 3)}, r"`input_ids` of shape \(2, 3, 3\).*flatten\(1\)"),
        (image_model, {"class_labels": torch.tensor([1])}, r"`class_labels` of shape \(1,\) must be \(2,\)"),
        (image_model, {"class_labels": torch.tensor(1)}, "`class_labels` of shape"),
        (image_model, {"num_iterations": 0}, "`num_iterations`=0"),
        (text_model, {"foo": 1}, r"unknown argument\(s\) of `FPMDLMForMaskedDiffusion.forward` \['foo'\]"),
        (text_model, {"class_labels": torch.zeros(2)}, "of `FPMDLMForMaskedDiffusion.forward`"),
        (text_model, {"num_iteration": 3}, "did you mean `num_iterations`"),
        (image_model, {"foo": 1}, r"unknown argument\(s\) of `FPMaskGITModel.forward` \['foo'\]"),
        (image_model, {"token_type_ids": CODES}, "of `FPMaskGITModel.forward`"),
        (image_model, {"attention_mask": CODES}, "`attention_mask` cannot be given"),
        (text_model, {"loss_weights": torch.ones(2)}, "`loss_weights` is about the cross-entropy"),
        (text_model, {"num_items_in_batch": 3}, "`num_items_in_batch` is about the cross-entropy"),
        (text_model, {"logits_loss": square}, "`logits_loss` needs positions"),
        (text_model, {"logits_loss_weight": 0.5}, "`logits_loss_weight` weighs `logits_loss`: give that too"),
        (text_model, {"reuse_weights": torch.ones(2, 8)}, "`reuse_weights` weigh `fixed_point_state`"),
        (text_model, {"input_ids": IDS.tolist()}, "`input_ids`=.* must be a tensor"),
        (text_model, {"attention_mask": torch.ones(2, 7)}, r"`attention_mask` of shape \(2, 7\) must be \(2, 8\)"),
        (text_model, {"labels": LABELS[:1]}, r"`labels` of shape \(1, 8\) must be \(2, 8\)"),
        (text_model, {"labels": LABELS, "loss_weights": torch.ones(2, 1)}, r"`loss_weights` of shape \(2, 1\)"),
        (text_model, {"labels": LABELS, "loss_weights": torch.ones(3)}, r"`loss_weights` of shape \(3,\)"),
        (text_model, {"timesteps": torch.ones(3)}, r"`timesteps` of shape \(3,\) must be \(2,\)"),
        (text_model, {"fixed_point_state": TEXT_STATE[:, :7]}, r"`fixed_point_state` of shape .* be \(2, 8, 16\)"),
    ],
)
def test_what_forward_cannot_honour_is_refused(make, call, message):
    model, good, _ = make()
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        model(**{**good, **call})


SOLVER = {
    "num_iterations": 2,
    "num_no_grad_iterations": 1,
    "num_kept_iterations": 1,
    "tolerance": 0.1,
    "solver": "anderson",
    "fixed_point_state": TEXT_STATE,
}


@pytest.mark.parametrize("name", SOLVER)
def test_a_model_without_fixed_point_layers_has_no_options_of_the_solver(name):
    model = lively_model(num_fixed_point_layers=0)
    with torch.no_grad():
        model(IDS, num_iterations=0, num_no_grad_iterations=0, solver="picard")
        refused(f"`{name}`: the model has no fixed-point layers", model, IDS, **{name: SOLVER[name]})


# --- generate -------------------------------------------------------------------------------------------------------

# Name → (model, call beside it, value).
GENERATE = {
    "input_ids": (lively_model, {}, IDS),
    "generation_config": (lively_model, {}, MGMGenerationConfig(budget=12)),
    "batch_size": (lively_model, {}, 3),
    "length": (lively_model, {}, 5),
    "max_new_tokens": (lively_model, {"input_ids": IDS[:, :4]}, 3),
    "attention_mask": (lively_model, {"input_ids": IDS}, [[1] * 8, [1] * 5 + [0] * 3]),
    "class_labels": (lively_image_model, {}, 2),
    "seed": (lively_model, {}, 1),
    "generator": (lively_model, {"seed": None}, torch.Generator().manual_seed(5)),
}
GENERATE_NOT_READ = {"token_type_ids"}


def test_the_table_holds_every_argument_of_generate():
    own = set(inspect.signature(FPMDLMForMaskedDiffusion.generate).parameters) - {"self", "kwargs"}
    assert set(GENERATE) | GENERATE_NOT_READ | {"callback", "streamer"} == own


@pytest.mark.parametrize("name", GENERATE)
def test_every_argument_of_generate_changes_the_tokens(name):
    make, beside, value = GENERATE[name]
    call = {"budget": 24, "seed": 0, **beside}
    if name == "generation_config":
        del call["budget"]
    torch.manual_seed(3)
    before, after = make().generate(**call), make().generate(**{**call, name: value})
    assert before.shape != after.shape or not torch.equal(before, after)


def test_callback_and_streamer_are_called():
    class Streamer(list):
        put = list.append

        def end(self):
            self.append("end")

    steps, shown = [], Streamer()
    lively_model().generate(budget=12, callback=steps.append, streamer=shown)
    assert len(steps) == len(shown) - 1 > 0 and shown[-1] == "end"


# --- plans ----------------------------------------------------------------------------------------------------------

PLAN = {
    "config": tiny_config(num_pre_layers=2),
    "budget": 30,
    "num_steps": 3,
    "allocation": "increasing",
    "starts": lambda n: [0, 1],
    "shares": lambda n: [1.0] + [0.5] * (n - 1),
    "iterations_per_step": 1,
}


def test_every_argument_of_a_plan_changes_it():
    call = {"config": tiny_config(), "budget": 24}
    assert set(PLAN) == set(inspect.signature(plan_budget).parameters)
    for name, value in PLAN.items():
        assert plan_budget(**{**call, name: value}) != plan_budget(**call), name
