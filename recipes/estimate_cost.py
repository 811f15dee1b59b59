# SPDX-License-Identifier: Apache-2.0
"""What a model costs before it is run: parameters, FLOPs, bytes, memory, hours, money, seconds to sample.

    python recipes/estimate_cost.py --model mdlm fp_mdlm --hardware H200 --gpus 8 --price 3.50
    python recipes/estimate_cost.py --model recipes/configs/fp_mdlm_owt.yaml --hardware A100-80GB --gpus 4 --json
    python recipes/estimate_cost.py --model fp_mdlm_8b --gpus 64 --checkpointing
    python recipes/estimate_cost.py --model maskgit_large fp_maskgit --batch_size 128 --gpus 1 --hardware A100-80GB

A model is one of the presets, a folder, a hub name, or a recipe's YAML with the architecture's fields. Nothing is run,
but for `--hardware cpu`, which times a product and a copy. What is exact and what is an estimate: docs/cost.md.
"""

import gc


if __name__ == "__main__":
    gc.disable()  # one second of eleven goes into a search for garbage, of which imports and traces make little

import functools
import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoConfig, PreTrainedConfig

from fpmgm import FPMaskGITConfig, FPMDLMConfig, plan_budget
from fpmgm.analysis.cost import NARROW, Call, Trace, Work, count_parameters, trace_call
from fpmgm.analysis.planning import (
    ENGINES,
    largest_masked_share,
    masked_positions,
    masked_shares,
    on_line,
    sampling_steps,
    sampling_work,
    seconds,
    sent_bytes,
    teacher_work,
    training_memory,
    training_work,
)
from fpmgm.command_line import LocalPath, ModelName, check_name, parse_arguments, read_yaml
from fpmgm.evaluation.report import table
from fpmgm.models.kinds import KINDS, Kind


class Hardware(NamedTuple):
    """FLOP/s of matrix products by type, bytes of memory, bytes per second from and to it."""

    flops: dict[str, float]
    memory: float
    bandwidth: float


# From the makers' data sheets: SXM modules, products of dense matrices, float32 without TF32.
HARDWARE = {
    "A100-80GB": Hardware({"bfloat16": 312e12, "float32": 19.5e12}, 80e9, 2.039e12),
    "H100": Hardware({"bfloat16": 989e12, "float32": 67e12}, 80e9, 3.35e12),
    "H200": Hardware({"bfloat16": 989e12, "float32": 67e12}, 141e9, 4.8e12),
}


def layers(pre: int, fixed_point: int, post: int) -> dict[str, int]:
    """Fields of a configuration."""
    return {"num_pre_layers": pre, "num_fixed_point_layers": fixed_point, "num_post_layers": post}


def width(hidden_size: int, heads: int) -> dict[str, int]:
    """Fields of a text model's configuration."""
    return {"hidden_size": hidden_size, "num_attention_heads": heads, "intermediate_size": 4 * hidden_size}


# The paper's models, and text models of the same architecture with one and eight billion weights.
MODELS = {
    "mdlm": FPMDLMConfig(**layers(12, 0, 0)),
    "fp_mdlm": FPMDLMConfig(**layers(1, 1, 1)),
    "mdlm_1b": FPMDLMConfig(**layers(16, 0, 0), **width(2048, 16)),
    "fp_mdlm_1b": FPMDLMConfig(**layers(2, 2, 2), **width(3072, 24)),
    "mdlm_8b": FPMDLMConfig(**layers(36, 0, 0), **width(4096, 32)),
    "fp_mdlm_8b": FPMDLMConfig(**layers(3, 2, 3), **width(8192, 64)),
    "maskgit_large": FPMaskGITConfig(**layers(24, 0, 0)),
    "maskgit_12": FPMaskGITConfig(**layers(12, 0, 0)),
    "fp_maskgit": FPMaskGITConfig(**layers(4, 1, 4)),
}


class Training(NamedTuple):
    """One of the paper's: its title, optimizer steps, method, and the layers of a teacher that is another model."""

    title: str
    steps: int
    method: str
    teacher: dict[str, int] | None = None


