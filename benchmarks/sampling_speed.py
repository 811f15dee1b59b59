# SPDX-License-Identifier: Apache-2.0
"""What sampling costs: a plain procedure, this library, and the block evaluations alone, in one run.

    python benchmarks/sampling_speed.py --length 256
    python benchmarks/sampling_speed.py --device cuda --length 1024 --batch_sizes 1 8 64

*plain* is MDLM's ancestral sampler from its public description: at every step the head and a float64 Gumbel draw at
every position, for MDLM 12/0/0 and for FP 1/1/1. *ours* is `generate`. *floor* is the same P, G, injection, F and post
calls at full length, without embedding, head, draw or reuse. *frozen* is `generate(freeze=True)` in the same steps and
iterations; its own floor is the share of position-blocks that it computes: masked and newly revealed positions.

Before anything is timed, ours is shown to give the tokens of plain when plain draws by inverse CDF from the same
uniforms in float64, and plain's own draw to follow the softmax (chi-square).

A whole grid takes hours on a CPU. A configuration's time is the sum, over the steps of its plan, of the median time of
a step with that many iterations; the configurations take turns, and a whole run at the smallest budget checks the sum.
A step of *frozen* is timed with so many iterations and with some shares of active positions, the others a prompt, and
the time at a share lies on the line between the two nearest.
"""

import contextlib
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import torch
from tqdm.auto import tqdm

from fpmgm import FPMDLMConfig, FPMDLMForMaskedDiffusion, MGMGenerationConfig, plan_budget
from fpmgm.analysis.axes import new_figure, save
from fpmgm.analysis.measured import counted_flops, peak_in_subprocess
from fpmgm.command_line import parse_arguments
from fpmgm.evaluation import provenance
from fpmgm.evaluation.report import table, write_report
from fpmgm.models.budget import step_costs
from fpmgm.models.draw import draw_uniforms
from fpmgm.models.freeze import expected_shares
from fpmgm.models.ledger import Ledger
from fpmgm.models.noise import masked_probability
from fpmgm.models.reuse import reuse_states, reuse_weights, visible_fraction
from fpmgm.models.schedules import time_grid
from fpmgm.models.stacks import BlockInputs


ARCHITECTURES = {
    "mdlm": {"num_pre_layers": 12, "num_fixed_point_layers": 0, "num_post_layers": 0},
    "fp": {"num_pre_layers": 1, "num_fixed_point_layers": 1, "num_post_layers": 1},
}
RUNS = [("plain", "mdlm", "none"), ("ours", "mdlm", "none"), ("floor", "mdlm", "none"), ("plain", "fp", "none")]
RUNS += [("plain", "fp", "3sr"), ("ours", "fp", "none"), ("ours", "fp", "3sr"), ("floor", "fp", "none")]
FROZEN = [("frozen", "mdlm", "none"), ("frozen", "fp", "3sr")]
SHARES = (0.1, 0.5, 0.9)  # of active positions, at which frozen steps are timed
PROMPT = 0.75  # share of a long prompt


