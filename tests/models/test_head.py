# SPDX-License-Identifier: Apache-2.0
"""Losses in chunks against the dense computation."""

import importlib.util
import os

import pytest
import torch
from torch.nn import functional as F

from fpmgm.models import head
from fpmgm.models.head import HeadLoss, LMHead, chunked_loss

from ..testing_utils import refused, stacks, tiny_model


POSITIONS, SIZE, VOCABULARY, MASK = 13, 5, 9, 8


@pytest.fixture(params=[1, 4, 13, 100], ids=lambda rows: f"{rows} rows a chunk")
def rows_of_a_chunk(request, monkeypatch):
    monkeypatch.setattr(head, "chunk_rows", lambda vocab_size, device: request.param)
    return request.param


def problem(dtype=torch.float64):
    h, weight, bias = torch.randn(POSITIONS, SIZE), torch.randn(VOCABULARY, SIZE), torch.randn(VOCABULARY)
    return [x.to(dtype).requires_grad_() for x in (h, weight, bias)]


def cross_entropy(logits, labels, weights):
    return (F.cross_entropy(logits, labels, reduction="none") * weights).sum()


def both_divergences(student, target):
    student, target = student.log_softmax(1), target.log_softmax(1)
    return (target.exp() * (target - student)).sum() + (student.exp() * (student - target)).sum()


@pytest.mark.parametrize("kinds", [("cross_entropy",), ("divergence",), ("cross_entropy", "divergence")], ids="+".join)
def test_chunks_equal_the_dense_computation(kinds, rows_of_a_chunk):
    h, weight, bias = inputs = problem()
    labels, weights = torch.randint(MASK, (POSITIONS,)), torch.rand(POSITIONS, dtype=torch.float64)
    teacher = head.forbid(torch.randn(POSITIONS, VOCABULARY, dtype=torch.float64), MASK)
    sizes, asked = [], {}

    def divergence(logits, rows):
        sizes.append(len(logits))
        return both_divergences(logits, teacher[rows])

    if "cross_entropy" in kinds:
        asked |= {"labels": labels, "weights": weights}
    if "divergence" in kinds:
        asked |= {"logits_loss": divergence, "logits_loss_weight": 0.7}
    total, hits, further = chunked_loss(*inputs, HeadLoss(MASK, **asked))
    gradients = torch.autograd.grad(3 * total, inputs)

    column = torch.arange(VOCABULARY) == MASK
    logits = (h @ weight.T + bias).masked_fill(column, -1e6)
    base = cross_entropy(logits, labels, weights) if "cross_entropy" in kinds else 0
    added = both_divergences(logits, teacher) if "divergence" in kinds else torch.zeros(())
    expected = torch.autograd.grad(3 * (base + 0.7 * added), inputs)
    torch.testing.assert_close(total, base + 0.7 * added, rtol=1e-12, atol=1e-12)
    assert further.item() == pytest.approx(added.item(), rel=1e-12)
    assert hits.tolist() == ((logits.argmax(1) == labels).tolist() if "cross_entropy" in kinds else [])
    for gradient, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-10, atol=1e-12)
    if "divergence" in kinds:
        assert max(sizes) == min(rows_of_a_chunk, POSITIONS)
        assert sum(sizes) == POSITIONS


def test_only_wanted_gradients_are_made_and_none_without_grad():
    h, weight, bias = problem()
    seen = []

    def watched(logits, rows):
        seen.append(logits.requires_grad)
        return logits[:, 0].sum()

    loss = HeadLoss(MASK, labels=torch.zeros(POSITIONS, dtype=torch.long), logits_loss=watched)
    total, *_ = chunked_loss(h, weight.detach(), bias.detach(), loss)
    total.backward()
    assert h.grad is not None and weight.grad is None
    with torch.no_grad():
        assert not chunked_loss(h, weight, bias, loss)[0].requires_grad
    assert seen == [True, False]