# Conversion and consistency make fixed-point models; SDTT is the explicit ones' baseline.
TRAININGS = {  # by type of model and whether it has fixed-point layers
    ("fpmdlm", True): [
        Training("pretraining", 1_000_000, "base"),
        Training("consistency post-training", 30_000, "consistency"),
        Training("conversion from an MDLM", 40_000, "conversion", layers(12, 0, 0)),
    ],
    ("fpmdlm", False): [Training("pretraining", 1_000_000, "base"), Training("SDTT, 7 rounds", 70_000, "sdtt")],
    ("fpmaskgit", True): [
        Training("pretraining", 50_000, "base"),
        Training("consistency post-training", 10_000, "consistency"),
        Training("conversion from MaskGIT-Large", 10_000, "conversion", layers(24, 0, 0)),
    ],
    ("fpmaskgit", False): [Training("pretraining", 50_000, "base")],
}
UTILISATION = 0.11  # what the paper's hours on eight H200 imply: docs/cost.md


@dataclass
class CostArguments:
    """What to estimate."""

    model: list[str] = field(
        default_factory=lambda: ["mdlm", "fp_mdlm"],
        metadata={"help": f"Presets ({', '.join(MODELS)}), folders, hub names or YAML files."},
    )
    hardware: str = field(default="H200", metadata={"help": f"{', '.join(HARDWARE)}, or cpu: this machine, timed."})
    gpus: int = field(default=8, metadata={"help": "Number of them."})
    batch_size: int = field(default=512, metadata={"help": "Sequences of an optimizer step, over all GPUs."})
    micro_batch_size: int | None = field(default=None, metadata={"help": "Of them at once on a GPU; null: its share."})
    length: int | None = field(default=None, metadata={"help": "Tokens of a sequence; null: the model's longest."})
    dtype: str = field(default="bfloat16", metadata={"help": "Of the products: bfloat16 (autocast) or float32."})
    checkpointing: bool = field(default=False, metadata={"help": "Whether hours are with activation checkpointing."})
    num_kept_iterations: int | None = field(
        default=None, metadata={"help": "Iterations with gradient that do not run again, without that; null: all."}
    )
    steps: int | None = field(default=None, metadata={"help": "Optimizer steps of pretraining; null: the paper's."})
    utilisation: float = field(default=UTILISATION, metadata={"help": "Share of the peak FLOP/s that is reached."})
    price: float | None = field(default=None, metadata={"help": "Of a GPU for an hour; null: no cost is shown."})
    budgets: list[int] = field(
        default_factory=lambda: [96, 192, 384, 768], metadata={"help": "Block evaluations of a sampled sequence."}
    )
    sampling_batch_size: int = field(default=1, metadata={"help": "Sequences sampled at once."})
    vocab_size: int = field(default=50258, metadata={"help": "For a YAML whose tokenizer has a name: GPT-2's."})
    json: bool = field(default=False, metadata={"help": "Print JSON, with every number, instead of tables."})

    def __post_init__(self):
        for name in ("gpus", "batch_size", "sampling_batch_size", "length", "steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}`={getattr(self, name)} must be at least 1.")
        if not 0 < self.utilisation <= 1:
            raise ValueError(f"`utilisation`={self.utilisation} must lie in (0, 1].")
        if self.dtype not in NARROW:
            raise ValueError(f"`dtype`={self.dtype!r} must be one of {tuple(NARROW)}.")
        if self.hardware not in (*HARDWARE, "cpu"):
            raise ValueError(f"`hardware`={self.hardware!r} must be one of {(*HARDWARE, 'cpu')}.")
        if self.micro_batch_size is None:
            self.micro_batch_size = self.batch_size // self.gpus
        if self.micro_batch_size < 1 or self.batch_size % (self.gpus * self.micro_batch_size):
            raise ValueError(
                f"`batch_size`={self.batch_size} must be a multiple of `gpus`={self.gpus} times `micro_batch_size`="
                f"{self.micro_batch_size}: change one of the three."
            )

    @property
    def micro_batches(self) -> int:
        """Of a GPU in an optimizer step."""
        return self.batch_size // (self.gpus * self.micro_batch_size)


