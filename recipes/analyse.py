# SPDX-License-Identifier: Apache-2.0
"""What happens inside a model while it samples: fixed points, starts, residuals, predictions, layers.

    python recipes/analyse.py --model org/fp-mdlm-owt org/cofre-owt --text_files valid.txt
    python recipes/analyse.py --model org/fp-mdlm-owt                            # on what the first model writes
    python recipes/analyse.py --model outputs/fp_maskgit --codes_dir codes/imagenette --split validation

All models see the same masked states, so they must share a tokenizer. Writes analysis.json (with provenance),
analysis.md, lagged_divergence.png, cka_NAME.png, and for models with a solver movement.png, start_distances.png and
residuals.png to `output_dir`. The same command goes on where it was interrupted.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import torch
from accelerate import PartialState
from datasets import Dataset, load_from_disk
from transformers import AutoModel, PreTrainedModel

import fpmgm  # noqa: F401  (registers the models)
from fpmgm.analysis import (
    SolverMeasurements,
    Trajectory,
    joined,
    lagged_divergence,
    masked_trajectory,
    measure_solver,
    overall,
    plot_lagged_divergence,
    plot_movement,
    plot_residuals,
    plot_similarity,
    plot_start_distances,
    running_layers,
    sampled_trajectory,
)
from fpmgm.analysis.solver_pictures import STATE_STYLES
from fpmgm.command_line import LocalPath, ModelName, given, parse_arguments
from fpmgm.conversion import layer_similarity, strongest_boundary
from fpmgm.data import load_text, pack
from fpmgm.evaluation import provenance
from fpmgm.evaluation.report import short_names, table, write_report
from fpmgm.evaluation.store import ResultStore, configuration, digest, fingerprint, finish
from fpmgm.models.reuse import REUSE_STATES, REUSES
from fpmgm.models.text_input import read_tokenizer
from judged_samples import device_of


@dataclass
class AnalysisArguments:
    """Which models, on which states, how far they are solved."""

    model: list[ModelName] = field(metadata={"help": "Folders or hub names; of several the first is compared with."})
    text_files: list[LocalPath] | None = field(
        default=None, metadata={"help": "Held-out text to mask; null: what the first model writes."}
    )
    codes_dir: LocalPath | None = field(default=None, metadata={"help": "Codes to mask, from prepare_images.py."})
    split: str = field(default="validation", metadata={"help": "Split of the codes."})
    num_sequences: int = field(default=32, metadata={"help": "Sequences."})
    length: int | None = field(default=None, metadata={"help": "Tokens of a text; null: the model's longest."})
    batch_size: int = field(default=8, metadata={"help": "Sequences per call of the model."})
    num_steps: int = field(default=32, metadata={"help": "Denoising steps of the solver's pictures."})
    iterations: int = field(default=4, metadata={"help": "Fixed-point iterations of a step."})
    tolerance: float = field(default=1e-5, metadata={"help": "Relative residual of a solution."})
    most_iterations: int = field(default=100, metadata={"help": "Iterations for a solution at most."})
    lags: list[int] = field(default_factory=lambda: [1, 2, 3, 4], metadata={"help": "Steps between predictions."})
    lag_num_steps: list[int] = field(
        default_factory=lambda: [16, 32, 64], metadata={"help": "Denoising steps between which predictions change."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Of the sequences that the model writes."})
    top_p: float | None = field(default=None, metadata={"help": "Of the sequences that the model writes."})
    guidance_scale: float = field(default=1.0, metadata={"help": "Of the images that the model writes."})
    remask: float | None = field(default=None, metadata={"help": "Mask tokens again; null: no."})
    output_dir: str = field(default="analysis", metadata={"help": "Where everything is written."})
    seed: int = field(default=0, metadata={"help": "Of the order of the tokens, and of what is written."})
    device: str | None = field(default=None, metadata={"help": "Where to run; null: a GPU where there is one."})

    def __post_init__(self):
        idle = ["split"] if self.codes_dir is None else ["length"]
        if self.text_files is not None or self.codes_dir is not None:  # the model writes nothing
            idle += ["temperature", "top_p", "guidance_scale"]
        wrong = {name: value for name, value in given(self).items() if name in idle}
        if self.text_files is not None and self.codes_dir is not None:
            wrong["text_files"] = self.text_files
        if wrong:
            data = "codes_dir" if self.codes_dir else "text_files" if self.text_files else None
            where = f"with `{data}`" if data else "where the model writes the sequences"
            raise ValueError(f"{wrong} does nothing {where}: leave it out.")


def main(argv: list[str] | None = None) -> dict:
    """Measure, draw; returns what the JSON file holds."""
    (args,) = parse_arguments((AnalysisArguments,), __doc__, argv)
    device, folder = device_of(args), Path(args.output_dir)
    names = short_names("model", args.model)
    opened = (AutoModel.from_pretrained(path).to(device).eval() for path in args.model)
    models = dict(zip(names, opened, strict=True))
    check_comparable(args, models)
    first = next(iter(models.values()))
    rows = data(args, first)
    states = {T: trajectories(args, first, rows, T) for T in sorted({args.num_steps, *args.lag_num_steps})}
    solvers, divergences, similarities = {}, {}, {}
    for name, model in models.items():
        if model.config.num_fixed_point_layers:
            solvers[name] = solver(args, name, model, states[args.num_steps])
        divergences[name] = {T: divergence(args, name, model, states[T]) for T in args.lag_num_steps}
        similarities[name] = similarity(args, name, model, states[args.num_steps])
    found = {"models": {}, "arguments": asdict(args), "provenance": provenance(device)}
    for name, model in models.items():
        found["models"][name] = {
            "parameters": model.num_parameters(),
            "solver": solver_summary(solvers[name], args.tolerance) if name in solvers else None,
            "lagged_divergence": divergence_summary(divergences[name], next(iter(divergences.values())), args.lags),
            "similarity": rounded(similarities[name]),
            "boundary": strongest_boundary(similarities[name]),
        }
    if PartialState().is_main_process:
        write_report(folder / "analysis.json", found, markdown(found))
        draw(folder, models, solvers, divergences, similarities, args)
        print(f"\n{markdown(found)}\n{folder}/analysis.json and pictures")
    return found


def check_comparable(args: AnalysisArguments, models: dict[str, PreTrainedModel]) -> None:
    """Raise a `ValueError` for models that do not share their ids."""
    ids = {name: (model.config.vocab_size, model.config.mask_token_id) for name, model in models.items()}
    if len(set(ids.values())) > 1:
        raise ValueError(f"`model`={args.model} differ in (vocabulary, mask id), {ids}: analyse them one by one.")


# --- the states --------------------------------------------------------------------------------------------------


def data(args: AnalysisArguments, model: PreTrainedModel) -> Dataset | None:
    """Held-out blocks or codes, `num_sequences` of them; `None`: the model is to write."""
    if args.text_files is None and args.codes_dir is None:
        return None
    if args.codes_dir is not None:
        rows = load_from_disk(args.codes_dir)[args.split].shuffle(seed=args.seed)  # they lie class by class
    else:
        tokenizer = read_tokenizer(args.model[0])
        rows = pack(load_text(args.text_files), tokenizer, args.length or model.config.max_position_embeddings)
    if len(rows) < args.num_sequences:
        raise ValueError(f"the data give {len(rows)} sequences, fewer than `num_sequences`={args.num_sequences}.")
    return rows.select(range(args.num_sequences)).with_format("torch")


def trajectories(
    args: AnalysisArguments, model: PreTrainedModel, rows: Dataset | None, num_steps: int
) -> list[Trajectory]:
    """A trajectory for each batch: of the data, or of the model's own sampling."""
    starts = range(0, args.num_sequences, args.batch_size)
    seeds = [args.seed * args.num_sequences + row for row in range(args.num_sequences)]
    if rows is not None:
        batches = [rows[start : start + args.batch_size] for start in starts]
        return [
            masked_trajectory(
                model, batch["input_ids"], num_steps, batch.get("class_labels"),
                seeds[start : start + args.batch_size], args.remask,
            )
            for start, batch in zip(starts, batches, strict=True)
        ]  # fmt: skip
    num_classes = model.config.num_classes
    if num_classes and args.length is not None:
        raise ValueError(f"`length`={args.length} is of texts, but {args.model[0]!r} writes images: leave it out.")
    options = {name: getattr(args, name) for name in ("temperature", "top_p", "guidance_scale", "remask")}

    def sample(i: int) -> list:
        rows = slice(i * args.batch_size, (i + 1) * args.batch_size)
        classes = [seed % num_classes for seed in seeds[rows]] if num_classes else None
        length = None if num_classes else args.length
        written = sampled_trajectory(
            model, num_steps, args.iterations, classes, batch_size=len(seeds[rows]), length=length, seed=seeds[rows],
            **options,
        )  # fmt: skip
        return [value if value is None else value.tolist() for value in written]

    shown = ("num_sequences", "batch_size", "iterations", "length", "seed")
    protocol = options | {name: getattr(args, name) for name in shown} | {"num_steps": num_steps}
    protocol["generation_defaults"] = digest(model.generation_config.to_dict())
    parts = finished(args, f"sampling, {num_steps} steps", model, protocol, len(starts), sample)
    return [Trajectory(*(None if value is None else torch.tensor(value) for value in part)) for part in parts]