def test_no_position_gives_no_loss_and_no_gradient():
    h, weight, bias = problem()
    total, hits, _ = chunked_loss(h[:0], weight, bias, HeadLoss(MASK, torch.zeros(0, dtype=torch.long)))
    total.backward()
    assert total == 0 and len(hits) == 0
    assert weight.grad.abs().sum() == 0


def test_under_autocast_gradients_have_their_parameters_types():
    h, weight, bias = problem(torch.float32)
    loss = HeadLoss(MASK, torch.arange(POSITIONS) % MASK)
    reference = torch.autograd.grad(chunked_loss(h, weight, bias, loss)[0], weight)[0]
    with torch.autocast("cpu", torch.bfloat16):
        total, *_ = chunked_loss(h, weight, bias, loss)
    total.backward()
    assert total.dtype == weight.grad.dtype == h.grad.dtype == torch.float32
    torch.testing.assert_close(weight.grad, reference, rtol=0.1, atol=0.1)
    assert not torch.equal(weight.grad, reference)


def test_a_new_head_starts_at_zero_unless_its_weight_is_the_embeddings():
    for tied in (False, True):
        layer = LMHead(SIZE, VOCABULARY, tied)
        before = layer.weight.clone()
        layer.initialize()
        assert (layer.bias == 0).all()
        assert torch.equal(layer.weight, before if tied else torch.zeros_like(before))


@pytest.mark.parametrize("layers", [(1, 1, 1), (2, 0, 0), (1, 1, 0)])
def test_the_loss_at_given_positions_is_the_loss(layers):
    model = tiny_model(**stacks(*layers), input_injection="mlp").double()
    input_ids = torch.randint(10, (3, 7))
    masked = torch.rand(3, 7) < 0.5
    masked[1] = False  # a sequence without any
    batch = {
        "input_ids": input_ids.masked_fill(masked, 10),
        "labels": input_ids.masked_fill(~masked, -100),
        "loss_weights": torch.rand(3, dtype=torch.float64),
        "logits_loss": lambda logits, rows: logits.log_softmax(1)[:, 3].sum(),
    }
    model.train()
    results = []
    for positions in (None, masked.flatten().nonzero().squeeze(1)):
        model.zero_grad()
        output = model(**batch, logits_positions=positions)
        output.loss.backward()
        results.append((output, {name: p.grad.clone() for name, p in model.named_parameters()}))
    (everywhere, gradients), (selected, same) = results
    assert everywhere.last_hidden_state.shape == (3, 7, 16)
    assert selected.last_hidden_state.shape == (int(masked.sum()), 16)
    for name in ("loss", "masked_accuracy", "logits_loss"):
        torch.testing.assert_close(everywhere[name], selected[name], rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients, same, rtol=1e-10, atol=1e-12)
    assert everywhere.logits_loss != 0


@pytest.fixture
def fresh_choice():
    """The choice of a kernel is made again, and forgotten after the test."""
    head.fused_cross_entropy.cache_clear()
    yield
    head.fused_cross_entropy.cache_clear()


