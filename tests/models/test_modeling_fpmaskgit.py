# SPDX-License-Identifier: Apache-2.0
"""FP-MaskGIT's forward, loss, gradients, dropout and initialisation, against an independent implementation."""

import pytest
import torch

from fpmgm import FPMaskGITConfig, FPMaskGITModel
from fpmgm.models.block_fpmaskgit import FPMaskGITBlock
from tests.models.helpers import count_calls
from tests.models.reference_maskgit import reference_forward
from tests.testing_utils import tiny_image_config, tiny_image_model, tiny_model


MASK, LENGTH, CLASSES = 7, 9, 3  # of tiny_image_config


def random_codes(size: int, seed: int = 0) -> torch.Tensor:
    """(B, 9) codes, about half of them masked."""
    generator = torch.Generator().manual_seed(seed)
    masked = torch.rand(size, LENGTH, generator=generator) < 0.5
    return torch.randint(MASK, (size, LENGTH), generator=generator).masked_fill(masked, MASK)


def labelled(size: int = 4) -> dict:
    """Masked codes with their classes (the last is the null class), labels and weights."""
    ids = random_codes(size)
    clean = torch.randint(MASK, ids.shape, generator=torch.Generator().manual_seed(1))
    return {
        "input_ids": ids,
        "class_labels": torch.arange(size) % (CLASSES + 1),
        "labels": clean.masked_fill(ids != MASK, -100),
        "loss_weights": torch.linspace(0.5, 2.0, size),
    }


def reference_loss(logits, labels, loss_weights):
    """Σ weight · −log p over positions with a label, p without the mask id, per position; one by one."""
    total = 0.0
    for row, position in (labels != -100).nonzero().tolist():
        allowed = logits[row, position, :MASK]
        total = total + loss_weights[row] * (allowed.logsumexp(0) - allowed[labels[row, position]])
    return total / labels.numel()


# --- the forward pass ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        *({"input_injection": kind} for kind in ("mlp", "linear", "diagonal")),
        {"num_pre_layers": 3, "num_fixed_point_layers": 0, "num_post_layers": 0},
        {"num_pre_layers": 2, "num_fixed_point_layers": 2, "num_post_layers": 2, "num_register_tokens": 3},
        {"num_attention_heads": 3, "num_register_tokens": 0},  # heads of size 5: inner width 15, not 16
        {"rms_norm_eps": 0.1, "tie_word_embeddings": False},
    ],
    ids=str,
)
def test_forward_equals_the_reference_in_float64(overrides):
    model = tiny_image_model(**overrides).double()
    ids, classes = random_codes(4), torch.tensor([0, 2, 3, 1])
    output = model(ids, class_labels=classes, num_iterations=0 if model.fixed_point is None else 4)
    expected = reference_forward(model.config, model.state_dict(), ids, classes, iterations=4)
    torch.testing.assert_close(output.logits, expected.logits, rtol=0, atol=1e-10)
    torch.testing.assert_close(output.last_hidden_state, expected.hidden, rtol=0, atol=1e-10)
    if expected.state is None:
        assert output.fixed_point_state is None and output.residuals is None
    else:
        torch.testing.assert_close(output.fixed_point_state, expected.state, rtol=0, atol=1e-10)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.3)], ids=str)
def test_lower_precision_stays_close(implementation, dtype, tolerance):
    model = tiny_image_model(scale=0.1)
    expected = reference_forward(model.config, model.double().state_dict(), random_codes(3))
    model.to(dtype).set_attn_implementation(implementation)
    output = model(random_codes(3))
    assert output.logits.dtype == dtype and output.residuals.dtype == torch.float32
    torch.testing.assert_close(output.logits.double(), expected.logits, rtol=0, atol=tolerance)


def test_no_class_is_the_null_class_and_the_time_is_not_seen():
    model, ids = tiny_image_model(), random_codes(2)
    null = model(ids, class_labels=torch.full((2,), CLASSES)).logits
    torch.testing.assert_close(model(ids).logits, null)
    assert torch.equal(model(ids, timesteps=torch.tensor([0.1, 0.9])).logits, model(ids).logits)
    assert not torch.allclose(model(ids, class_labels=torch.tensor([0, 1])).logits, null, atol=1e-2)


@pytest.mark.parametrize("share", [None, "random"])
def test_warm_start_begins_at_the_given_mixture_registers_included(share):
    model, ids = tiny_image_model(num_register_tokens=2).double(), random_codes(2)
    previous = torch.randn(2, LENGTH + 2, 16, dtype=torch.float64)
    weights = None if share is None else torch.rand(2, LENGTH + 2, dtype=torch.float64)
    output = model(ids, fixed_point_state=previous, reuse_weights=weights, num_iterations=2)
    expected = reference_forward(
        model.config, model.state_dict(), ids, iterations=2, previous_state=previous,
        previous_share=1.0 if weights is None else weights[..., None],
    )  # fmt: skip
    torch.testing.assert_close(output.fixed_point_state, expected.state, rtol=1e-9, atol=1e-9)


