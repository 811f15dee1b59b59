# SPDX-License-Identifier: Apache-2.0
"""FP-MDLM's forward, loss, gradients, dropout and initialisation, against an independent implementation."""

import copy
import itertools

import pytest
import torch

from fpmgm import FPMDLMForMaskedDiffusion
from fpmgm.models.block_fpmaskgit import FPMaskGITBlock
from fpmgm.models.block_fpmdlm import FPMDLMBlock
from tests.models.helpers import count_calls
from tests.models.reference_mdlm import reference_forward
from tests.models.test_modeling_fpmaskgit import labelled
from tests.testing_utils import checkpoint_activations, refused, tiny_config, tiny_image_model, tiny_model


MASK = 10  # of tiny_config
VOCABULARY = 11
INJECTIONS = ("mlp", "linear", "diagonal")


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def corrupted(batch_size: int = 3, length: int = 7) -> dict:
    """Masked ids with their labels and weights; the last row ends in padding."""
    clean = torch.randint(MASK, (batch_size, length), generator=torch.Generator().manual_seed(1))
    masked = torch.rand(batch_size, length, generator=torch.Generator().manual_seed(2)) < 0.5
    attention_mask = torch.ones(batch_size, length, dtype=torch.long)
    attention_mask[-1, -3:] = 0
    masked &= attention_mask.bool()
    return {
        "input_ids": clean.masked_fill(masked, MASK),
        "labels": clean.masked_fill(~masked, -100),
        "loss_weights": torch.linspace(0.5, 2.0, batch_size),
        "attention_mask": attention_mask,
    }


def reference(model, input_ids, **kwargs):
    return reference_forward(model.config, model.state_dict(), input_ids, **kwargs)


def reference_loss(logits, labels, loss_weights, attention_mask):
    """Σ weight · −log p over positions with a label, p without the mask id, per real position; one by one."""
    total = 0.0
    for row, position in (labels != -100).nonzero().tolist():
        allowed = torch.cat([logits[row, position, :MASK], logits[row, position, MASK + 1 :]])
        total = total + loss_weights[row] * (allowed.logsumexp(0) - logits[row, position, labels[row, position]])
    return total / attention_mask.sum()


# --- the forward pass ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        *({"input_injection": kind} for kind in (*INJECTIONS, "none")),
        {"num_pre_layers": 3, "num_fixed_point_layers": 0, "num_post_layers": 0},
        {"num_pre_layers": 0, "num_post_layers": 0},
        {"num_pre_layers": 2, "num_fixed_point_layers": 3, "num_post_layers": 2, "time_conditioning": True},
        {"num_attention_heads": 4, "rope_theta": 100.0, "layer_norm_eps": 0.1},
    ],
    ids=str,
)
def test_forward_equals_the_reference_in_float64(overrides):
    model = tiny_model(**overrides).double()
    input_ids, mask = random_ids(3, 7), corrupted()["attention_mask"]
    timesteps = torch.tensor([1.0, 0.4, 0.001], dtype=torch.float64)
    iterations = None if model.fixed_point is None else 4
    output = model(input_ids, timesteps=timesteps, attention_mask=mask, num_iterations=iterations)
    expected = reference(model, input_ids, timesteps=timesteps, attention_mask=mask, iterations=4)

    real = mask.bool()
    torch.testing.assert_close(output.logits[real], expected.logits[real], rtol=0, atol=1e-10)
    torch.testing.assert_close(output.last_hidden_state[real], expected.hidden[real], rtol=0, atol=1e-10)
    if expected.state is None:
        assert output.fixed_point_state is None and output.residuals is None
    else:
        torch.testing.assert_close(output.fixed_point_state[real], expected.state[real], rtol=0, atol=1e-10)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 0.02)], ids=str)