@dataclass
class Arguments:
    """What is measured."""

    device: Literal["cpu", "cuda"] = field(default="cpu", metadata={"help": "Where to run."})
    dtype: str = field(default="float32", metadata={"help": "Type of the weights."})
    length: int = field(default=256, metadata={"help": "Tokens of a sequence."})
    budgets: list[int] = field(default_factory=lambda: [96, 192, 384, 768], metadata={"help": "Block evaluations."})
    batch_sizes: list[int] = field(
        default_factory=lambda: [1, 8], metadata={"help": "Sequences; on a CPU, all but the first: at budget 96."}
    )
    steps: int = field(default=6, metadata={"help": "Steps timed of each configuration and repetition."})
    repetitions: int = field(default=3, metadata={"help": "Turns of each configuration."})
    hidden_size: int = field(default=768, metadata={"help": "Width; 768 is MDLM-small."})
    vocab_size: int = field(default=50258, metadata={"help": "Tokens of the vocabulary."})
    runs: list[str] = field(
        default_factory=lambda: [" ".join(run) for run in RUNS + FROZEN],
        metadata={"help": "PROCEDURE MODEL REUSE, a frozen one with its own 'ours'."},
    )
    clock: Literal["wall", "process"] = field(
        default="wall", metadata={"help": "Seconds of the clock, or, on a CPU that others use, of this process."}
    )
    measure: list[str] = field(
        default_factory=lambda: ["time", "whole", "memory", "flops"],
        metadata={
            "help": "whole: a whole run beside the sum of its steps; flops: of ours and frozen, nothing is run.",
            "choices": ["time", "whole", "memory", "flops"],
        },
    )
    output: str | None = field(
        default=None, metadata={"help": "JSON to write; null: benchmarks/results/sampling_speed_DEVICE.json."}
    )


class EnoughTimed(Exception):
    """Ends a run whose remaining steps need not be timed."""


# --- the plain procedure ------------------------------------------------------------------------------------------


