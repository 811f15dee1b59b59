# SPDX-License-Identifier: Apache-2.0
"""The paper's sweeps over sampling, one command each:

    python recipes/sweep.py plans --model outputs/cofre          # steps against iterations (Figure 13)
    python recipes/sweep.py allocations --model outputs/cofre    # iterations over steps (Table 22, Figure 14)
    python recipes/sweep.py gammas --model outputs/cofre         # γ of three-state reuse (Tables 4, 5); --write True
    python recipes/sweep.py checkpoints --model outputs/cofre    # over post-training (Figure 12)
    python recipes/sweep.py latency --model outputs/mdlm outputs/cofre    # against seconds (Table 23, Figure 15)

Each writes NAME.json (rows with protocols, provenance), NAME.md and NAME.png to `output_dir`, and goes on where it was
interrupted. `--judge_text_files my_text.txt` takes a 4-gram model of that text as the judge: cheap, for small models.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from accelerate import PartialState
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import fpmgm  # noqa: F401  (registers the models)
from fpmgm.analysis import plot_allocations, plot_checkpoints, plot_gammas, plot_latency, plot_plans
from fpmgm.command_line import LocalPath, ModelName, parse_arguments
from fpmgm.evaluation import (
    compare_values,
    evaluate_budgets,
    grid,
    measure_latency,
    plus_minus,
    pool_settings,
    provenance,
    sweep,
)
from fpmgm.evaluation.report import short_names, table, write_report
from fpmgm.evaluation.store import fingerprint
from fpmgm.models.budget import ALLOCATIONS, explicit_plan
from fpmgm.models.reuse import REUSES
from fpmgm.trainers.checkpoints import checkpoint_step, missing_files
from fpmgm.trainers.ema import EMA_FILE
from judged_samples import (
    JudgedSamplesArguments,
    check_settings,
    device_of,
    markdown,
    measure_text,
    open_judge,
    open_model,
    rows_table,
    shown_perplexity,
)


BUDGETS = [96, 192, 384, 768]  # the paper's


@dataclass(kw_only=True)
class SweepArguments(JudgedSamplesArguments):
    """What all sweeps share."""

    num_samples: int = field(default=256, metadata={"help": "Texts per row."})
    text_files: list[LocalPath] | None = field(default=None, metadata={"help": "Human text to score like samples."})

    @property
    def models(self) -> list[str]:
        """Folders or hub names whose tokenizer the judge may need."""
        return self.model if isinstance(self.model, list) else [self.model]


@dataclass(kw_only=True)
class PlansArguments(SweepArguments):
    """Denoising steps against fixed-point iterations."""

    model: ModelName = field(metadata={"help": "Folder or hub name."})
    num_steps: list[int] = field(default_factory=lambda: [8, 16, 32, 64, 128], metadata={"help": "Denoising steps."})
    iterations: list[int] = field(default_factory=lambda: [1, 2, 4, 6, 8], metadata={"help": "Of every step."})
    reuse: str = field(default="3sr", metadata={"help": "none, full, 3sr."})
    budgets: list[int] = field(default_factory=lambda: BUDGETS, metadata={"help": "Lines of equal budget to draw."})
    max_budget: int | None = field(
        default=None, metadata={"help": "Cells that cost more block evaluations stay blank; null: none."}
    )


@dataclass(kw_only=True)
class AllocationsArguments(SweepArguments):
    """Allocations of iterations over steps."""

    model: ModelName = field(metadata={"help": "Folder or hub name."})
    budgets: list[int] = field(default_factory=lambda: BUDGETS, metadata={"help": "Block evaluations."})
    num_steps: int | None = field(default=None, metadata={"help": "Denoising steps; null: from each budget."})
    reuse: list[str] = field(default_factory=lambda: list(REUSES), metadata={"help": "none, full, 3sr."})
    allocation: list[str] = field(default_factory=lambda: list(ALLOCATIONS), metadata={"help": "Which to compare."})


@dataclass(kw_only=True)
class GammasArguments(SweepArguments):
    """γ of three-state reuse, by a grid."""

    model: ModelName = field(metadata={"help": "Folder, whose generation_config.json `write` changes, or hub name."})
    budgets: list[int] = field(default_factory=lambda: BUDGETS, metadata={"help": "Block evaluations."})
    gamma_masked: list[str] = field(
        default_factory=lambda: ["0.6:0.9", "0.6:0.95", "0.75:0.9", "0.75:0.95", "0.85:0.9", "0.85:0.95"],
        metadata={"help": "Ranges FROM:TO, from all masked to all visible."},
    )
    gamma_changed: list[float] = field(default_factory=lambda: [0.0, 0.1, 0.2, 0.3], metadata={"help": "Revealed."})
    gamma_unchanged: list[float] = field(default_factory=lambda: [1.0], metadata={"help": "Visible, as before."})
    entropy_slack: float = field(default=0.05, metadata={"help": "Nats that a γ may lose against the defaults."})
    write: bool = field(default=False, metadata={"help": "Put a winner into generation_config.json."})


@dataclass(kw_only=True)
class CheckpointsArguments(SweepArguments):
    """The checkpoints of a run, with the weights that each would export."""

    model: LocalPath = field(metadata={"help": "output_dir of a run that kept its checkpoints."})
    before: ModelName | None = field(default=None, metadata={"help": "The model that the run began with: step 0."})
    budgets: list[int] = field(default_factory=lambda: BUDGETS, metadata={"help": "Block evaluations."})
    reuse: str = field(default="none", metadata={"help": "none (the paper's), full, 3sr."})

    @property
    def models(self) -> list[str]:
        """A run that goes on has exported nothing yet."""
        return [str(checkpoints_of(self.model)[-1][1])]


@dataclass(kw_only=True)
class LatencyArguments(SweepArguments):
    """Models and reuse, by quality and time."""

    model: list[ModelName] = field(metadata={"help": "Folders or hub names."})
    budgets: list[int] = field(default_factory=lambda: BUDGETS, metadata={"help": "Block evaluations."})
    reuse: list[str] = field(default_factory=lambda: ["none", "3sr"], metadata={"help": "none, full, 3sr."})
    warmup_batches: int = field(default=2, metadata={"help": "Batches before the clock starts."})
    timed_batches: int = field(default=20, metadata={"help": "Batches by the clock."})


def main(argv: list[str] | None = None) -> dict:
    """Run the sweep that the first argument names; returns what the JSON file holds."""
    argv = sys.argv[1:] if argv is None else argv
    name = argv[0] if argv else None
    if name in (None, "-h", "--help"):
        print(__doc__)
        raise SystemExit
    if name not in SWEEPS:
        raise ValueError(f"the first argument is {name!r}, but must be one of {tuple(SWEEPS)}.")
    arguments, run, draw, show = SWEEPS[name]
    (args,) = parse_arguments((arguments,), f"{name}: {arguments.__doc__}\n\n{__doc__}", argv[1:])
    device, folder = device_of(args), Path(args.output_dir)
    judge = open_judge(args, args.models, device)
    found = {}
    if args.text_files is not None:
        model, tokenizer = open_model(args.models[0], device)
        length = args.length or model.config.max_position_embeddings
        found["text"] = measure_text(args, args.text_files, tokenizer, judge, length, args.num_samples)
    found |= run(args, judge, device)
    found |= {"judge": judge.name, "arguments": asdict(args), "provenance": provenance(device)}
    if PartialState().is_main_process:
        text = markdown(found, show(found))
        write_report(folder / f"{name}.json", found, text)
        draw(found, folder / f"{name}.png", judge.name)
        print(f"\n{text}\n{folder / name}.json, .md, .png")
    return found


def open_iterated(path: str, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A checkpoint with iterations to sweep over."""
    model, tokenizer = open_model(path, device)
    if model.config.num_fixed_point_layers == 0:
        raise ValueError(f"`model`={path!r} has no fixed-point layers: there are no iterations to sweep over.")
    return model, tokenizer