@pytest.fixture
def liger(monkeypatch, fresh_choice):
    """Where Liger's kernel runs, and the rows of its calls so far."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Liger's kernel needs a GPU or TRITON_INTERPRET=1, see `make test-extras`")
    functional = pytest.importorskip("liger_kernel.transformers.functional")
    kernel, calls = functional.liger_cross_entropy, []

    def watched(logits, *args, **kwargs):
        calls.append(len(logits))
        return kernel(logits, *args, **kwargs)

    monkeypatch.setattr(functional, "liger_cross_entropy", watched)
    return device, calls


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_forbidden_id_has_no_probability_and_a_finite_logit(dtype):
    logits = head.forbid(torch.zeros(2, 3, dtype=dtype), 1)
    assert logits.isfinite().all()
    assert torch.equal(logits.softmax(dim=-1), torch.tensor([[0.5, 0.0, 0.5]] * 2, dtype=dtype))


def test_ligers_kernel_takes_the_same_step(liger, rows_of_a_chunk):
    device, calls = liger
    model = tiny_model().train().to(device)
    input_ids = torch.randint(10, (3, 7), device=device)
    masked = torch.rand(3, 7, device=device) < 0.5
    batch = {
        "input_ids": input_ids.masked_fill(masked, 10),
        "labels": input_ids.masked_fill(~masked, -100),
        "loss_weights": torch.rand(3, device=device),
    }

    def step(**options):
        model.zero_grad()
        output = model(**batch, **options)
        output.loss.backward()
        return {"loss": output.loss, "hits": output.masked_accuracy} | {n: p.grad for n, p in model.named_parameters()}

    fused = step()
    assert sum(calls) == masked.sum()
    calls.clear()
    # Without a gradient to write there is none of the kernel's rounding, a further loss reads the logits, and float64
    # is more than the kernel computes in: none of these may meet it.
    plain = step(logits_loss=lambda logits, rows: 0 * logits.sum())
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(model(**batch).loss, plain["loss"])
    model.double()(**batch)
    assert not calls


def test_ligers_kernel_reads_bfloat16_and_its_gradients_are_no_further_from_exact_ones(liger):
    device, calls = liger
    generator = torch.Generator().manual_seed(0)
    h, weight = (torch.randn(n, 16, generator=generator).to(device) for n in (40, VOCABULARY))
    inputs = [x.requires_grad_() for x in (h, weight, torch.zeros(VOCABULARY, device=device))]
    labels, weights = torch.arange(40, device=device) % MASK, torch.rand(40, generator=generator).to(device)

    def gradients(overwrite):  # beside another loss, the logits may not be overwritten
        further = None if overwrite else (lambda logits, rows: logits.new_zeros(()))
        total, *_ = chunked_loss(*inputs, HeadLoss(MASK, labels, weights, further))
        return total, *torch.autograd.grad(total, inputs)

    exact = gradients(overwrite=False)
    with torch.autocast(device.type, torch.bfloat16):
        plain, fused = gradients(overwrite=False), gradients(overwrite=True)
    assert calls == [40]
    torch.testing.assert_close(fused[0], exact[0], rtol=2**-8, atol=0)
    for a, b, reference in zip(plain[1:], fused[1:], exact[1:], strict=True):
        error, fused_error = ((x - reference).norm() / reference.norm() for x in (a, b))
        assert 1e-4 < fused_error < 1.5 * error


def test_ligers_kernel_is_taken_where_it_is_installed_and_runs(monkeypatch, fresh_choice):
    kernel = None
    if importlib.util.find_spec("liger_kernel") is not None:
        kernel = importlib.import_module("liger_kernel.transformers.functional").liger_cross_entropy
    for interpreted, on_a_cpu in (("0", None), ("1", kernel)):
        monkeypatch.setenv("TRITON_INTERPRET", interpreted)
        head.fused_cross_entropy.cache_clear()
        assert head.fused_cross_entropy("cpu") is on_a_cpu
        assert head.fused_cross_entropy("cuda") is kernel
        assert head.fused_cross_entropy("meta") is None


def test_a_loss_of_the_logits_alone_has_its_weight_and_an_item_count_divides_the_cross_entropy():
    model, ids = tiny_model().double(), torch.randint(10, (2, 6))
    masked = torch.arange(12).view(2, 6) % 3 == 0
    noisy, labels = ids.masked_fill(masked, 10), ids.masked_fill(~masked, -100)

    def further(logits, rows):
        return logits.log_softmax(1)[:, 3].sum()

    positions = masked.flatten().nonzero().squeeze(1)
    alone = model(noisy, logits_positions=positions, logits_loss=further, logits_loss_weight=0.3)
    plain = model(noisy, labels=labels)
    both = model(noisy, labels=labels, logits_loss=further, logits_loss_weight=0.0, num_items_in_batch=24)
    assert alone.masked_accuracy is None
    torch.testing.assert_close(alone.loss, 0.3 * alone.logits_loss)
    torch.testing.assert_close(both.logits_loss, alone.logits_loss)
    torch.testing.assert_close(both.loss, plain.loss / 2)  # 12 positions
    refused("`logits_loss` needs", model, noisy, logits_loss=further)