def main(argv: list[str] | None = None) -> list[dict]:
    """Estimate and print; returns one estimate for each model."""
    (args,) = parse_arguments((CostArguments,), __doc__, argv)
    hardware = measure_cpu(args.dtype) if args.hardware == "cpu" else HARDWARE[args.hardware]
    estimates = [estimate(name, load_config(name, args.vocab_size), args, hardware) for name in args.model]
    if args.json:
        print(json.dumps({"arguments": asdict(args), "hardware": hardware._asdict(), "models": estimates}, indent=1))
    else:
        print("\n\n".join("\n\n".join([f"## {e['model']}", *tables(e, args)]) for e in estimates))
    return estimates


# --- what is asked ------------------------------------------------------------------------------------------------


def load_config(name: str, vocab_size: int) -> PreTrainedConfig:
    """The configuration of a preset, of a recipe's YAML, or of a folder or hub name.

    Raises:
        `ValueError`: for a YAML without the architecture's fields.
    """
    if name in MODELS:
        return MODELS[name]
    is_yaml = Path(name).suffix in (".yaml", ".yml")
    what_to_do = f"give one that does, or a preset ({', '.join(MODELS)})"
    check_name("model", name, LocalPath if is_yaml else ModelName, what_to_do)
    if not is_yaml:
        return AutoConfig.from_pretrained(name)
    values = read_yaml("model", name)
    of_text, of_images = (set(kind.own_fields()) for kind in (FPMDLMConfig, FPMaskGITConfig))
    is_image = bool(values.keys() & (of_images - of_text))
    described = {key: value for key, value in values.items() if key in (of_images if is_image else of_text)}
    if "num_pre_layers" not in described:
        raise ValueError(
            f"`model`={name!r} does not set `num_pre_layers`: give a YAML that describes an architecture, or the "
            "model that this one starts from."
        )
    if is_image:
        return FPMaskGITConfig(**described)
    size = values["tokenizer_vocab_size"] if values.get("tokenizer", "") is None else vocab_size
    return FPMDLMConfig(**{"vocab_size": size, "mask_token_id": size - 1, **described})


def measure_cpu(dtype: str) -> Hardware:
    """This machine: the fastest of several products and copies, and all its memory."""
    x, y = (torch.randn(1536, 1536).to(getattr(torch, dtype)) for _ in range(2))
    source, target = torch.randn(2**25), torch.empty(2**25)

    def fastest(run, times: int = 8) -> float:
        best = float("inf")
        for _ in range(times):
            start = time.perf_counter()
            run()
            best = min(best, time.perf_counter() - start)
        return best

    flops = 2 * 1536**3 / fastest(lambda: x @ y)
    bandwidth = 2 * source.nbytes / fastest(lambda: target.copy_(source))
    return Hardware({dtype: flops}, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), bandwidth)


# --- the numbers --------------------------------------------------------------------------------------------------


def estimate(name: str, config: PreTrainedConfig, args: CostArguments, hardware: Hardware) -> dict:
    """Everything about one model, as plain numbers."""
    length = args.length or config.max_position_embeddings
    speed = hardware.flops[args.dtype] * args.utilisation, hardware.bandwidth
    kind, groups = KINDS[config.model_type], args.gpus * args.micro_batches
    mean, fullest = masked_shares(kind, 1).item(), fullest_share(args, kind)
    few = min(mean, 1 / args.micro_batch_size)  # as many positions as a sequence has

    @functools.cache
    def step(share: float) -> dict[str, Work]:
        return training_work(
            config, args.micro_batch_size, length, share, args.checkpointing, args.num_kept_iterations, args.dtype
        )

    if groups == 1:
        whole = slowest = step(mean)
    else:  # on a line, which goes through the step that `memory` looks at too
        shares = mean, largest_masked_share(kind, args.gpus, args.micro_batches)
        whole, slowest = (on_line(step, share, few, fullest) for share in shares)
    batch = {part: work * (1 if part == "optimizer" else groups) for part, work in whole.items()}
    return {
        "model": name,
        "parameters": count_parameters(config),
        "step": {part: asdict(work) for part, work in batch.items()},
        "memory": memory(config, length, args, hardware),
        "runs": [
            hours_and_cost(config, training, length, args, speed, whole, slowest)
            for training in TRAININGS[config.model_type, config.num_fixed_point_layers > 0]
        ],
        "sampling": [sampling(config, budget, length, args, speed) for budget in args.budgets],
    }