def test_lower_precision_stays_close(injection, implementation, dtype, tolerance):
    model, batch = tiny_model(scale=0.1, input_injection=injection), corrupted()
    expected = reference(model.double(), batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    model.to(dtype).set_attn_implementation(implementation)
    output = model(**batch, output_logits=True)
    assert output.logits.dtype == dtype and output.residuals.dtype == torch.float32
    real = batch.pop("attention_mask").bool()
    assert (output.logits[real] - expected[real]).norm() < tolerance * expected[real].norm()
    loss = reference_loss(expected, batch["labels"], batch["loss_weights"], real)
    assert output.loss.item() == pytest.approx(loss.item(), rel=tolerance)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("solver", ["picard", "anderson"])
@torch.no_grad()
def test_padding_changes_nothing_at_real_positions(solver, side, implementation):
    model = tiny_model(max_position_embeddings=16)
    model.set_attn_implementation(implementation)
    ids, options = random_ids(1, 5), {"solver": solver, "num_iterations": 4}
    alone = model(ids, **options)
    for amount, content in ((1, 3), (3, MASK), (9, 0)):
        padding = torch.full((1, amount), content)
        parts, real = [ids, padding], [torch.ones(1, 5), torch.zeros(1, amount)]
        if side == "left":
            parts, real = parts[::-1], real[::-1]
        mask = torch.cat(real, dim=1)
        # Beside a row without padding, so that the mask differs between rows.
        padded = model(
            torch.cat([torch.cat(parts, dim=1), random_ids(1, 5 + amount, seed=3)]),
            attention_mask=torch.cat([mask, torch.ones_like(mask)]),
            **options,
        )
        real_rows = mask[0].bool()
        torch.testing.assert_close(padded.logits[0][real_rows], alone.logits[0], rtol=0, atol=2e-4)
        torch.testing.assert_close(padded.residuals[:, 0], alone.residuals[:, 0], rtol=1e-4, atol=1e-6)


def test_logits_are_computed_at_the_positions_asked_for():
    model = tiny_model(time_conditioning=True)  # each row has a final norm of its own
    ids, timesteps = random_ids(3, 7), torch.tensor([0.9, 0.5, 0.1])
    heads = []
    model.lm_head.register_forward_hook(lambda module, args, output: heads.append(output))
    full = model(ids, timesteps=timesteps)
    positions = torch.tensor([20, 3, 8, 3])
    some = model(ids, timesteps=timesteps, logits_positions=positions)
    torch.testing.assert_close(some.logits, full.logits.flatten(0, 1)[positions])
    assert heads[-1].shape == (4, VOCABULARY)
    nothing = model(ids, timesteps=timesteps, logits_positions=torch.empty(0, dtype=torch.long))
    assert nothing.logits.shape == (0, VOCABULARY)


def test_logits_are_built_only_where_they_are_wanted():
    model, batch = tiny_model(), corrupted()
    assert model(batch["input_ids"]).logits.shape == (3, 7, VOCABULARY)
    assert model(batch["input_ids"], output_logits=False).logits is None
    heads = []
    model.lm_head.register_forward_hook(lambda module, args, output: heads.append(output))
    assert model(**batch).logits is None
    labelled = int((batch["labels"] != -100).sum())
    assert [hits.shape for _, hits, _ in heads] == [(labelled,)]  # the loss needs no other position
    both = model(**batch, output_logits=True)
    torch.testing.assert_close(both.logits, model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits)


# --- the solver inside the model -------------------------------------------------------------------------------------


def test_residuals_are_relative_changes_over_real_positions():
    model, batch = tiny_model().double(), corrupted()
    call = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    output = model(**call, num_iterations=3, num_no_grad_iterations=2)
    states = reference(model, **call, iterations=5).states
    real = batch["attention_mask"].bool()
    expected = [
        [float((new[row][real[row]] - old[row][real[row]]).norm() / old[row][real[row]].norm()) for row in range(3)]
        for old, new in itertools.pairwise(states)
    ]
    torch.testing.assert_close(output.residuals, torch.tensor(expected), rtol=1e-4, atol=0)


@pytest.mark.parametrize("share", [None, 0.0, 1.0, "random"])
def test_warm_start_begins_at_the_given_mixture(share):
    model, ids = tiny_model().double(), random_ids(2, 6)
    previous = torch.randn(2, 6, 16, dtype=torch.float64)
    if share == "random":
        weights = torch.rand(2, 6, dtype=torch.float64)
    else:
        weights = None if share is None else torch.full((2, 6), share, dtype=torch.float64)
    output = model(ids, fixed_point_state=previous, reuse_weights=weights, num_iterations=2)
    expected = reference(
        model,
        ids,
        iterations=2,
        previous_state=previous,
        previous_share=1.0 if weights is None else weights[..., None],
    )
    torch.testing.assert_close(output.fixed_point_state, expected.state, rtol=1e-5, atol=1e-5)
    cold = reference(model, ids, iterations=2).state
    assert torch.allclose(expected.state, cold, atol=1e-3) == (share == 0.0)


# --- loss and gradients ----------------------------------------------------------------------------------------------


def test_loss_is_the_weighted_cross_entropy_per_real_position():
    model, batch = tiny_model(), corrupted()
    with torch.no_grad():
        model.lm_head.bias[MASK] += 5  # a model that would like to answer "mask"
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
    labels, weights = batch["labels"], batch["loss_weights"]
    padded = reference_loss(logits, labels, weights, batch["attention_mask"])
    assert model(**batch).loss.item() == pytest.approx(padded.item(), rel=1e-5)

    del batch["attention_mask"]  # every position counts
    logits = model(batch["input_ids"]).logits.double()
    full = reference_loss(logits, labels, weights, torch.ones(3, 7))
    assert model(**batch).loss.item() == pytest.approx(full.item(), rel=1e-5)

    del batch["loss_weights"]
    unweighted = reference_loss(logits, labels, torch.ones(3), torch.ones(3, 7))
    assert model(**batch).loss.item() == pytest.approx(unweighted.item(), rel=1e-5)


def test_loss_without_any_masked_position_is_zero_and_differentiable():
    model = tiny_model()
    output = model(random_ids(2, 4), labels=torch.full((2, 4), -100))
    output.loss.backward()
    assert output.loss.item() == 0 and output.masked_accuracy.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_masked_accuracy_never_guesses_the_mask(dtype):
    model, batch = tiny_model(), corrupted()
    with torch.no_grad():
        model.lm_head.bias[MASK] += 100
    model = model.to(dtype)
    output = model(**batch, output_logits=True)
    labelled = batch["labels"] != -100
    guesses = output.logits[labelled][:, :MASK].argmax(dim=-1)
    batch["labels"][labelled] = torch.where(torch.arange(len(guesses)) % 3 > 0, guesses, (guesses + 1) % MASK)
    right = (torch.arange(len(guesses)) % 3 > 0).float().mean()
    assert model(**batch).masked_accuracy.item() == pytest.approx(right.item())


@pytest.mark.parametrize(
    ("injection", "no_grad", "grad"),
    [*((kind, *counts) for kind in INJECTIONS for counts in ((0, 1), (0, 3), (3, 2))), ("none", 0, 3)],
)
def test_gradients_equal_the_written_out_sjfb(injection, no_grad, grad):
    model = tiny_model(input_injection=injection, num_fixed_point_layers=2, num_pre_layers=2).double()
    batch, blocks = corrupted(), count_calls(model, FPMDLMBlock)
    output = model(**batch, num_iterations=grad, num_no_grad_iterations=no_grad)
    output.loss.backward()
    assert output.block_evaluations == len(blocks) == 2 + (no_grad + grad) * 2 + 1

    leaves = {name: value.detach().clone().requires_grad_() for name, value in model.state_dict().items()}
    expected = reference_forward(
        model.config, leaves, batch["input_ids"], attention_mask=batch["attention_mask"],
        iterations=grad, no_grad_iterations=no_grad,
    )  # fmt: skip
    loss = reference_loss(expected.logits, batch["labels"], batch["loss_weights"].double(), batch["attention_mask"])
    gradients = dict(zip(leaves, torch.autograd.grad(loss, leaves.values()), strict=True))
    assert output.loss.item() == pytest.approx(loss.item(), abs=1e-10)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, gradients[name], rtol=0, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
        )
    assert gradients["pre_layers.0.up_proj.weight"].abs().max() > 1e-6  # P learns, through u or the start