# --- what is measured --------------------------------------------------------------------------------------------


def solver(args: AnalysisArguments, name: str, model: PreTrainedModel, states: list[Trajectory]) -> SolverMeasurements:
    """Movement, starts and residuals of a fixed-point model."""
    settings = {"num_iterations": args.iterations} | {k: getattr(args, k) for k in ("tolerance", "most_iterations")}
    gammas = {k: value for k, value in model.generation_config.to_dict().items() if k.startswith("gamma")}

    def measure(i: int) -> dict:
        return {k: value.tolist() for k, value in vars(measure_solver(model, states[i], **settings)).items()}

    protocol = settings | gammas | {"states": named(states)}
    parts = finished(args, f"{name}: solver", model, protocol, len(states), measure)
    return joined([SolverMeasurements(**{k: torch.tensor(value) for k, value in part.items()}) for part in parts])


def divergence(args: AnalysisArguments, name: str, model: PreTrainedModel, states: list[Trajectory]) -> torch.Tensor:
    """(K, T, B) lagged divergence of any model."""

    def measure(i: int) -> list:
        return lagged_divergence(model, states[i], tuple(args.lags), args.iterations).tolist()

    protocol = {"lags": args.lags, "num_iterations": args.iterations, "states": named(states)}
    title = f"{name}: divergences, {len(states[0].times)} steps"
    parts = finished(args, title, model, protocol, len(states), measure)
    return torch.cat([torch.tensor(part) for part in parts], dim=-1)