def fullest_share(args: CostArguments, kind: Kind) -> float:
    """The masked share of a micro-batch at worst. Antithetic times: its are neighbours, those next to 0 or 1."""
    return masked_shares(kind, args.gpus * args.micro_batches).max().item()


def memory(config: PreTrainedConfig, length: int, args: CostArguments, hardware: Hardware) -> list[dict]:
    """The peak on a GPU for each engine, without and with checkpointing, and the largest micro-batch that fits.

    That is read off the step on the micro-batch and, where it must be more or less, on one sequence or on all of a
    GPU's: the peak is taken to be on a line.
    """
    share = fullest_share(args, KINDS[config.model_type])
    accumulating, most = args.micro_batches > 1, args.batch_size // args.gpus
    iterations = {"num_iterations": config.grad_iterations[1], "num_kept_iterations": args.num_kept_iterations}
    iterations["num_no_grad_iterations"] = sum(config.no_grad_iterations) // 2  # as in the mean step

    @functools.cache
    def step(size: int, checkpointing: bool) -> Trace:
        call = Call(
            size, length, *masked_positions(share, size, length), training=True, checkpointing=checkpointing,
            accumulating=accumulating, dtype=args.dtype, device="cpu" if args.hardware == "cpu" else "cuda",
            **iterations,
        )  # fmt: skip
        return trace_call(config, call)

    def peak(size: int, engine: str, checkpointing: bool) -> dict[str, float]:
        return training_memory(
            step(size, checkpointing), parameters, config.num_hidden_layers, engine, args.gpus, NARROW[args.dtype],
            accumulating,
        )  # fmt: skip

    def largest(engine: str, checkpointing: bool, found: dict[str, float]) -> int | None:
        """A power of two; `None` where none fits, as where the weights and what is kept for them do not."""
        if sum(found[name] for name in ("weights", "optimizer", "buckets", "ema")) > hardware.memory:
            return None
        size = args.micro_batch_size
        other = 1 if found["peak"] > hardware.memory else most
        slope = 0.0
        if other != size:
            slope = (peak(other, engine, checkpointing)["peak"] - found["peak"]) / (other - size)
        fitting = [n for n in sizes if found["peak"] + (n - size) * slope <= hardware.memory]
        return max(fitting, default=None)

    rows, sizes, parameters = [], [2**i for i in range(most.bit_length())], count_parameters(config)
    for engine in ["single"] if args.gpus == 1 else [name for name in ENGINES if name != "single"]:
        for checkpointing in (False, True):
            found = peak(args.micro_batch_size, engine, checkpointing)
            rows.append({
                "engine": engine, "checkpointing": checkpointing, **found,
                "largest_micro_batch": largest(engine, checkpointing, found),
                "sent_bytes": sent_bytes(
                    parameters["total"], engine, args.gpus, NARROW[args.dtype], args.micro_batches
                ),
            })  # fmt: skip
    return rows


def hours_and_cost(
    config: PreTrainedConfig,
    training: Training,
    length: int,
    args: CostArguments,
    speed: tuple[float, float],
    whole: dict[str, Work],
    slowest: dict[str, Work],
) -> dict:
    """Those of a training from its mean step and the slowest rank's: all wait for the one with most masked."""
    title, steps, method, layers_of_teacher = training
    if method == "base" and args.steps is not None:
        steps = args.steps
    teacher = type(config)(**{**config.to_dict(), **(layers_of_teacher or {})})
    kind = KINDS[config.model_type]
    shares = masked_shares(kind, 1).item(), largest_masked_share(kind, args.gpus, args.micro_batches)
    taught, slowest_taught = (
        teacher_work(teacher, method, args.micro_batch_size, length, share, args.dtype) for share in shares
    )
    duration = args.micro_batches * seconds({**slowest, "optimizer": slowest_taught}, *speed)
    duration += seconds({"optimizer": slowest["optimizer"]}, *speed)
    hours = steps * duration / 3600
    flops = (sum(part.flops for part in whole.values()) + taught.flops) * args.gpus * args.micro_batches
    return {
        "run": title,
        "steps": steps,
        "tokens": steps * args.batch_size * length,
        "flops": steps * flops,
        "seconds_per_step": duration,
        "hours": hours,
        "gpu_hours": hours * args.gpus,
        "cost": None if args.price is None else hours * args.gpus * args.price,
    }