def test_a_looped_model_refuses_what_would_hide_its_input():
    model = tiny_model(input_injection="none")
    ids = random_ids(1, 4)
    assert not any("input_proj" in name or "injection" in name for name, _ in model.named_parameters())
    for options in ({"num_no_grad_iterations": 1}, {"fixed_point_state": torch.zeros(1, 4, 16)}):
        refused(f"`{next(iter(options))}`.*without an injection", model, ids, **options)
    refused(r"`no_grad_iterations`.*'none'", tiny_config, input_injection="none", no_grad_iterations=[0, 4])
    # Each step begins anew: the default reuse does not act.
    options = {"num_steps": 3, "iterations": [2, 2, 2], "length": 6, "seed": 0}
    out = model.generate(**options, return_dict_in_generate=True)
    assert not any(out.reused) and torch.equal(out.sequences, model.generate(**options, reuse="none"))
    refused("`reuse`='full'", model.generate, length=6, reuse="full")


@pytest.mark.parametrize("injection", INJECTIONS)
def test_gradients_under_autocast_are_close_after_iterations_without_gradient(injection):
    # Autocast keeps the weights it has cast: those of the first iterations must not stay without gradient.
    model, batch = tiny_model(scale=0.05, input_injection=injection, hidden_size=32), corrupted()
    gradients = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model(**batch, num_iterations=2, num_no_grad_iterations=2).loss
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    scale = max(gradient.norm() for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        assert (gradients[1][name] - gradient).norm() < 0.05 * gradient.norm() + 1e-3 * scale, name


def train_gradients(model, batch, **kwargs) -> tuple[dict, list]:
    model.train()
    model.zero_grad()
    blocks = count_calls(model, (FPMDLMBlock, FPMaskGITBlock))
    torch.manual_seed(7)
    model(**batch, **kwargs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}, blocks


@pytest.mark.parametrize(("every", "iterations_again"), [(1, 3), (2, 2)])
@pytest.mark.parametrize(("make", "dropout"), [(tiny_model, 0.0), (tiny_model, 0.3), (tiny_image_model, 0.3)])
def test_checkpointing_recomputes_solver_iterations_and_keeps_the_gradients(make, dropout, every, iterations_again):
    batch = corrupted() if make is tiny_model else labelled()
    model, iterations = make(dropout=dropout), {"num_iterations": 3, "num_no_grad_iterations": 2}
    plain, run_once = train_gradients(copy.deepcopy(model), batch, **iterations)
    checkpoint_activations(model, every_n_layers=every)
    checkpointed, run_again = train_gradients(model, batch, **iterations)
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name], rtol=0, atol=1e-6)
    assert len(run_once) == 1 + 5 + 1
    # Recomputed in the backward pass: the block of P, that after F, and iterations of the three with gradient.
    assert len(run_again) == len(run_once) + 1 + iterations_again + 1


