# SPDX-License-Identifier: Apache-2.0
"""What a training step costs: a plain procedure and this library's trainers, in one run, taking turns.

    python benchmarks/training_cost.py
    python benchmarks/training_cost.py --device cuda  # at the paper's sizes, in bfloat16

*plain* is an MDLM step from its public description, on this library's blocks: the head at every position, a dense
log-softmax over all logits, the loss picked from it. *ours* are the trainers' own steps. Both are timed from the
uncorrupted batch to the gradients; the optimizer's step is timed on its own. A fixed-point step is the mean over the
iterations that SJFB draws: 2 without gradient, and 4 or 5 with it in turn. *checkpointed* runs each block, and each
iteration, a second time in the backward pass, *3 kept* those iterations that come before the last three.

The floor beside a time ratio is the ratio of the two steps' FLOPs, as PyTorch counts them: a floor where both use the
machine equally well. Utilisation is a step's FLOPs per second over those of a large matrix product, measured in the
same run. Peak memory is what PyTorch's allocator gives a process that makes a whole step with AdamW, weights and
optimizer included, with the most iterations that SJFB draws: 6 with gradient.
"""

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from datasets import Dataset
from tqdm.auto import tqdm

from fpmgm import (
    FPMaskGITConfig,
    FPMaskGITModel,
    FPMDLMConfig,
    FPMDLMForMaskedDiffusion,
    convert_to_fixed_point,
)
from fpmgm.analysis.axes import new_figure, save
from fpmgm.analysis.measured import counted_flops, peak_in_subprocess
from fpmgm.command_line import parse_arguments
from fpmgm.evaluation import provenance
from fpmgm.evaluation.report import table, write_report
from fpmgm.models.noise import arccos_ratio, loss_weight, mask_tokens, masked_probability
from fpmgm.models.transfer import to_device
from fpmgm.trainers import (
    ConsistencyConfig,
    ConsistencyTrainer,
    ConversionConfig,
    ConversionTrainer,
    MGMTrainer,
    MGMTrainingConfig,
)
from fpmgm.trainers.batch import Noise
from sampling_speed import now, sizes_of


MDLM = {"num_pre_layers": 12, "num_fixed_point_layers": 0, "num_post_layers": 0}
FP = {"num_pre_layers": 1, "num_fixed_point_layers": 1, "num_post_layers": 1}
IMAGE = {"num_pre_layers": 4, "num_fixed_point_layers": 1, "num_post_layers": 4}
ITERATIONS = ((2, 4), (2, 5))  # without and with gradient; their mean is SJFB's
KEPT = {"num_kept_iterations": 3}
QUIET = {"output_dir": tempfile.gettempdir(), "report_to": "none", "save_strategy": "no", "disable_tqdm": True}