def similarity(args: AnalysisArguments, name: str, model: PreTrainedModel, states: list[Trajectory]) -> torch.Tensor:
    """(K, K) similarity of the layers of any model on the finished sequences."""
    batches = [trajectory.states[-1] for trajectory in states]

    def measure(i: int) -> list:
        return layer_similarity(model, batches, seed=args.seed).tolist()

    protocol = {"similarity": digest([batch.tolist() for batch in batches]), "seed": args.seed}
    return torch.tensor(finished(args, f"{name}: similarity of layers", model, protocol, 1, measure)[0])


def finished(
    args: AnalysisArguments,
    title: str,
    model: PreTrainedModel,
    protocol: dict,
    count: int,
    function: Callable[[int], dict | list],
) -> list:
    """`function` of 0 to `count` − 1, or what an earlier run found with this model and protocol."""
    of_model = {"weights": fingerprint(model), "configuration": configuration(model)}
    store = ResultStore(Path(args.output_dir) / "cache", protocol | of_model)
    values = finish(store, [[str(i)] for i in range(count)], lambda i: [function(i)], title)
    return [values[str(i)] for i in range(count)]


def named(states: list[Trajectory]) -> str:
    """A short name for trajectories."""
    return digest([[None if value is None else value.tolist() for value in part] for part in states])


# --- what is written ---------------------------------------------------------------------------------------------


def solver_summary(found: SolverMeasurements, tolerance: float) -> dict:
    """Means over the sequences at each step; `solved`: the share of them whose solution was reached."""
    by_state = {k: getattr(found, k).nanmean(dim=-1) for k in ("shares", "movement", "absolute_movement")}
    starts, starts_by_state = (x.nanmean(dim=-1) for x in (found.start_distances, found.start_distances_by_state))
    return {
        **{k: dict(zip(REUSE_STATES, rounded(table.T), strict=True)) for k, table in by_state.items()},
        "start_distances": dict(zip(REUSES, rounded(starts), strict=True)),
        "start_distances_by_state": {
            reuse: dict(zip(REUSE_STATES, rounded(table.T), strict=True))
            for reuse, table in zip(REUSES, starts_by_state, strict=True)
        },
        "residuals": dict(zip(REUSES, rounded(found.residuals.mean(dim=-1)), strict=True)),
        "solved": rounded((found.solution_residuals <= tolerance).float().mean(dim=-1)),
    }