@pytest.mark.parametrize(("kept", "iterations_again"), [(0, 3), (1, 2), (3, 0), (4, 0)])
def test_iterations_that_are_not_kept_run_again_and_give_the_same_gradients(kept, iterations_again):
    batch, iterations = corrupted(), {"num_iterations": 3, "num_no_grad_iterations": 2}
    model = tiny_model(dropout=0.3)
    plain, run_once = train_gradients(copy.deepcopy(model), batch, **iterations)
    gradients, run_again = train_gradients(copy.deepcopy(model), batch, **iterations, num_kept_iterations=kept)
    torch.testing.assert_close(gradients, plain, rtol=0, atol=1e-6)
    assert len(run_again) == len(run_once) + iterations_again
    checkpoint_activations(model)
    _, all_again = train_gradients(model, batch, **iterations, num_kept_iterations=kept)
    assert len(all_again) == len(run_once) + 1 + 3 + 1


# --- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["pre_layers", "fixed_point.layers", "post_layers"])
def test_dropout_drops_and_rescales_single_channels(place):
    layers = {"num_pre_layers": 0, "num_fixed_point_layers": 0, "num_post_layers": 0}
    name = "num_fixed_point_layers" if place.startswith("fixed") else f"num_{place}"
    p = 0.25
    model = tiny_model(**{**layers, name: 1}, dropout=p, num_fixed_point_iterations=1)
    modulation = model.get_submodule(place)[0].modulation
    ids = random_ids(1, 2).expand(2000, 2)
    with torch.no_grad():
        modulation.weight[32:48], modulation.bias[32:48] = 0, 0  # no attention, so that one dropout acts alone
        kept = model(ids).last_hidden_state
        weight, bias = modulation.weight[80:].clone(), modulation.bias[80:].clone()
        modulation.weight[80:], modulation.bias[80:] = 0, 0
        dropped = model(ids).last_hidden_state
        modulation.weight[80:], modulation.bias[80:] = weight, bias
        actual = model.train()(ids).last_hidden_state
    scaled = dropped + (kept - dropped) / (1 - p)
    is_dropped, is_scaled = ((actual - end).abs() < 1e-5 for end in (dropped, scaled))
    assert (is_dropped | is_scaled).all()
    share = (~is_scaled).double().mean().item()
    assert abs(share - p) < 5 * (p * (1 - p) / actual.numel()) ** 0.5
    assert (is_scaled[0] != is_scaled[1]).any()  # sequences draw their own masks


