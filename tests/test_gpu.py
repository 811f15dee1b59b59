# SPDX-License-Identifier: Apache-2.0
"""What a GPU alone can show: its attention kernels, bfloat16, compiled blocks, streams. Skipped where there is none.

On a machine with one, `pytest tests/test_gpu.py tests/test_no_waiting.py tests/models/test_head.py` is what it adds to
the other tests. `FPMGM_REHEARSE=1` runs what can run on a CPU too.
"""

import os

import pytest
import torch
from datasets import Dataset
from transformers.utils import is_flash_attn_2_available

from fpmgm import FPMDLMForMaskedDiffusion
from fpmgm.trainers import MGMTrainer, MGMTrainingConfig

from .testing_utils import tiny_config, tiny_model


CUDA = torch.cuda.is_available()
REHEARSED = bool(os.environ.get("FPMGM_REHEARSE"))
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = pytest.mark.skipif(not CUDA and not REHEARSED, reason="there is no GPU")
only_cuda = pytest.mark.skipif(not CUDA, reason="there is no GPU")

SIZES = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128, "max_position_embeddings": 128}
EXPLICIT = {"num_pre_layers": 4, "num_fixed_point_layers": 0, "num_post_layers": 0}


def model_of(**options) -> FPMDLMForMaskedDiffusion:
    """A text model of 128 positions with random weights on the device."""
    return tiny_model(**SIZES, input_injection="diagonal", **options).to(DEVICE)


@only_cuda
@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention"])
@pytest.mark.parametrize("layers", [{}, EXPLICIT], ids=["fixed point", "explicit"])
def test_attention_kernels_agree_with_sdpa(name, layers):
    if name == "flash_attention_2" and not is_flash_attn_2_available():
        pytest.skip("flash-attn is not installed")
    model = model_of(**layers).bfloat16()
    ids = torch.randint(0, 10, (3, 128), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))
    expected = model(ids).logits.float()
    model.set_attn_implementation(name)
    found = model(ids).logits.float()
    scale = expected.abs().max()
    assert (found - expected).abs().max() < 0.05 * scale  # bfloat16 has 8 bits


@pytest.mark.parametrize("reuse", ["none", "3sr"])
def test_bfloat16_writes_whole_texts_within_the_budget(reuse):
    model = model_of().bfloat16()
    out = model.generate(batch_size=4, budget=48, reuse=reuse, seed=0, return_dict_in_generate=True)
    assert out.block_evaluations <= 48 and not (out.sequences == model.config.mask_token_id).any()
    again = model.generate(batch_size=4, budget=48, reuse=reuse, seed=0)
    assert torch.equal(out.sequences, again)


@pytest.mark.parametrize("options", [{}, {"torch_compile": True}], ids=["plain", "compiled"])
def test_bfloat16_training_learns(tmp_path, options):
    if options and not CUDA:
        pytest.skip("compiled on a CPU in other tests")
    model = FPMDLMForMaskedDiffusion(tiny_config(**SIZES, input_injection="diagonal"))
    args = MGMTrainingConfig(
        output_dir=str(tmp_path), max_steps=60, per_device_train_batch_size=16, learning_rate=3e-3, warmup_steps=5,
        bf16=True, loss_weighting="uniform", save_strategy="no", report_to="none", logging_steps=10, use_cpu=not CUDA,
        disable_tqdm=True, ema_decay=0.9, **options,
    )  # fmt: skip
    rows = Dataset.from_dict({"input_ids": [[i % 3] * 128 for i in range(64)]})  # one digit, again and again
    trainer = MGMTrainer(model=model, args=args, train_dataset=rows)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < 0.7 * losses[0]


@only_cuda
def test_compiled_blocks_write_the_same_tokens():
    model = model_of()
    expected = model.generate(batch_size=4, budget=48, seed=0)
    model.compile_blocks()
    assert torch.equal(model.generate(batch_size=4, budget=48, seed=0), expected)


@only_cuda
def test_two_streams_write_what_one_writes():
    models = [model_of(), model_of(seed=1)]
    expected = [model.generate(batch_size=4, budget=48, seed=0) for model in models]
    torch.cuda.synchronize()
    found, streams = [], [torch.cuda.Stream(), torch.cuda.Stream()]
    for model, stream in zip(models, streams, strict=True):
        with torch.cuda.stream(stream):
            found.append(model.generate(batch_size=4, budget=48, seed=0))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
