# SPDX-License-Identifier: Apache-2.0
"""A study in a world whose truth is known, from the world to tables: trains and judges the rows that are missing.

    python recipes/study/run.py --plan recipes/study/small.yaml --truth stories260K --output_dir studies/small
    python recipes/study/run.py ... --only train --rows mdlm fp_mdlm     # one process trains, another one judges
    python recipes/study/run.py ... --only judge

The same command goes on where it was interrupted, to the step. Results and tables are written after every row.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))  # the other recipes

import sample_world
from fpmgm.command_line import LocalPath, ModelName, parse_arguments
from study.judge import describe_truth, judge_row, open_truth
from study.pictures import plot_excess
from study.plan import Plan, load_plan
from study.tables import of_first_seed, write_tables
from study.train import check_same_row, train_row


@dataclass(kw_only=True)
class StudyArguments:
    """What to run and where."""

    plan: LocalPath = field(metadata={"help": "YAML of the study: see recipes/study/plan.py."})
    truth: ModelName = field(metadata={"help": "Causal language model: folder or hub name."})
    output_dir: str = field(metadata={"help": "World, runs, results and tables."})
    rows: list[str] | None = field(default=None, metadata={"help": "Names of rows; null: all."})
    only: str | None = field(default=None, metadata={"help": "train or judge; null: both, row by row."})
    results_dir: str | None = field(default=None, metadata={"help": "Of the tables; null: results in output_dir."})
    device: str = field(default="cpu", metadata={"help": "Where to run."})


def main(argv: list[str] | None = None) -> None:
    """Run what is missing."""
    (args,) = parse_arguments((StudyArguments,), __doc__, argv)
    if args.only not in (None, "train", "judge"):
        raise ValueError(f"`only`={args.only!r} must be train or judge, or left out for both.")
    plan, folder = load_plan(args.plan), Path(args.output_dir)
    unknown = sorted(set(args.rows or ()) - {row.name for row in plan.rows})
    if unknown:
        raise ValueError(f"`rows`: {unknown} are none of {[row.name for row in plan.rows]}.")
    rows = [row for row in plan.rows if args.rows is None or row.name in args.rows]
    for row in rows:
        check_same_row(plan, row, folder / "runs" / row.name)
    make_world(plan, args)
    judge = open_truth(args.truth, folder, args.device)
    truth, target = describe_truth(judge), Path(args.results_dir or folder / "results")
    for row in rows:
        if args.only != "judge":
            train_row(plan, row, folder, args.device)
        if args.only != "train" and (folder / "runs" / row.name / "training.json").exists():
            judge_row(plan, row, folder, judge, args.device)
            name = f"study_{Path(args.plan).stem}"
            written = write_tables(plan, folder, truth, name, target)
            plot_excess(of_first_seed(written), truth["unigram_entropy"], target / f"{name}.png")


def make_world(plan: Plan, args: StudyArguments) -> None:
    """Training texts and held-out ones, each with a seed of its own."""
    length, shard = str(plan.world["length"]), str(plan.world.get("texts_per_shard", 500))
    for seed, (name, count) in enumerate([("world", plan.num_texts), ("held_out", plan.world["held_out_texts"])]):
        sample_world.main(
            ["--truth", args.truth, "--num_texts", str(count), "--length", length, "--texts_per_shard", shard,
             "--seed", str(seed), "--output_dir", str(Path(args.output_dir) / name), "--device", args.device]
        )  # fmt: skip


if __name__ == "__main__":
    main()