# --- loss and gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["masked", "all"])
def test_loss_and_gradients_equal_the_written_out_sjfb(where):
    model, batch = tiny_image_model(num_fixed_point_layers=2).double(), labelled()
    if where == "all":
        clean = torch.randint(MASK, batch["labels"].shape)
        batch["labels"] = torch.where(batch["labels"] == -100, clean, batch["labels"])
    blocks = count_calls(model, FPMaskGITBlock)
    output = model(**batch, num_iterations=3, num_no_grad_iterations=2)
    output.loss.backward()
    assert len(blocks) == output.block_evaluations == 1 + 5 * 2 + 1

    leaves = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    call = (model.config, leaves, batch["input_ids"], batch["class_labels"])
    expected = reference_forward(*call, iterations=3, no_grad_iterations=2)
    loss = reference_loss(expected.logits, batch["labels"], batch["loss_weights"])
    gradients = dict(zip(leaves, torch.autograd.grad(loss, leaves.values()), strict=True))
    assert output.loss.item() == pytest.approx(loss.item(), abs=1e-10)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=0, atol=1e-10, msg=f"{name} ({where})")
    assert gradients["pre_layers.0.up_proj.weight"].abs().max() > 1e-6  # P learns, through u

    masked = batch["input_ids"] == MASK  # the accuracy looks at these, wherever the loss does
    right = expected.logits[masked][:, :MASK].argmax(-1) == batch["labels"][masked]
    assert output.masked_accuracy.item() == pytest.approx(right.float().mean().item())


# --- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drawn_before", [False, True])
@pytest.mark.parametrize("part", ["attention", "MLP"])
def test_dropout_drops_and_rescales_attention_and_hidden_units(part, drawn_before):
    p, h = 0.25, torch.randn(500, LENGTH, 16, dtype=torch.float64)
    block = tiny_image_model(dropout=p).pre_layers[0].double()
    with torch.no_grad():
        block.down_proj.weight.copy_(torch.eye(16, 24))  # hidden units show as they are
        vectors = list(block.modulation(torch.randn(1, 16, dtype=torch.float64)))
        vectors[5 if part == "attention" else 2].zero_()  # one dropout acts alone: the other's gate is shut
        evaluated = block(h, vectors) - h
        block.train()
        keep = block.dropout_masks(h) if drawn_before else None
        trained = block(h, vectors, keep=keep) - h
    is_kept, is_dropped = (trained - evaluated / (1 - p)).abs() < 1e-10, trained == 0
    assert (is_kept | is_dropped).all()
    assert abs((~is_kept).double().mean().item() - p) < 5 * (p * (1 - p) / trained.numel()) ** 0.5
    if drawn_before:
        expected = keep[0] if part == "attention" else keep[1][..., :16]
        assert torch.equal(is_kept, expected)


@pytest.mark.parametrize(
    ("make", "shapes"),
    [
        (tiny_image_model, [(2, LENGTH + 1, 16), (2, LENGTH + 1, 24)]),  # of attention, of the MLP's hidden units
        (tiny_model, [(2, 8, 16)] * 2),  # of the two branches
    ],
)
def test_dropout_masks_are_shared_by_the_iterations_of_a_call(make, shapes):
    model, seen = make(dropout=0.4).train(), []
    length = model.config.max_position_embeddings
    model.fixed_point.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[4]))
    for _ in range(2):
        model(random_codes(2)[:, :length], num_iterations=3, num_no_grad_iterations=2)
    first, second = seen[:5], seen[5:]
    for masks in (first, second):
        assert all(torch.equal(x, y) for others in masks for x, y in zip(others, masks[0], strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(first[0], second[0], strict=True))  # new ones at each call
    assert [mask.shape for mask in first[0]] == shapes  # sequences have their own


# --- initialisation --------------------------------------------------------------------------------------------------


def parameters(**fields) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in FPMaskGITModel(FPMaskGITConfig(**fields)).parameters())


@pytest.mark.parametrize(
    ("width", "heads", "depth", "intermediate", "millions"),
    [
        (384, 6, 6, 1024, 23.0),
        (512, 6, 12, 1536, 69.3),  # heads of size 85: inner width 510
        (768, 12, 12, 2048, 142.2),
        (1024, 16, 24, 2816, 479.7),
        (1152, 16, 28, 3072, 692.1),
    ],
    ids=str,
)
def test_parameter_counts_are_those_of_the_original_sizes(width, heads, depth, intermediate, millions):
    count = parameters(
        codebook_size=16384, num_classes=1000, hidden_size=width, num_attention_heads=heads, num_pre_layers=depth,
        num_fixed_point_layers=0, num_post_layers=0, intermediate_size=intermediate,
    )  # fmt: skip
    assert count / 1e6 == pytest.approx(millions, abs=0.05)


def test_parameter_counts_with_the_papers_codebook_and_classes():
    large = parameters(num_pre_layers=24, num_fixed_point_layers=0, num_post_layers=0)
    assert (large, parameters()) == (466_048_001, 186_221_569)  # MaskGIT-Large, FP-MaskGIT 4/1/4


def test_a_fresh_model_is_the_identity_with_the_stated_weights():
    config = tiny_image_config(hidden_size=64, intermediate_size=200, codebook_size=500, num_classes=100)
    model, ids = FPMaskGITModel(config), random_codes(2)
    output = model(ids, num_iterations=3)
    embedded = model.embed_tokens(ids) + model.position_embedding.weight
    torch.testing.assert_close(output.last_hidden_state, embedded, rtol=0, atol=1e-6)
    for name in ("embed_tokens", "class_embedding"):
        assert model.get_submodule(name).weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.lm_head.weight is model.embed_tokens.weight and not model.lm_head.bias.any()
    block = model.pre_layers[0]
    for weight in (block.attention.qkv_proj.weight, block.gate_proj.weight, block.down_proj.weight):
        bound = (6 / sum(weight.shape)) ** 0.5  # Xavier's
        assert weight.abs().max().item() == pytest.approx(bound, rel=0.01)
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
