# SPDX-License-Identifier: Apache-2.0
"""Computed peak memory against what PyTorch's allocator reports."""

import json
from pathlib import Path

import pytest
import torch

from fpmgm import FPMaskGITConfig, FPMaskGITModel, FPMDLMConfig, FPMDLMForMaskedDiffusion
from fpmgm.analysis.cost import count_parameters
from fpmgm.analysis.measured import allocated_peak
from fpmgm.analysis.memory import ENGINES, training_memory
from fpmgm.models.noise import arccos_ratio

from ..testing_utils import checkpoint_activations


MDLM = {"num_pre_layers": 4, "num_fixed_point_layers": 0, "num_post_layers": 0}
LENGTH, BATCH = 64, 4


def small_config(**overrides) -> FPMDLMConfig:
    sizes = {"vocab_size": 1024, "mask_token_id": 1023, "hidden_size": 128, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 512, "conditioning_size": 16, "max_position_embeddings": LENGTH}
    return FPMDLMConfig(**{**sizes, **overrides})


def small_image_config(**overrides) -> FPMaskGITConfig:
    sizes = {"codebook_size": 1023, "hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 352}
    return FPMaskGITConfig(**{**sizes, "grid_size": 8, **overrides})


def train(
    config: FPMDLMConfig | FPMaskGITConfig, checkpointing: bool, dtype: str, masked: torch.Tensor, kept: int | None
) -> None:
    """Two optimizer steps with clipping and an average of the weights, as the trainer does."""
    is_image = config.model_type == "fpmaskgit"
    model = (FPMaskGITModel if is_image else FPMDLMForMaskedDiffusion)(config).train()
    classes = {"class_labels": torch.arange(len(masked)) % 10} if is_image else {}
    if checkpointing:
        checkpoint_activations(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    average = [p.detach().clone() for p in model.parameters()]
    options = {} if model.fixed_point is None else {"num_no_grad_iterations": 1, "num_iterations": 3}
    options["num_kept_iterations"] = kept
    for _ in range(2):
        ids = torch.randint(config.mask_token_id, masked.shape)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(
                ids.masked_fill(masked, config.mask_token_id),
                timesteps=torch.full((len(masked),), 0.5),
                labels=ids.masked_fill(~masked, -100),
                logits_positions=masked.flatten().nonzero().squeeze(1),
                **classes,
                **options,
            ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(average, [p.detach() for p in model.parameters()], 1e-4)
        del loss


# Settings whose peaks are in the head, in the backward pass and in the optimizer.
SETTINGS = {
    "mdlm": (MDLM, False, "float32"),
    "mdlm_checkpointed": ({**MDLM, "vocab_size": 300, "mask_token_id": 299}, True, "float32"),
    "mlp": ({}, False, "float32"),
    "mlp_checkpointed": ({"vocab_size": 300, "mask_token_id": 299}, True, "float32"),
    "diagonal_autocast": ({"input_injection": "diagonal"}, False, "bfloat16"),
    "linear_in_time": ({"input_injection": "linear", "time_conditioning": True, "dropout": 0.0}, False, "float32"),
}


IMAGE_SETTINGS = {
    "maskgit": ({**MDLM, "num_pre_layers": 6}, False, "float32"),
    "maskgit_autocast": ({**MDLM, "num_pre_layers": 6}, False, "bfloat16"),
    "image_mlp": ({}, False, "float32"),
    "image_mlp_checkpointed": ({"dropout": 0.0}, True, "float32"),
    "image_diagonal_autocast": ({"input_injection": "diagonal"}, False, "bfloat16"),
}


@pytest.mark.parametrize(("name", "kept"), [*((name, None) for name in IMAGE_SETTINGS), ("image_mlp", 1)])
def test_the_peak_of_images_is_within_a_tenth_of_the_allocators(name, kept):
    overrides, checkpointing, dtype = IMAGE_SETTINGS[name]
    check_peak(small_image_config(**overrides), 4 * BATCH, checkpointing, dtype, kept)


@pytest.mark.parametrize(("name", "kept"), [*((name, None) for name in SETTINGS), ("mlp", 1), ("linear_in_time", 0)])
def test_the_peak_is_within_a_tenth_of_the_allocators(name, kept):
    overrides, checkpointing, dtype = SETTINGS[name]
    check_peak(small_config(**overrides), BATCH, checkpointing, dtype, kept)


def check_peak(config, batch_size: int, checkpointing: bool, dtype: str, kept: int | None) -> None:
    masked = torch.rand(batch_size, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.5
    measured = allocated_peak(lambda: train(config, checkpointing, dtype, masked, kept))
    computed = training_memory(
        config, batch_size, LENGTH, iterations=3, positions=int(masked.sum()), queries=int(masked.sum(1).max()),
        checkpointing=checkpointing, kept_iterations=kept, dtype=dtype, device="cpu",
    )  # fmt: skip
    assert computed["peak"] == pytest.approx(measured, rel=0.1)
    parts = {part: size for part, size in computed.items() if part != "peak"}
    assert computed["peak"] == sum(parts.values())


IMAGE = {"num_pre_layers": 4, "num_fixed_point_layers": 1, "num_post_layers": 4}
MEASURED = {  # steps of benchmarks/training_cost.py, at the paper's sizes
    "MDLM": FPMDLMConfig(**{**MDLM, "num_pre_layers": 12}),
    "FP-MDLM mlp": FPMDLMConfig(),
    "FP-MDLM mlp, 3 kept": FPMDLMConfig(),
    "FP-MDLM mlp, checkpointed": FPMDLMConfig(),
    "FP-MDLM diagonal": FPMDLMConfig(input_injection="diagonal"),
    "MaskGIT-24": FPMaskGITConfig(**{**MDLM, "num_pre_layers": 24}),
    "MaskGIT-12": FPMaskGITConfig(**{**MDLM, "num_pre_layers": 12}),
    "FP-MaskGIT mlp": FPMaskGITConfig(**IMAGE),
    "FP-MaskGIT mlp, 3 kept": FPMaskGITConfig(**IMAGE),
    "FP-MaskGIT diagonal": FPMaskGITConfig(**IMAGE, input_injection="diagonal"),
}


@pytest.mark.parametrize("file", ["training_cost_cpu", "training_memory_cpu_text", "training_memory_cpu_images"])
def test_peaks_of_the_papers_models_are_near_the_measured_ones(file):
    result = json.loads((Path(__file__).parents[2] / f"benchmarks/results/{file}.json").read_text())
    batch_size, compared = result["arguments"]["batch_size"], 0
    for name in MEASURED.keys() & result["peak_memory_mib"].keys():
        config = MEASURED[name]
        length = config.max_position_embeddings
        times = (torch.arange(batch_size) + 0.5) / batch_size
        shares = times if config.model_type == "fpmdlm" else arccos_ratio(times)
        checkpointing = "checkpointed" in name
        computed = training_memory(
            config, batch_size, length, positions=float(shares.sum() * length), queries=float(shares.max() * length),
            checkpointing=checkpointing, kept_iterations=3 if "3 kept" in name else None, device="cpu",
            ema=False,
        )  # fmt: skip
        near = pytest.approx(result["peak_memory_mib"][name], rel=0.1 if checkpointing else 0.05)
        assert computed["peak"] / 2**20 == near, name
        compared += 1
    assert compared >= 4


def test_weights_and_their_copies():
    config = small_config()
    weights = count_parameters(config)["total"]
    memory = training_memory(config, BATCH, LENGTH)
    assert (memory["weights"], memory["optimizer"], memory["ema"]) == (4 * weights, 8 * weights, 4 * weights)
    assert training_memory(config, BATCH, LENGTH, ema=False)["ema"] == 0
    accumulating = training_memory(config, BATCH, LENGTH, accumulating=True)
    assert accumulating["gradients"] == 4 * weights and accumulating["peak"] > memory["peak"]


def peak(**changes) -> float:
    options = {"config": small_config(), "batch_size": BATCH, "length": LENGTH} | changes
    return training_memory(**options)["peak"]


def test_what_must_be_less_is_less():
    assert peak(checkpointing=True) < peak() < peak(batch_size=5) < peak(batch_size=5, length=80)
    kept = [peak(kept_iterations=n) for n in (0, 2, 4, 6)]
    assert kept == sorted(kept) and kept[0] < kept[-1] == peak() == peak(kept_iterations=9)
    assert peak(positions=20) < peak() and peak(iterations=3) < peak(iterations=4)
    assert peak(iterations=4, dtype="bfloat16") < peak(iterations=4)
    stages = [peak(engine=engine, gpus=8) for engine in ("ddp", "zero1", "zero2", "zero3")]
    assert stages == sorted(stages, reverse=True)
    for engine in set(ENGINES) - {"single", "ddp"}:
        assert peak(engine=engine, gpus=64) < peak(engine=engine, gpus=8)
    deep = small_config(num_pre_layers=12, num_fixed_point_layers=0, num_post_layers=0)
    assert peak(config=deep, engine="fsdp2", gpus=8) < peak(config=deep, engine="ddp", gpus=8)
    assert peak(engine="ddp", gpus=8) == peak(engine="ddp", gpus=64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float16"}, "`dtype`='float16' must be one of"),
        ({"engine": "zero4"}, "`engine`='zero4' must be one of"),
        ({"device": "tpu"}, "`device`='tpu' must be one of"),
        ({"positions": 10**6}, "`positions`=1000000 must be at most"),
        ({"gpus": 0}, "`gpus`=0 must be at least 1"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        peak(**changes)