STEPS = {  # architecture, kind, injection, further arguments of the trainer
    "plain MDLM": (MDLM, "plain", None, {}),
    "MDLM": (MDLM, "base", None, {}),
    "FP-MDLM mlp": (FP, "base", "mlp", {}),
    "FP-MDLM mlp, 3 kept": (FP, "base", "mlp", KEPT),
    "FP-MDLM mlp, checkpointed": (FP, "checkpointed", "mlp", {}),
    "FP-MDLM linear": (FP, "base", "linear", {}),
    "FP-MDLM diagonal": (FP, "base", "diagonal", {}),
    "consistency mlp": (FP, "consistency", "mlp", {}),
    "consistency diagonal": (FP, "consistency", "diagonal", {}),
    "conversion mlp": (FP, "conversion", "mlp", {}),
    "MaskGIT-24": ({**MDLM, "num_pre_layers": 24}, "image", None, {}),
    "MaskGIT-12": (MDLM, "image", None, {}),
    "FP-MaskGIT mlp": (IMAGE, "image", "mlp", {}),
    "FP-MaskGIT mlp, 3 kept": (IMAGE, "image", "mlp", KEPT),
    "FP-MaskGIT diagonal": (IMAGE, "image", "diagonal", {}),
}
SIZES = {  # what is not given; the sizes of `cuda` are the paper's
    "cpu": {"dtype": "float32", "length": 256, "batch_size": 4, "image_hidden_size": 512},
    "cuda": {"dtype": "bfloat16", "length": 1024, "batch_size": 64, "image_hidden_size": 1024},
}
RATIOS = [
    ("FP-MDLM mlp", "plain MDLM"),
    ("FP-MDLM diagonal", "plain MDLM"),
    ("FP-MDLM mlp", "MDLM"),
    ("FP-MDLM diagonal", "MDLM"),
    ("MDLM", "plain MDLM"),
    ("FP-MDLM mlp, 3 kept", "FP-MDLM mlp"),
    ("FP-MDLM mlp, 3 kept", "plain MDLM"),
    ("FP-MDLM mlp, checkpointed", "FP-MDLM mlp"),
    ("FP-MDLM mlp, checkpointed", "plain MDLM"),
    ("consistency mlp", "FP-MDLM mlp"),
    ("consistency diagonal", "FP-MDLM diagonal"),
    ("conversion mlp", "FP-MDLM mlp"),
    ("FP-MaskGIT mlp", "MaskGIT-24"),
    ("FP-MaskGIT diagonal", "MaskGIT-24"),
    ("FP-MaskGIT mlp, 3 kept", "FP-MaskGIT mlp"),
    ("FP-MaskGIT mlp, 3 kept", "MaskGIT-24"),
    ("MaskGIT-12", "MaskGIT-24"),
]


@dataclass
class Arguments:
    """What is measured, on which sizes."""

    device: Literal["cpu", "cuda"] = field(default="cpu", metadata={"help": "Where to run."})
    dtype: str | None = field(
        default=None,
        metadata={"help": "bfloat16: autocast; null: by device.", "choices": ["float32", "bfloat16"]},
    )
    length: int | None = field(default=None, metadata={"help": "Tokens of a sequence; null: 256, with cuda 1024."})
    batch_size: int | None = field(default=None, metadata={"help": "Sequences; null: 4, with cuda 64."})
    hidden_size: int = field(default=768, metadata={"help": "Width of text models; 768 is MDLM-small."})
    vocab_size: int = field(default=50258, metadata={"help": "Tokens of the vocabulary."})
    image_hidden_size: int | None = field(
        default=None, metadata={"help": "Width of image models; null: 512, with cuda 1024, MaskGIT-Large."}
    )
    repetitions: int = field(default=5, metadata={"help": "Turns of each step."})
    memory_only: bool = field(default=False, metadata={"help": "Peak memory alone: nothing is timed or drawn."})
    steps: list[str] = field(
        default_factory=lambda: list(STEPS), metadata={"help": "Which to measure.", "choices": list(STEPS)}
    )
    output: str | None = field(
        default=None, metadata={"help": "JSON to write; null: benchmarks/results/training_cost_DEVICE.json."}
    )

    def __post_init__(self):
        for name, value in SIZES[self.device].items():
            if getattr(self, name) is None:
                setattr(self, name, value)


# --- the steps ----------------------------------------------------------------------------------------------------


class PlainTrainer:
    """An MDLM step from its public description: everything at every position."""

    def __init__(self, model):
        self.model = model

    def micro_batch_loss(self, model, inputs, noise):
        """The negative ELBO by a dense log-softmax."""
        input_ids, t, config = inputs["input_ids"], to_device(noise.t, model.device), model.config
        masked = to_device(noise.uniforms, model.device) < masked_probability(t)[:, None]
        noisy, _ = mask_tokens(input_ids, masked, config.mask_token_id)
        logits = model(noisy).logits.float()  # (B, L, V)
        logits[:, :, config.mask_token_id] += -1e6
        log_probabilities = logits.log_softmax(dim=-1)
        log_likelihood = log_probabilities.gather(-1, input_ids[:, :, None]).squeeze(-1)  # (B, L)
        loss = -(loss_weight(t)[:, None] * torch.where(masked, log_likelihood, 0)).sum() / input_ids.numel()
        return loss, None


