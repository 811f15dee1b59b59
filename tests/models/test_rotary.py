# SPDX-License-Identifier: Apache-2.0
"""Rotary embeddings against turns of complex numbers, and their derivatives."""

import torch

from fpmgm.models.rotary import rotary_embedding, rotated


LENGTH, HEADS, SIZE, THETA = 5, 3, 6, 100.0


def make_qkv() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (2, LENGTH, 3, HEADS, SIZE)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def tables(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    return rotary_embedding(LENGTH, SIZE, THETA, torch.device("cpu"), dtype)


def by_complex_numbers(x: torch.Tensor) -> torch.Tensor:
    """(B, L, H, K) → (B, H, L, K): channels i and i + K/2 are a number times e^{i · position · θ^{−2i/K}}."""
    numbers = torch.complex(*x.chunk(2, dim=-1))
    places, pairs = torch.arange(LENGTH, dtype=torch.float64), torch.arange(SIZE // 2, dtype=torch.float64)
    turns = torch.exp(1j * places[:, None, None] * THETA ** (-2 * pairs / SIZE))  # (L, 1, K/2)
    return torch.cat([(numbers * turns).real, (numbers * turns).imag], dim=-1).transpose(1, 2)


def test_queries_and_keys_are_turned_and_values_are_not():
    qkv = make_qkv()
    expected = (by_complex_numbers(qkv[:, :, 0]), by_complex_numbers(qkv[:, :, 1]), qkv[:, :, 2].transpose(1, 2))
    compiled = torch.compile(rotated, backend="eager")
    for function in (rotated, compiled):
        for ours, theirs in zip(function(qkv, tables()), expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-14, rtol=0)


def test_first_and_second_derivatives():
    qkv = make_qkv()
    assert torch.autograd.gradcheck(lambda x: rotated(x, tables()), qkv)
    assert torch.autograd.gradgradcheck(lambda x: rotated(x, tables()), qkv)


def test_what_attention_keeps_is_one_copy_of_queries_keys_and_values():
    qkv = make_qkv()
    outputs = rotated(qkv, tables())
    kept = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in outputs}
    assert sum(kept.values()) == qkv.untyped_storage().nbytes()
    assert qkv.untyped_storage().data_ptr() not in kept  # free to go


def test_half_precision_is_turned_by_precise_tables():
    qkv = make_qkv().bfloat16()
    query = rotated(qkv, tables(torch.float32))[0]
    assert query.dtype == torch.bfloat16
    exact = by_complex_numbers(qkv[:, :, 0].double())
    assert (query - exact).abs().max() < 2**-7 * exact.abs().max()