# --- steps against iterations ----------------------------------------------------------------------------------------


def run_plans(args: PlansArguments, judge, device: str) -> dict:
    """A row for each pair that `max_budget` pays."""
    model, tokenizer = open_iterated(args.model, device)
    settings = grid(num_steps=args.num_steps, iterations=args.iterations, reuse=[args.reuse])
    cost = [explicit_plan(model.config, s["iterations"], s["num_steps"]).block_evaluations for s in settings]
    paid = [s for s, c in zip(settings, cost, strict=True) if args.max_budget is None or c <= args.max_budget]
    rows = sweep(model, tokenizer, judge, paid, num_samples=args.num_samples, **args.sampling)
    names = ("num_pre_layers", "num_fixed_point_layers", "num_post_layers")
    return {"rows": rows, "layers": {name: getattr(model.config, name) for name in names}}


def draw_plans(found: dict, path: Path, judge: str) -> None:
    """Figure 13."""
    plot_plans(found["rows"], SimpleNamespace(**found["layers"]), path, judge, found["arguments"]["budgets"])


# --- allocations -----------------------------------------------------------------------------------------------------


def run_allocations(args: AllocationsArguments, judge, device: str) -> dict:
    """A row for each allocation at each budget and reuse, and the comparison."""
    model, tokenizer = open_iterated(args.model, device)
    fixed = {"tuned_plans": {}} if args.num_steps is None else {"tuned_plans": {}, "num_steps": args.num_steps}
    settings = [{**s, **fixed} for s in grid(reuse=args.reuse, budget=args.budgets, allocation=args.allocation)]
    rows = sweep(model, tokenizer, judge, settings, num_samples=args.num_samples, **args.sampling)
    return {"rows": rows, "comparison": compare_values(rows, "allocation")}