def make_trainer(name: str, args: Arguments):
    """The trainer of a step, with its model on the device in training mode."""
    architecture, kind, injection, further = STEPS[name]
    torch.manual_seed(0)
    options = {"input_injection": injection} if injection else {}
    shared = {**QUIET, **further, "use_cpu": args.device == "cpu"}
    if kind == "image":
        width = args.image_hidden_size
        sizes = {"hidden_size": width, "intermediate_size": 11 * width // 4, "num_attention_heads": width // 64}
        model = FPMaskGITModel(FPMaskGITConfig(**sizes, **architecture, **options)).to(args.device).train()
        row = Dataset.from_dict({"input_ids": [[0] * 256], "class_labels": [0]})
        return MGMTrainer(model, MGMTrainingConfig(**shared), train_dataset=row)
    sizes = sizes_of(args.hidden_size, args.length, args.vocab_size)
    model = FPMDLMForMaskedDiffusion(FPMDLMConfig(**sizes, **architecture, **options)).to(args.device).train()
    if kind == "plain":
        return PlainTrainer(model)
    row = Dataset.from_dict({"input_ids": [[0] * args.length]})
    if kind == "checkpointed":
        name = "activation_checkpointing_enable"  # of older transformers: gradient_checkpointing_enable
        getattr(model, name, model.gradient_checkpointing_enable)()
    if kind in ("base", "checkpointed"):
        return MGMTrainer(model, MGMTrainingConfig(**shared), train_dataset=row)
    if kind == "consistency":
        return ConsistencyTrainer(
            model, ConsistencyConfig(**shared, stop_at_perplexity_increase=None), train_dataset=row
        )
    teacher = FPMDLMForMaskedDiffusion(FPMDLMConfig(**sizes, **MDLM)).to(args.device)
    student = convert_to_fixed_point(teacher, input_injection=injection).train()
    return ConversionTrainer(student, ConversionConfig(**shared), teacher=teacher, train_dataset=row)


def step(trainer, args: Arguments, seed: int, iterations: tuple[int, int]) -> None:
    """From an uncorrupted batch of random tokens to gradients."""
    generator, config = torch.Generator().manual_seed(seed), trainer.model.config
    shape = (args.batch_size, config.max_position_embeddings)
    inputs = {"input_ids": to_device(torch.randint(config.vocab_size - 1, shape, generator=generator), args.device)}
    places = torch.arange(args.batch_size)
    t = (places + 0.5) / args.batch_size
    if config.model_type == "fpmaskgit":
        t = arccos_ratio(t)
        inputs["class_labels"] = to_device(places % config.num_classes, args.device)
    drawn = {}
    if config.num_fixed_point_layers:
        drawn = dict(zip(("num_no_grad_iterations", "num_iterations"), iterations, strict=True))
        drawn["num_kept_iterations"] = trainer.args.num_kept_iterations
    noise = Noise(
        key=(seed,),
        places=places,
        t=t,
        uniforms=torch.rand(shape, generator=generator),
        iterations=drawn,
        num_items=args.batch_size * shape[1],
        num_sequences=args.batch_size,
    )
    with torch.autocast(args.device, dtype=torch.bfloat16, enabled=args.dtype == "bfloat16"):
        loss, _ = trainer.micro_batch_loss(trainer.model, inputs, noise)
    loss.backward()
    trainer.model.zero_grad()


# --- measurements -------------------------------------------------------------------------------------------------


def matmul_ceiling(args: Arguments) -> float:
    """FLOP/s of the MLP's product at this number of tokens, the best of several."""
    dtype = torch.bfloat16 if args.dtype == "bfloat16" else torch.float32
    tokens, size = args.batch_size * args.length, args.hidden_size
    x, w = (torch.randn(n, m, device=args.device, dtype=dtype) for n, m in ((tokens, size), (size, 4 * size)))
    times = []
    for _ in range(20):
        start = now(args.device)
        x @ w
        times.append(now(args.device) - start)
    return 2 * tokens * size * 4 * size / min(times)


def measure(args: Arguments) -> dict[str, dict]:
    """Seconds, FLOPs and tokens per second of every step; the steps take turns."""
    trainers = {name: make_trainer(name, args) for name in args.steps}
    flops = {name: [] for name in trainers}
    for name, trainer in trainers.items():
        for iterations in ITERATIONS:
            flops[name].append(counted_flops(partial(step, trainer, args, 0, iterations)))  # which is not timed
    rows, ceiling = timed_steps(trainers, args, partial(now, args.device)), matmul_ceiling(args)
    for name, row in rows.items():
        seconds, work = row["seconds"], statistics.mean(flops[name])
        row |= {
            "optimizer_seconds": optimizer_seconds(trainers[name].model, args.device),
            "tokens_per_second": args.batch_size * trainers[name].model.config.max_position_embeddings / seconds,
            "flops": work,
            "utilisation": work / seconds / ceiling,
            "parameters": trainers[name].model.num_parameters(),
        }
    return {"rows": rows, "matmul_flops_per_second": ceiling}


def timed_steps(trainers: dict, args: Arguments, seconds: Callable[[], float]) -> dict[str, dict[str, float]]:
    """Median, least and most `seconds` of a step of each trainer, which take turns; means over the iterations."""
    times = {name: {n: [] for n in ITERATIONS} for name in trainers}
    for repetition in tqdm(range(args.repetitions), desc="repetitions"):
        for name, trainer in trainers.items():
            for iterations in ITERATIONS:
                start = seconds()
                step(trainer, args, repetition, iterations)
                times[name][iterations].append(seconds() - start)
    columns = {"seconds": statistics.median, "fastest": min, "slowest": max}
    return {
        name: {column: statistics.mean(map(pick, by_iterations.values())) for column, pick in columns.items()}
        for name, by_iterations in times.items()
    }


def optimizer_seconds(model, device: str) -> float:
    """Median time of AdamW's fused step."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    make_zero_gradients(model)
    times = []
    for _ in range(3):
        start = now(device)
        optimizer.step()
        times.append(now(device) - start)
    model.zero_grad()
    return statistics.median(times)


def make_zero_gradients(model) -> None:
    """Gradients for an optimizer's step that changes little."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)


def whole_step(name: str, args: Arguments) -> None:
    """A model, and a step of its trainer with AdamW, whose states are there from the start."""
    trainer = make_trainer(name, args)
    optimizer = torch.optim.AdamW(trainer.model.parameters(), fused=True)
    make_zero_gradients(trainer.model)
    optimizer.step()
    optimizer.zero_grad()
    trainer.model.zero_grad = lambda: None
    step(trainer, args, 0, (2, trainer.model.config.grad_iterations[1]))
    optimizer.step()


def peak_memory(args: Arguments) -> dict[str, float]:
    """MiB of each step with its model, in a process of its own."""
    return {
        name: round(peak_in_subprocess(partial(partial, whole_step, name, args), args.device) / 2**20, 1)
        for name in tqdm(args.steps, desc="peak memory")
    }


# --- the report ---------------------------------------------------------------------------------------------------


def ratios(result: dict) -> list[dict]:
    """What is asked of the library, beside the FLOPs of it."""
    memory = result["peak_memory_mib"]
    columns = {"peak memory": memory}
    if "rows" in result:
        columns = {
            "time": {name: row["seconds"] for name, row in result["rows"].items()},
            "FLOPs": {name: row["flops"] for name, row in result["rows"].items()},
            **columns,
        }
    return [
        {"step": f"{ours} / {other}", **{title: values[ours] / values[other] for title, values in columns.items()}}
        for ours, other in RATIOS
        if ours in memory and other in memory
    ]


def markdown(result: dict) -> str:
    """Both tables."""
    peaks = {name: f"{peak:.0f}" for name, peak in result["peak_memory_mib"].items()}
    if "rows" in result:
        columns = ["step", "seconds", "tokens/s", "TFLOPs", "utilisation", "optimizer, seconds", "peak memory, MiB"]
        cells = [
            [name, f"{row['seconds']:.3g}", f"{row['tokens_per_second']:.0f}", f"{row['flops'] / 1e12:.3g}",
             f"{row['utilisation']:.2f}", f"{row['optimizer_seconds']:.2g}", peaks[name]]
            for name, row in result["rows"].items()
        ]  # fmt: skip
        titles = ["ratio", "time", "FLOPs (floor)", "peak memory"]
    else:
        columns, cells, titles = ["step", "peak memory, MiB"], peaks.items(), ["ratio", "peak memory"]
    ratios = [[v if title == "step" else f"{v:.2f}" for title, v in row.items()] for row in result["ratios"]]
    return f"{table(columns, cells)}\n\n{table(titles, ratios)}"


def draw(result: dict, path: Path) -> None:
    """Time, FLOPs and memory of each step relative to those of the first step of its kind."""
    rows, names = result["rows"], list(result["rows"])
    bases = [next(other for other in names if is_image(other) == is_image(name)) for name in names]

    def relative(values: dict[str, float]) -> list[float]:
        return [values[name] / values[base] for name, base in zip(names, bases, strict=True)]

    seconds, flops = ({name: row[column] for name, row in rows.items()} for column in ("seconds", "flops"))
    figure = new_figure(9, 3.8)
    left, right = figure.subplots(1, 2, sharey=True)
    panels = ((left, "time", seconds, "#2b4570"), (right, "peak memory", result["peak_memory_mib"], "#8d99ae"))
    for panel, title, values, color in panels:
        bars = panel.barh(names, relative(values), color=color)
        panel.bar_label(bars, fmt="%.2f", label_type="center", color="white", fontsize=8)
        panel.set_title(title, fontsize=10)
    left.scatter(relative(flops), names, color="#c8553d", zorder=3, marker="|", s=160, label="FLOPs")
    left.legend(loc="lower right")
    left.invert_yaxis()
    arguments = result["arguments"]
    figure.supxlabel(f"relative to {' or '.join(dict.fromkeys(bases))}", fontsize=10)
    figure.suptitle(
        f"{result['provenance']['device']}\n{arguments['dtype']}, batch {arguments['batch_size']}; text of width "
        f"{arguments['hidden_size']}, L = {arguments['length']}, vocabulary {arguments['vocab_size']:,}; "
        f"images of width {arguments['image_hidden_size']}",
        fontsize=10,
    )
    save(figure, path, dpi=140)


def is_image(name: str) -> bool:
    """Whether a step is one of an image model."""
    return STEPS[name][1] == "image"


def main() -> None:
    """Measure, write JSON, table and picture."""
    (args,) = parse_arguments((Arguments,), __doc__)
    # Memory first: the processes that measure it need the GPU's to themselves.
    peaks = peak_memory(args)
    result = {"provenance": provenance(args.device), "arguments": asdict(args), "peak_memory_mib": peaks}
    if not args.memory_only:
        result |= measure(args)
    result["ratios"] = ratios(result)
    path = Path(args.output or f"benchmarks/results/training_cost_{args.device}.json")
    write_report(path, result, markdown(result))
    if "rows" in result:
        draw(result, path.with_suffix(".png"))
    print(markdown(result))


if __name__ == "__main__":
    main()