def divergence_summary(found: dict[int, torch.Tensor], first: dict[int, torch.Tensor], lags: list[int]) -> dict:
    """For each number of steps and lag the mean over the sequences at each step and over all; the change of the latter
    against the first model, with its standard error over the sequences, each with its own change."""
    summary = {}
    for num_steps, values in found.items():
        changes = values.nanmean(dim=1) / first[num_steps].nanmean(dim=1) - 1  # (K, B)
        columns = {
            "mean": overall(values),
            "by_step": values.nanmean(dim=-1),
            "change": overall(values) / overall(first[num_steps]) - 1,
            "standard_error_change": changes.std(dim=-1) / changes.shape[1] ** 0.5,
        }
        summary[num_steps] = {k: dict(zip(lags, rounded(column), strict=True)) for k, column in columns.items()}
    return summary


def rounded(values: torch.Tensor) -> list | float | None:
    """Nested lists of five digits; `None` where there is nothing to measure, or a residual without bound."""
    if values.dim() == 0:
        return float(f"{values.item():.5g}") if values.isfinite() else None
    return [rounded(value) for value in values]


def draw(
    folder: Path, models: dict, solvers: dict, divergences: dict, similarities: dict, args: AnalysisArguments
) -> None:
    """All pictures."""
    if solvers:
        plot_movement(solvers, folder / "movement.png")
        plot_start_distances(solvers, folder / "start_distances.png")
        plot_residuals(solvers, folder / "residuals.png")
    plot_lagged_divergence(divergences, folder / "lagged_divergence.png", tuple(args.lags))
    for name, values in similarities.items():
        plot_similarity(values, folder / f"cka_{name}.png", running_layers(models[name].config))


def markdown(found: dict) -> str:
    """How near the solver comes, and how much predictions change."""
    solvers = {name: model["solver"] for name, model in found["models"].items() if model["solver"]}
    parts = [solver_table(solvers, found["arguments"]["iterations"])] if solvers else []
    divergences = {name: model["lagged_divergence"] for name, model in found["models"].items()}
    return "\n".join([*parts, divergence_table(divergences, found["arguments"]["lags"])])


def solver_table(solvers: dict[str, dict], iterations: int) -> str:
    """A line for each model and reuse."""
    rows = []
    for name, solver in solvers.items():
        for reuse in REUSES:
            by_state = solver["start_distances_by_state"][reuse]
            columns = [solver["start_distances"][reuse], *(by_state[state] for state in STATE_STYLES)]
            # A residual that is no number has left them.
            columns += [
                [math.inf if row[n] is None else row[n] for row in solver["residuals"][reuse]] for n in (0, -1)
            ]
            numbers = [[value for value in column[1:] if value is not None] for column in columns]
            rows.append([name, reuse, *(shown(median(column) if column else None, ".3g") for column in numbers)])
    note = (
        f"N = {iterations}. Medians over the steps but the first of means over the sequences: ‖h⁰ − h*‖ / ‖h*‖ of "
        "all tokens and of those of a kind; ‖F(h) − h‖ / ‖h‖ of the first and the last iteration."
    )
    labels = [label for label, _ in STATE_STYLES.values()]
    columns = ["model", "reuse", "start to h*", *labels, "residual 1", "residual N"]
    return f"{table(columns, rows)}\n\n{note}\n"


def divergence_table(divergences: dict[str, dict], lags: list[int]) -> str:
    """A line for each model and number of steps."""
    rows = []
    for name, by_steps in divergences.items():
        for num_steps, values in by_steps.items():
            cells = [shown(mean, ".3g") for mean in values["mean"].values()]
            if name != next(iter(divergences)):
                changes = zip(values["change"].values(), values["standard_error_change"].values(), strict=True)
                changes = [f"({shown(change, '+.1%')} ± {shown(error, '.1%')})" for change, error in changes]
                cells = [f"{mean} {change}" for mean, change in zip(cells, changes, strict=True)]
            rows.append([name, num_steps, *cells])
    note = (
        "Mean KL in nats from a step to the one `lag` steps later, at positions masked at both; in brackets the "
        "change against the first model, with the standard error over the sequences."
    )
    return f"{table(['model', 'steps', *(f'KL, lag {lag}' for lag in lags)], rows)}\n\n{note}\n"


def shown(value: float | None, style: str) -> str:
    """A number as text, a dash where there is none."""
    return "–" if value is None else format(value, style)


if __name__ == "__main__":
    main()