def sampling(
    config: PreTrainedConfig, budget: int, length: int, args: CostArguments, speed: tuple[float, float]
) -> dict:
    """A sequence under a budget, on one GPU."""
    plan, batch_size = plan_budget(config, budget), args.sampling_batch_size
    parts = sampling_work(config, sampling_steps(plan.iterations, batch_size, length), length, args.dtype)
    return {
        "budget": budget,
        "num_steps": plan.num_steps,
        "flops": sum(work.flops for work in parts.values()) / batch_size,
        "bytes": sum(work.bytes for work in parts.values()) / batch_size,
        "seconds": seconds(parts, *speed) / batch_size,
        "parts": {part: asdict(work) for part, work in parts.items()},
    }


# --- the tables ---------------------------------------------------------------------------------------------------


def tables(found: dict, args: CostArguments) -> list[str]:
    """The sections of one model's report."""
    parameters = {name: n for name, n in found["parameters"].items() if n}
    step, gib = found["step"], 2**30
    flops, moved = (sum(work[key] for work in step.values()) for key in ("flops", "bytes"))
    where = f"{args.gpus} × {args.hardware}, {args.dtype}"
    work_rows = [
        [name, f"{work['flops'] / 1e12:.2f}", f"{work['flops'] / flops:.1%}", f"{work['bytes'] / 1e9:.1f}"]
        for name, work in [*step.items(), ("total", {"flops": flops, "bytes": moved})]
        if work["bytes"]
    ]
    parts = ("weights", "gradients", "optimizer", "buckets", "ema", "activations", "working", "peak")
    memory_rows = [
        [
            row["engine"],
            "yes" if row["checkpointing"] else "no",
            *(f"{row[part] / gib:.2f}" for part in parts),
            row["largest_micro_batch"] or "none",
            f"{row['sent_bytes'] / gib:.2f}",
        ]
        for row in found["memory"]
    ]
    run_rows = [
        [
            row["run"],
            f"{row['steps']:,}",
            f"{row['flops']:.3g}",
            f"{row['seconds_per_step']:.3g}",
            f"{row['hours']:.1f}",
            f"{row['gpu_hours']:.0f}",
            *([] if row["cost"] is None else [f"{row['cost']:.0f}"]),
        ]
        for row in found["runs"]
    ]
    sampling_rows = [
        [
            row["budget"],
            row["num_steps"],
            f"{row['flops'] / 1e12:.2f}",
            f"{row['bytes'] / 1e9:.1f}",
            f"{row['seconds']:.3g}",
        ]
        for row in found["sampling"]
    ]
    cost = [] if args.price is None else ["cost"]
    return [
        "Parameters (exact)",
        table(list(parameters), [[f"{n:,}" for n in parameters.values()]]),
        f"A training step of {args.batch_size} sequences, the mean over times and iterations (bytes estimated)",
        table(["part", "TFLOPs", "share", "GB moved"], work_rows),
        f"Memory of a GPU at the peak, GiB (estimated): {where}, micro-batch {args.micro_batch_size}",
        table(["engine", "checkpointing", *parts, "largest micro-batch", "sent per step"], memory_rows),
        f"Runs (estimated): {where}, utilisation {args.utilisation}",
        table(["run", "steps", "FLOPs", "seconds per step", "hours", "GPU hours", *cost], run_rows),
        f"A sampled sequence (estimated): one {args.hardware}, {args.dtype}, batch {args.sampling_batch_size}, "
        f"utilisation {args.utilisation}",
        table(["budget", "steps", "TFLOPs", "GB moved", "seconds"], sampling_rows),
    ]


if __name__ == "__main__":
    main()