def allocations_table(found: dict) -> str:
    """Table 22, and the rows behind it."""
    names = ("mean_generative_perplexity", "mean_generative_perplexity_standard_error")
    values = [
        [
            value["allocation"],
            plus_minus(*map(value.get, names)),
            f"{value['average_rank']:.2f}",
            f"{value['unbeaten']} / {value['settings']}",
        ]
        for value in found["comparison"]
    ]
    return (
        f"{table(['allocation', 'mean Gen. PPL ↓', 'average rank ↓', 'unbeaten'], values)}\n\n"
        "Unbeaten: no other allocation is better by two standard errors of the difference.\n\n"
        f"{rows_table(found['rows'], ['reuse', 'budget', 'allocation'])}"
    )


# --- γ ---------------------------------------------------------------------------------------------------------------


def run_gammas(args: GammasArguments, judge, device: str) -> dict:
    """The grid; the best γ over all budgets, compared with the checkpoint's on texts of another seed."""
    model, tokenizer = open_iterated(args.model, device)
    names = ("gamma_masked", "gamma_changed", "gamma_unchanged")
    default = {name: getattr(model.generation_config, name) for name in names}
    ranges = [range_of(text) for text in args.gamma_masked]
    tried = grid(gamma_masked=ranges, gamma_changed=args.gamma_changed, gamma_unchanged=args.gamma_unchanged)
    tried = [default, *(gammas for gammas in tried if gammas != default)]

    def measure(gammas: list[dict], seed: int) -> list[dict]:
        fixed = {"reuse": "3sr", "tuned_plans": {}}
        settings = [{"budget": budget, **g, **fixed} for budget in args.budgets for g in gammas]
        options = {**args.sampling, "seed": seed, "num_samples": args.num_samples}
        return sweep(model, tokenizer, judge, settings, **options)

    rows = measure(tried, args.seed)
    pooled = pool_settings(rows, default, args.entropy_slack)
    winner = pooled[0]["setting"]
    both = [default] if winner == default else [default, winner]
    fresh = pool_settings(measure(both, args.seed + 1), default, args.entropy_slack)
    kept = any(pooled["setting"] == winner and pooled["better"] and pooled["allowed"] for pooled in fresh)
    if args.write and kept and PartialState().is_main_process:
        target = args.model if Path(args.model).is_dir() else args.output_dir
        model.generation_config.updated(**winner).save_pretrained(target)
        print(f"γ written to {Path(target) / 'generation_config.json'}")
    return {"rows": rows, "default": default, "pooled": pooled, "new_texts": fresh, "better": kept}


