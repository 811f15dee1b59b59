# SPDX-License-Identifier: Apache-2.0
"""Peak memory of fake tensors against what PyTorch's allocator reports."""

import json
from pathlib import Path

import pytest
import torch

from fpmgm import FPMaskGITConfig, FPMaskGITModel, FPMDLMConfig, FPMDLMForMaskedDiffusion
from fpmgm.analysis.cost import NARROW, Call, count_parameters, places, trace_call
from fpmgm.analysis.measured import allocated_peak
from fpmgm.analysis.planning import ENGINES, training_memory
from fpmgm.models.noise import arccos_ratio

from ..testing_utils import checkpoint_activations, refused


MDLM = {"num_pre_layers": 4, "num_fixed_point_layers": 0, "num_post_layers": 0}
LENGTH, BATCH = 64, 4


def small_config(**overrides) -> FPMDLMConfig:
    sizes = {"vocab_size": 1024, "mask_token_id": 1023, "hidden_size": 128, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 512, "conditioning_size": 16, "max_position_embeddings": LENGTH}
    return FPMDLMConfig(**{**sizes, **overrides})


def small_image_config(**overrides) -> FPMaskGITConfig:
    sizes = {"codebook_size": 1023, "hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 352}
    return FPMaskGITConfig(**{**sizes, "grid_size": 8, "num_pre_layers": 2, "num_post_layers": 2, **overrides})


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
    "maskgit_autocast": (MDLM, False, "bfloat16"),
    "image_mlp": ({}, False, "float32"),
    "image_mlp_checkpointed": ({"dropout": 0.0}, True, "float32"),
    "image_diagonal_autocast": ({"input_injection": "diagonal"}, False, "bfloat16"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGE_SETTINGS)
def test_the_peak_of_images_is_that_of_the_allocator(name):
    overrides, checkpointing, dtype = IMAGE_SETTINGS[name]
    check_peak(small_image_config(**overrides), 4 * BATCH, checkpointing, dtype, 1 if name == "image_mlp" else None)


@pytest.mark.parametrize(("name", "kept"), [*((name, None) for name in SETTINGS), ("mlp", 1), ("linear_in_time", 0)])
def test_the_peak_is_that_of_the_allocator(name, kept):
    overrides, checkpointing, dtype = SETTINGS[name]
    check_peak(small_config(**overrides), BATCH, checkpointing, dtype, kept)


def check_peak(config, batch_size: int, checkpointing: bool, dtype: str, kept: int | None) -> None:
    masked = torch.rand(batch_size, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.5
    measured = allocated_peak(lambda: train(config, checkpointing, dtype, masked, kept))
    computed = memory(
        config, batch_size, LENGTH, int(masked.sum()), int(masked.sum(1).max()),
        checkpointing=checkpointing, dtype=dtype,
        num_no_grad_iterations=1, num_iterations=3, num_kept_iterations=kept,
    )  # fmt: skip
    assert computed["peak"] == pytest.approx(measured, rel=0.02)
    assert computed["peak"] == sum(size for part, size in computed.items() if part != "peak")


def memory(config, *shape, engine: str = "single", gpus: int = 1, ema: bool = True, **options) -> dict[str, float]:
    trace = trace_call(config, Call(*shape, training=True, **options))
    narrow, accumulating = NARROW[options.get("dtype", "float32")], options.get("accumulating", False)
    return training_memory(
        trace, count_parameters(config), config.num_hidden_layers, engine, gpus, narrow, accumulating, ema
    )


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


@pytest.mark.slow
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
        computed = memory(
            config, batch_size, length, int(shares.sum() * length), int(shares.max() * length), ema=False,
            checkpointing=checkpointing, num_no_grad_iterations=2, num_iterations=config.grad_iterations[1],
            num_kept_iterations=3 if "3 kept" in name else None,
        )  # fmt: skip
        assert computed["peak"] / 2**20 == pytest.approx(result["peak_memory_mib"][name], rel=0.03), name
        compared += 1
    assert compared >= 4


def test_weights_and_their_copies():
    config, shape = small_config(), (BATCH, LENGTH, 100)
    weights, alone = count_parameters(config)["total"], memory(small_config(), BATCH, LENGTH, 100)
    assert (alone["weights"], alone["optimizer"], alone["ema"]) == (4 * weights, 8 * weights, 4 * weights)
    assert memory(config, *shape, ema=False)["ema"] == 0
    accumulating = memory(config, *shape, accumulating=True)
    assert accumulating["gradients"] == 4 * weights and accumulating["peak"] > alone["peak"]


def test_engines_that_split_more_hold_less():
    def peak(**options) -> float:
        return memory(small_config(num_pre_layers=4), BATCH, LENGTH, 100, **options)["peak"]

    stages = [peak(engine=engine, gpus=8) for engine in ("ddp", "zero1", "zero2", "zero3")]
    assert stages == sorted(stages, reverse=True)
    for engine in set(ENGINES) - {"single", "ddp"}:
        assert peak(engine=engine, gpus=64) < peak(engine=engine, gpus=8)
    assert peak(engine="ddp", gpus=8) == peak(engine="ddp", gpus=64)


DEEP = {"num_pre_layers": 4, "num_fixed_point_layers": 2, "num_post_layers": 4}


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stacks", [{**MDLM, "num_pre_layers": 5}, DEEP])
def test_blocks_and_iterations_that_are_counted_hold_and_cost_what_all_of_them_do(
    checkpointing, dtype, stacks, monkeypatch
):
    config = small_config(**stacks)
    options = {"checkpointing": checkpointing, "dtype": dtype, "num_no_grad_iterations": 3, "num_iterations": 5}

    def found() -> tuple[float, float, float]:
        trace = trace_call(config, Call(BATCH, LENGTH, 100, training=True, **options))
        flops, moved = (sum(getattr(work, name) for work in trace.work.values()) for name in ("flops", "bytes"))
        return flops, pytest.approx(moved, rel=1e-5), memory(config, BATCH, LENGTH, 100, **options)

    counted = found()
    monkeypatch.setattr("fpmgm.analysis.cost.FEW", 99)
    assert counted == found()


def test_positions_that_are_none_of_the_batch_are_refused():
    for arguments in ((2, 8, 17, 8), (2, 8, 5, 9), (2, 8, 5, 2)):
        refused("must be positions of the batch", places, Call(*arguments))