# --- initialisation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("injection", "start", "share"),
    [*((kind, "contraction", 0.5) for kind in INJECTIONS), ("mlp", "identity", 1.0), ("linear", "identity", 1.0)],
)
def test_a_fresh_model_is_exactly_its_stated_start(injection, start, share):
    model = FPMDLMForMaskedDiffusion(tiny_config(input_injection=injection, injection_init=start)).double()
    ids = random_ids(2, 6)
    state = 10 * torch.randn(2, 6, 16, dtype=torch.float64)
    output = model(ids, fixed_point_state=state, num_iterations=3)
    u = model.embed_tokens(ids)  # blocks and G start as the identity
    torch.testing.assert_close(output.fixed_point_state, u + share**3 * (state - u), rtol=0, atol=1e-12)
    assert torch.equal(output.last_hidden_state, output.fixed_point_state)
    assert not output.logits.any()


def test_fresh_weights_are_uniform_within_the_inverse_root_of_their_inputs():
    model = FPMDLMForMaskedDiffusion(tiny_config(hidden_size=64, vocab_size=500))
    block = model.pre_layers[0]
    for weight in (model.embed_tokens.weight, block.attention.qkv_proj.weight, block.up_proj.weight):
        assert weight.abs().max().item() == pytest.approx(1 / 8, rel=0.01)
        assert weight.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.05)


def test_from_pretrained_takes_configuration_fields(tmp_path):
    tiny_model(dropout=0.2).save_pretrained(tmp_path)
    model = FPMDLMForMaskedDiffusion.from_pretrained(tmp_path, dropout=0.4, num_fixed_point_iterations=3)
    assert model.config.dropout == model.pre_layers[0].dropout == 0.4
    assert len(model(random_ids(1, 3)).residuals) == 3


@pytest.mark.parametrize("injection", INJECTIONS)
def test_weights_that_a_checkpoint_lacks_start_as_in_a_fresh_model(tmp_path, injection):
    tiny_model(num_fixed_point_layers=0).save_pretrained(tmp_path)
    config = tiny_config(input_injection=injection)
    model = FPMDLMForMaskedDiffusion.from_pretrained(tmp_path, config=config, ignore_mismatched_sizes=True)
    fresh = FPMDLMForMaskedDiffusion(config)
    for part in ("input_proj", "injection", "layers.0.modulation", "layers.0.norm1"):
        expected = fresh.fixed_point.get_submodule(part).state_dict()
        for name, value in model.fixed_point.get_submodule(part).state_dict().items():
            assert torch.equal(value, expected[name]), (part, name)