def range_of(text: str) -> list[float]:
    """`"0.75:0.9"` → [0.75, 0.9]."""
    try:
        low, high = map(float, text.split(":"))
    except ValueError as error:
        raise ValueError(f"`gamma_masked` has {text!r}, but takes ranges such as 0.75:0.9.") from error
    return [low, high]


def gammas_table(found: dict) -> str:
    """γ from the best to the worst over all budgets, and the first against the checkpoint's on new texts."""
    lines = []

    def add(pooled: dict, note: str) -> None:
        lines.append([*pooled["setting"].values(), shown_perplexity(pooled), f"{pooled['entropy_loss']:.3f}", note])

    for pooled in found["pooled"]:
        note = "the checkpoint's" if pooled["setting"] == found["default"] else "" if pooled["allowed"] else "out"
        add(pooled, note)
    for pooled in found["new_texts"]:
        add(pooled, "new texts" + (", the checkpoint's" if pooled["setting"] == found["default"] else ""))
    verdict = "better" if found["better"] else "not better"
    return (
        f"{table(['γ masked', 'γ revealed', 'γ unchanged', 'Gen. PPL ↓', 'entropy lost', ''], lines)}\n\n"
        "Gen. PPL: geometric mean over budgets; entropy lost: at most, against the checkpoint's γ. On new texts "
        f"the best is {verdict} than the checkpoint's, by two standard errors of the difference.\n"
    )


# --- checkpoints -----------------------------------------------------------------------------------------------------