def gumbel_draw(logits: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    """Tokens (B, L) from float64 probabilities and V noise values at every position."""
    logits = logits.double()
    logits[..., mask_token_id] = float("-inf")
    probabilities = logits.softmax(dim=-1)
    noise = torch.rand_like(probabilities)
    return (probabilities / (1e-10 - (noise + 1e-10).log())).argmax(dim=-1)


@torch.no_grad()
def plain(model, batch_size, length, plan, reuse, after_step=None, draw=gumbel_draw, reveals=None) -> torch.Tensor:
    """MDLM's ancestral sampler; `reveals` (T, B, L) bool replaces its random reveals."""
    mask, times, state, previous = model.config.mask_token_id, time_grid(plan.num_steps), None, None
    tokens = torch.full((batch_size, length), mask, device=model.device)
    for step in range(plan.num_steps):
        weights = None
        if state is not None:
            weights = reuse_weights(reuse_states(previous, tokens, mask), visible_fraction(tokens, mask), reuse)
        iterations = plan.iterations[step] or None
        out = model(tokens, num_iterations=iterations, fixed_point_state=state, reuse_weights=weights)
        drawn = draw(out.logits, mask)
        now, after = masked_probability(times[step]), masked_probability(times[step + 1])
        revealed = torch.rand(tokens.shape, device=tokens.device) < (now - after) / now
        revealed = revealed if reveals is None else reveals[step]
        if step == plan.num_steps - 1:
            revealed = torch.ones_like(revealed)
        previous, tokens = tokens, torch.where((tokens == mask) & revealed, drawn, tokens)
        state = out.fixed_point_state if reuse != "none" else None
        if after_step is not None:
            after_step(step)
    return tokens


def ours(model, batch_size, length, plan, reuse, after_step=None, prompt=0, **options) -> torch.Tensor:
    """`generate`; the first `prompt` positions are given."""
    input_ids = torch.full((batch_size, length), model.config.mask_token_id)
    input_ids[:, :prompt] = 1
    return model.generate(
        input_ids,
        num_steps=plan.num_steps,
        iterations=plan.iterations,
        reuse=reuse,
        seed=0,
        callback=None if after_step is None else lambda step: after_step(step.step),
        **options,
    )


@torch.no_grad()
def floor(model, batch_size, length, plan, reuse, after_step=None) -> None:
    """The block evaluations of a run, and nothing else."""
    h0 = torch.randn(batch_size, length, model.config.hidden_size, device=model.device, dtype=model.dtype)
    conditioning, rotary = model.conditioning(None, h0.device), model.rotary(h0)
    for step in range(plan.num_steps):
        h = h0
        for layer in model.pre_layers:
            h = layer(h, layer.modulation(conditioning), rotary)
        if model.fixed_point is not None:
            stack = model.fixed_point
            constant, modulations = stack.constant(h), [layer.modulation(conditioning) for layer in stack.layers]
            inputs, nothing = BlockInputs(conditioning, rotary, None, training=False), [None] * len(stack.layers)
            for _ in range(plan.iterations[step]):
                h = stack(h, constant, inputs, modulations, nothing, nothing)
        for layer in model.post_layers:
            h = layer(h, layer.modulation(conditioning), rotary)
        if after_step is not None:
            after_step(step)


def frozen(*arguments, **options) -> torch.Tensor:
    """`generate` with frozen positions."""
    return ours(*arguments, freeze=True, **options)


PROCEDURES = {"plain": plain, "ours": ours, "floor": floor, "frozen": frozen}


# --- the checks ---------------------------------------------------------------------------------------------------


def random_model(**config) -> FPMDLMForMaskedDiffusion:
    """A model with random weights everywhere, so that no block is the identity."""
    torch.manual_seed(0)
    model = FPMDLMForMaskedDiffusion(FPMDLMConfig(dropout=0.0, **config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def sizes_of(hidden_size: int, length: int, vocab_size: int) -> dict:
    """What a text model's configuration sets beside its layers."""
    return {
        "hidden_size": hidden_size,
        "intermediate_size": 4 * hidden_size,
        "num_attention_heads": max(1, hidden_size // 64),
        "max_position_embeddings": length,
        "vocab_size": vocab_size,
        "mask_token_id": vocab_size - 1,
    }


def make_model(name: str, args: Arguments) -> FPMDLMForMaskedDiffusion:
    """A random model of the sizes asked for."""
    sizes = sizes_of(args.hidden_size, args.length, args.vocab_size)
    return random_model(**ARCHITECTURES[name], **sizes).to(args.device, getattr(torch, args.dtype))


def check_same_tokens() -> int:
    """Ours equals plain token by token when plain takes our uniforms; returns the number of tokens compared."""
    compared = 0
    for name, reuse in (("mdlm", "none"), ("fp", "none"), ("fp", "full"), ("fp", "3sr")):
        sizes = {"vocab_size": 50, "mask_token_id": 49, "hidden_size": 32, "num_attention_heads": 4}
        model = random_model(**sizes, intermediate_size=64, max_position_embeddings=24, **ARCHITECTURES[name]).double()
        plan = plan_budget(model.config, 96)
        reveal_uniforms, token_uniforms = draw_uniforms(2, torch.ones(4, 24, dtype=torch.bool), seed=0)
        bounds = masked_probability(time_grid(plan.num_steps)) / masked_probability(torch.tensor(1.0))
        reveals = [(reveal_uniforms >= after) & (reveal_uniforms < now) for now, after in itertools.pairwise(bounds)]

        def inverse_draw(logits, mask, uniforms=token_uniforms):
            logits[..., mask] = float("-inf")
            cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
            return (cumulative <= uniforms[..., None]).sum(dim=-1).clamp(max=mask - 1)

        expected = plain(model, 4, 24, plan, reuse, draw=inverse_draw, reveals=reveals)
        got = ours(model, 4, 24, plan, reuse)
        if not torch.equal(expected, got):
            raise RuntimeError(f"{name}, reuse={reuse}: {(expected != got).sum()} tokens differ from the plain ones")
        compared += got.numel()
    return compared


def check_gumbel_draw(samples: int = 20000) -> float:
    """Chi-square of plain's own draw from known logits, of nine tokens and a mask."""
    logits = torch.randn(10, generator=torch.Generator().manual_seed(0))
    expected = samples * logits[:9].double().softmax(dim=-1)
    counts = torch.bincount(gumbel_draw(logits.repeat(1, samples, 1), mask_token_id=9).flatten(), minlength=9)
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    if chi_square > 26.1:  # 8 degrees of freedom, p = 0.001
        raise RuntimeError(f"plain's draw: chi-square {chi_square:.1f} exceeds 26.1")
    return round(chi_square, 2)


# --- the measurement ----------------------------------------------------------------------------------------------


def now(device: str, clock: str = "wall") -> float:
    """Seconds, after the device has finished."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.process_time() if clock == "process" else time.perf_counter()


def time_steps(run, model, batch_size, length, plan, reuse, steps, seconds) -> dict[int, list[float]]:
    """Seconds of `steps` steps by their number of iterations; the first step, which is special, is left out."""
    times, last = defaultdict(list), [None]

    def after_step(step):
        clock = seconds()
        if last[0] is not None:
            times[plan.iterations[step]].append(clock - last[0])
        if step >= steps:
            raise EnoughTimed
        last[0] = seconds()

    with contextlib.suppress(EnoughTimed):
        run(model, batch_size, length, plan, reuse, after_step)
    return times


def short_plan(plan, steps: int):
    """A plan whose first step is dropped from timing and whose next ones run through the mix of its iterations."""
    count = min(steps, plan.num_steps)
    chosen = [plan.iterations[round(i * (plan.num_steps - 1) / max(count - 1, 1))] for i in range(count)]
    return type(plan)(plan.num_steps, (chosen[:1] + chosen + plan.iterations)[: max(plan.num_steps, count + 1)], 0)


def step_seconds(times: dict[int, list[float]], iterations: int) -> float:
    """The time of a step with that many iterations, from a line through the medians."""
    medians = {n: statistics.median(values) for n, values in times.items()}
    low, high = min(medians), max(medians)
    slope = 0.0 if low == high else (medians[high] - medians[low]) / (high - low)
    return medians.get(iterations, medians[low] + slope * (iterations - low))


def planned_seconds(times: dict[int, list[float]], plan) -> float:
    """Sum over the plan's steps of the time of a step with that many iterations."""
    return sum(step_seconds(times, n) for n in plan.iterations)


def time_frozen_steps(model, batch_size, plan, reuse, args, seconds) -> dict[float, dict[int, list[float]]]:
    """Seconds of steps by their share of active positions, then by their number of iterations.

    At each step about as many positions are revealed as in the plan.
    """
    found = {}
    for share in SHARES:
        found[share] = defaultdict(list)
        num_steps = max(args.steps + 2, round(share * plan.num_steps))
        for iterations in {min(plan.iterations), max(plan.iterations)}:
            part = type(plan)(num_steps, [iterations] * num_steps, 0)
            run = partial(frozen, prompt=args.length - round(share * args.length))
            got = time_steps(run, model, batch_size, args.length, part, reuse, args.steps, seconds)
            found[share][iterations] += got[iterations]
    return found


def frozen_seconds(frozen_times, times, plan, shares: list[float]) -> float:
    """Sum over the plan's steps, in which these `shares` of positions are active; all of them: as without freezing."""
    total = 0.0
    for iterations, share in zip(plan.iterations, shares, strict=True):
        if share == 1:
            total += step_seconds(times, iterations)
            continue
        low, high = SHARES[:2] if share < SHARES[1] else SHARES[-2:]
        at_low, at_high = (step_seconds(frozen_times[x], iterations) for x in (low, high))
        total += at_low + (at_high - at_low) * (share - low) / (high - low)
    return total


def expected_work(model, plan, length: int, prompt: float = 0.0) -> tuple[list[float], float]:
    """The share of active positions at each step where this share of them is a frozen prompt, and over all blocks."""
    expected = expected_shares(MGMGenerationConfig(freeze=True), model.orders, length)(plan.num_steps)
    shares, costs = [1.0, *(share * (1 - prompt) for share in expected[1:])], step_costs(model.config, plan.iterations)
    return shares, sum(x * cost for x, cost in zip(shares, costs, strict=True)) / sum(costs)


def frozen_rows(models, plans, batch_size, times, args, seconds) -> list[dict]:
    """A row for each frozen run, with a prompt and without one."""
    rows = []
    for run in chosen(FROZEN, args):
        _, name, reuse = run
        model, plan = models[name], plans[name]
        frozen_times = time_frozen_steps(model, batch_size, plan, reuse, args, seconds)
        for prompt in (0.0, PROMPT):
            shares, active = expected_work(model, plan, args.length, prompt)
            rows.append({
                "procedure": "frozen, long prompt" if prompt else "frozen", "model": name, "reuse": reuse,
                "batch_size": batch_size, "num_steps": plan.num_steps, "block_evaluations": plan.block_evaluations,
                "seconds": frozen_seconds(frozen_times, times["ours", name, reuse], plan, shares),
                "active": active,
                "step_seconds": {share: dict(values) for share, values in frozen_times.items()},
            })  # fmt: skip
    return rows


def counted_runs(args: Arguments) -> list[dict]:
    """FLOPs of whole runs of `generate` as it is, with frozen positions, and with a long prompt that is frozen.

    Counted on the meta device, where tensors have shapes alone.
    """
    found, sizes = [], sizes_of(args.hidden_size, args.length, args.vocab_size)
    for (_, name, reuse), budget in itertools.product(chosen(FROZEN, args), args.budgets):
        with torch.device("meta"):
            model = FPMDLMForMaskedDiffusion(FPMDLMConfig(**ARCHITECTURES[name], **sizes)).eval()
        plan, flops = plan_budget(model.config, budget), {}
        for run, prompt in ((ours, 0), (frozen, 0), (frozen, int(PROMPT * args.length))):
            call = partial(run, model, args.batch_sizes[0], args.length, plan, reuse, prompt=prompt)
            with patch.object(Ledger, "close", lambda ledger, tokens, lengths: tokens):  # it asks for values
                flops[f"{run.__name__}, long prompt" if prompt else run.__name__] = counted_flops(call)
        found.append({
            "run": f"{name} {reuse}", "budget": budget, "num_steps": plan.num_steps, "flops": flops,
            "frozen / ours": flops["frozen"] / flops["ours"],
            "its floor, active positions": expected_work(model, plan, args.length)[1],
            "frozen, long prompt / ours": flops["frozen, long prompt"] / flops["ours"],
        })  # fmt: skip
    return found


def chosen(runs: list[tuple], args: Arguments) -> list[tuple]:
    """Those of the runs that are asked for."""
    return [run for run in runs if " ".join(run) in args.runs]


def measure(args: Arguments) -> dict:
    """Seconds of every configuration."""
    models = {name: make_model(name, args) for name in ARCHITECTURES}
    rows, seconds, runs = [], partial(now, args.device, args.clock), chosen(RUNS, args)
    grid = [(b, budget) for b in args.batch_sizes for budget in (args.budgets if b == args.batch_sizes[0] else [96])]
    if args.device == "cuda":
        grid = list(itertools.product(args.batch_sizes, args.budgets))
    for batch_size, budget in tqdm(grid, desc="configurations"):
        plans = {name: plan_budget(model.config, budget) for name, model in models.items()}
        times = {run: defaultdict(list) for run in runs}
        for _ in range(args.repetitions):  # the configurations take turns
            for run in runs:
                procedure, name, reuse = run
                plan = short_plan(plans[name], args.steps)
                got = time_steps(
                    PROCEDURES[procedure], models[name], batch_size, args.length, plan, reuse, args.steps, seconds
                )
                for iterations, values in got.items():
                    times[run][iterations] += values
        for run in runs:
            procedure, name, reuse = run
            rows.append({
                "procedure": procedure, "model": name, "reuse": reuse, "batch_size": batch_size, "budget": budget,
                "num_steps": plans[name].num_steps,
                "block_evaluations": plans[name].block_evaluations,
                "seconds": planned_seconds(times[run], plans[name]),
                "step_seconds": {n: sorted(values) for n, values in sorted(times[run].items())},
            })  # fmt: skip
        rows += [row | {"budget": budget} for row in frozen_rows(models, plans, batch_size, times, args, seconds)]
    return {"rows": rows} | ({"whole_run": whole_run(args, models, rows)} if "whole" in args.measure else {})


def whole_run(args: Arguments, models, rows) -> list[dict]:
    """One whole run of each procedure at the smallest budget beside the sum of its steps."""
    checks = []
    for run in chosen(RUNS + FROZEN, args):
        procedure, name, reuse = run
        plan = plan_budget(models[name].config, min(args.budgets))
        start = now(args.device, args.clock)
        PROCEDURES[procedure](models[name], args.batch_sizes[0], args.length, plan, reuse)
        seconds = now(args.device, args.clock) - start
        planned = next(r["seconds"] for r in rows if (r["procedure"], r["model"], r["reuse"]) == run)
        checks.append({"run": " ".join(run), "seconds": seconds, "sum_of_steps": planned, "ratio": seconds / planned})
    return checks


def first_steps(procedure: str, name: str, reuse: str, batch_size: int, args: Arguments) -> Callable[[], None]:
    """What runs the first three steps of a procedure, its model made."""
    model = make_model(name, args)
    plan = plan_budget(model.config, 96)

    def after_step(step: int) -> None:
        if step == 2:
            raise EnoughTimed

    def run() -> None:
        with contextlib.suppress(EnoughTimed):
            PROCEDURES[procedure](model, batch_size, args.length, plan, reuse, after_step)

    return run


def peak_memory(args: Arguments) -> list[dict]:
    """MiB that the first steps take above the weights, each in a process of its own."""
    batch_size, found = args.batch_sizes[-1], []
    for run in (("plain", "mdlm", "none"), ("ours", "mdlm", "none"), ("ours", "fp", "3sr")):
        peak = peak_in_subprocess(partial(first_steps, *run, batch_size, args), args.device)
        found.append({"run": " ".join(run), "batch_size": batch_size, "length": args.length})
        found[-1]["above_weights_mib"] = round(peak / 2**20, 1)
    return found


# --- the report ---------------------------------------------------------------------------------------------------


def ratios(rows: list[dict]) -> list[dict]:
    """The ratios that matter at each batch size and budget."""
    found = []
    keys = sorted({(r["batch_size"], r["budget"]) for r in rows})
    for batch_size, budget in keys:
        t = {
            (r["procedure"], r["model"], r["reuse"]): r
            for r in rows
            if (r["batch_size"], r["budget"]) == (batch_size, budget)
        }
        line = {"batch_size": batch_size, "budget": budget}
        for title, (above, below) in RATIOS.items():
            if above in t and below in t:
                line[title] = t[above]["seconds"] / t[below]["seconds"]
                if "active" in t[above] and below[0] == "ours":
                    line[f"{title}: its floor, active positions"] = t[above]["active"]
        found.append(line)
    return found


OURS = {"mdlm": ("ours", "mdlm", "none"), "fp": ("ours", "fp", "3sr")}
RATIOS = {
    "ours FP 3sr / plain MDLM": (OURS["fp"], ("plain", "mdlm", "none")),
    "ours FP 3sr / its blocks": (OURS["fp"], ("floor", "fp", "none")),
    "ours MDLM / plain MDLM": (OURS["mdlm"], ("plain", "mdlm", "none")),
    "ours MDLM / its blocks": (OURS["mdlm"], ("floor", "mdlm", "none")),
    "ours FP 3sr / ours FP none": (OURS["fp"], ("ours", "fp", "none")),
    "plain FP 3sr / plain MDLM": (("plain", "fp", "3sr"), ("plain", "mdlm", "none")),
    "frozen FP 3sr / ours FP 3sr": (("frozen", "fp", "3sr"), OURS["fp"]),
    "frozen MDLM / ours MDLM": (("frozen", "mdlm", "none"), OURS["mdlm"]),
    "frozen FP 3sr, long prompt / ours": (("frozen, long prompt", "fp", "3sr"), OURS["fp"]),
    "frozen MDLM, long prompt / ours": (("frozen, long prompt", "mdlm", "none"), OURS["mdlm"]),
    "frozen FP 3sr / plain MDLM": (("frozen", "fp", "3sr"), ("plain", "mdlm", "none")),
}


def markdown(result: dict) -> str:
    """A line for each ratio, a column for each batch size and budget."""
    columns = [f"batch {row['batch_size']}, budget {row['budget']}" for row in result["ratios"]]
    names = [name for name in result["ratios"][0] if name not in ("batch_size", "budget")]
    return table(["seconds", *columns], [[name, *(f"{row[name]:.2f}" for row in result["ratios"])] for name in names])


def draw(result: dict, path: Path) -> None:
    """Seconds per sequence against the budget, one line for each procedure."""
    names = {
        ("plain", "mdlm", "none"): ("MDLM, plain procedure", "#8d99ae", "--"),
        ("plain", "fp", "3sr"): ("FP-MDLM 3sr, plain procedure", "#d08c60", "--"),
        ("ours", "mdlm", "none"): ("MDLM, fpmgm", "#2b4570", "-"),
        ("ours", "fp", "3sr"): ("FP-MDLM 3sr, fpmgm", "#c8553d", "-"),
        ("frozen", "fp", "3sr"): ("FP-MDLM 3sr, fpmgm, frozen positions", "#588157", "-"),
        ("floor", "fp", "none"): ("FP-MDLM, block evaluations alone", "#000000", ":"),
    }
    first = min(r["batch_size"] for r in result["rows"])
    figure = new_figure(6.4, 4.2)
    axes = figure.add_subplot(xscale="log", yscale="log")
    for run, (label, color, line) in names.items():
        points = sorted(
            (r["budget"], r["seconds"] / first)
            for r in result["rows"]
            if (r["procedure"], r["model"], r["reuse"]) == run and r["batch_size"] == first
        )
        if points:
            axes.plot(*zip(*points, strict=True), line, color=color, marker="o", markersize=4, label=label)
    budgets = sorted({r["budget"] for r in result["rows"]})
    axes.set_xticks(budgets, [str(b) for b in budgets])
    axes.minorticks_off()
    arguments = result["arguments"]
    axes.set_xlabel("budget (block evaluations per sequence)")
    axes.set_ylabel("seconds per sequence")
    axes.set_title(
        f"{result['provenance']['device']}\nL = {arguments['length']}, batch {first}, vocabulary "
        f"{arguments['vocab_size']:,}",
        fontsize=10,
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save(figure, path, dpi=160)


def main() -> None:
    """Check, measure, write JSON, table and picture."""
    (args,) = parse_arguments((Arguments,), __doc__)
    result = {
        "provenance": provenance(args.device),
        "arguments": asdict(args),
    }
    if "time" in args.measure:
        result |= {"tokens_equal_to_plain": check_same_tokens(), "chi_square_8_degrees": check_gumbel_draw()}
    path = Path(args.output or f"benchmarks/results/sampling_speed_{args.device}.json")
    text = None
    if "time" in args.measure:
        result |= measure(args)
        result["ratios"] = ratios(result["rows"])
        text = markdown(result)
    if "memory" in args.measure:
        result["peak_memory"] = peak_memory(args)
    if "flops" in args.measure:
        result["flops"] = counted_runs(args)
    write_report(path, result, text)
    if text is not None:
        draw(result, path.with_suffix(".png"))
        print(text)
    print(*result.get("peak_memory", []), *result.get("flops", []), sep="\n")


if __name__ == "__main__":
    main()