def run_checkpoints(args: CheckpointsArguments, judge, device: str) -> dict:
    """Rows for each checkpoint, with its EMA where it has one, and the export; the run's validation perplexities."""
    folders, exported = checkpoints_of(args.model), Path(args.model)
    before = [] if args.before is None else [(0, Path(args.before))]
    after = [(folders[-1][0], exported)] if (exported / "config.json").is_file() else []
    rows, last = [], None
    for step, folder in [*before, *folders, *after]:
        model, tokenizer = open_model(str(folder), device)
        load_average(model, folder)
        weights, last = last, fingerprint(model)
        if weights == last:  # the export of the last checkpoint
            continue
        settings = [{"reuse": args.reuse, "tuned_plans": {}}]
        found = evaluate_budgets(
            model, tokenizer, judge, args.budgets, settings, num_samples=args.num_samples, **args.sampling
        )
        rows += [{"step": step, "checkpoint": folder.name, **row} for row in found]
    history = json.loads((folders[-1][1] / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    validation = {line["step"]: line for line in history if "eval_perplexity" in line}
    names = {"perplexity": "eval_perplexity", "standard_error": "eval_perplexity_stderr"}
    points = [{"step": s, **{name: line.get(key) for name, key in names.items()}} for s, line in validation.items()]
    return {"rows": rows, "validation": points}


def checkpoints_of(run: str) -> list[tuple[int, Path]]:
    """Whole checkpoints with their steps, rising."""
    folders = [folder for folder in Path(run).glob("checkpoint-*") if not missing_files(folder)]
    if not folders:
        raise ValueError(f"`model`={run!r} holds no whole checkpoint-*: give a run's output_dir.")
    return sorted((checkpoint_step(folder), folder) for folder in folders)


def load_average(model: PreTrainedModel, folder: Path) -> None:
    """Give `model` the EMA that a checkpoint keeps beside its raw weights, as the export does."""
    if (folder / EMA_FILE).is_file():
        unknown = model.load_state_dict(load_file(folder / EMA_FILE), strict=False).unexpected_keys
        if unknown:
            raise ValueError(f"{folder / EMA_FILE} has weights that the model lacks: {unknown}.")


def draw_checkpoints(found: dict, path: Path, judge: str) -> None:
    """Figure 12; the line where consistency stops belongs to runs that were validated before their first step."""
    begins = any(point["step"] == 0 for point in found["validation"])
    plot_checkpoints(found["rows"], path, judge, found["validation"], 0.15 if begins else None)


def checkpoints_table(found: dict) -> str:
    """All rows, and validation perplexity by step."""
    points = ", ".join(
        f"{point['step']}: {plus_minus(point['perplexity'], point['standard_error'])}" for point in found["validation"]
    )
    return rows_table(found["rows"], ["checkpoint", "budget"]) + f"\nValidation perplexity by step: {points}.\n"


# --- latency ---------------------------------------------------------------------------------------------------------


def run_latency(args: LatencyArguments, judge, device: str) -> dict:
    """Rows with their latency, for each model and reuse: samples first, then the clock."""

    def settings_of(model: PreTrainedModel) -> list[dict]:
        # A model without fixed-point layers has nothing to reuse, nor has a looped one.
        reuses = args.reuse if model.config.can_reuse else ["none"]
        return grid(reuse=reuses, budget=args.budgets)

    rows, titles = [], short_names("model", args.model)
    check_settings(args.model, settings_of, args.length)
    for title, path in zip(titles, args.model, strict=True):
        model, tokenizer = open_model(path, device)
        settings = settings_of(model)
        for row in sweep(model, tokenizer, judge, settings, num_samples=args.num_samples, **args.sampling):
            clock = {"length": args.length, "batch_size": args.batch_size, "cache_dir": args.sampling["cache_dir"]}
            clock |= {"warmup_batches": args.warmup_batches, "timed_batches": args.timed_batches}
            latency = measure_latency(model, progress_bar=True, **clock, **row["sampling"]["options"])
            rows.append({"method": f"{title}, reuse {row['reuse']}", **row, "latency": latency})
    return {"rows": rows}


def draw_latency(found: dict, path: Path, judge: str) -> None:
    """Figure 15."""
    methods = dict.fromkeys(row["method"] for row in found["rows"])
    plot_latency({name: [row for row in found["rows"] if row["method"] == name] for name in methods}, path, judge)


def latency_table(found: dict) -> str:
    """Table 23 with one line per method and budget."""
    lines = []
    for row in sorted(found["rows"], key=lambda row: row["budget"]):
        time = row["latency"]
        batch = f"{time['seconds_per_batch']:.3f} ± {time['seconds_per_batch_standard_error']:.3f}"
        quality = [shown_perplexity(row), f"{row['unigram_entropy']:.3f}"]
        lines.append([row["budget"], row["method"], f"{time['seconds_per_sequence']:.4f}", batch, *quality])
    protocol = found["rows"][0]["latency"]["protocol"]
    columns = ["budget", "method", "seconds per sequence", "per batch", "Gen. PPL ↓", "entropy"]
    return (
        f"{table(columns, lines)}\n\n"
        f"Latency: from masked ids to the last token, mean of {protocol['timed_batches']} batches of "
        f"{protocol['batch_size']} texts after {protocol['warmup_batches']} to warm up (F.11).\n"
    )


def of_rows(function: Callable, *arguments: Any) -> Callable:
    """A picture or table that needs the rows alone of what was found."""
    return lambda found, *others: function(found["rows"], *others, *arguments)


SWEEPS = {  # arguments, what is run, its picture, its table
    "plans": (PlansArguments, run_plans, draw_plans, of_rows(rows_table, ["num_steps", "iterations"])),
    "allocations": (AllocationsArguments, run_allocations, of_rows(plot_allocations), allocations_table),
    "gammas": (GammasArguments, run_gammas, of_rows(plot_gammas), gammas_table),
    "checkpoints": (CheckpointsArguments, run_checkpoints, draw_checkpoints, checkpoints_table),
    "latency": (LatencyArguments, run_latency, draw_latency, latency_table),
}


if __name__ == "__main__":
    main()
