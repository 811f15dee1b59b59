# SPDX-License-Identifier: Apache-2.0
"""What a study trains and judges, read from its YAML: one entry of `rows` is one run.

world:      {length: 128, held_out_texts: 2000, validation_texts: 256}
model:      fields of `FPMDLMConfig` that all rows share
training:   fields of the trainers' configurations that all rows share
judging:    {num_samples: 512, batch_size: 64, budgets: [24, 48], settings: [{reuse: none}], likelihood_draws: 2}
rows:
  - {name: fp_mdlm, model: {num_pre_layers: 1}, training: {max_steps: 2000, learning_rate: 1.5e-3}}
  - {name: cofre, start: fp_mdlm, trainer: consistency, training: {max_steps: 250, consistency_weight: 0.1}}
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from fpmgm.command_line import read_yaml


TRAINERS = ("base", "consistency", "conversion", "sdtt")
JUDGED = ("none", "likelihood", "samples")


@dataclass(frozen=True)
class Row:
    """One run.

    Args:
        name (`str`): Of its folder and in the tables.
        title (`str`): What it is, for the tables. Empty: the name.
        group (`str`): Table that it belongs to.
        trainer (`str`): One of `TRAINERS`.
        start (`str`, *optional*): Row whose export it goes on from, or a model's folder; for `"conversion"` it is the
            teacher. `None`: fresh weights.
        model (`dict`): Fields of the configuration beside the shared ones, or beside those of `start`; for
            `"conversion"`, and with a `layer_map` for any trainer, arguments of `convert_to_fixed_point`.
        training (`dict`): Fields of the trainer's configuration beside the shared ones.
        judged (`str`): `"none"`, by `"likelihood"` only, or by `"samples"` too.
        settings (`list[dict]`, *optional*): Settings of `generate`. `None`: the study's.
        budgets (`list[int]`, *optional*): Block evaluations. `None`: the study's.
        num_samples (`int`, *optional*): Texts of each setting and budget. `None`: the study's.
        texts (`list[int]`, *optional*): First text and end of the texts that it reads, in another order each time
            it is through with them. `None`: fresh ones, after those of the rows it goes on from.
        seed (`int`): Of weights and noise.
        seeds (`int`): Runs of the row, with seeds 0, 1 and so on; the second one is named `NAME_seed1`. Each goes on
            from the run of `start` that has its seed, or from the same folder.
    """

    name: str
    title: str = ""
    group: str = "models"
    trainer: str = "base"
    start: str | None = None
    model: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    judged: str = "samples"
    settings: list[dict] | None = None
    budgets: list[int] | None = None
    num_samples: int | None = None
    texts: list[int] | None = None
    seed: int = 0
    seeds: int = 1


@dataclass(frozen=True)
class Plan:
    """A study. `world`, `model`, `training` and `judging` are what its rows share; `release` names the folders that
    are published, with the `row` of each and its `generation`, defaults of `generate`."""

    world: dict[str, Any]
    model: dict[str, Any]
    training: dict[str, Any]
    judging: dict[str, Any]
    rows: list[Row]
    release: dict[str, dict] = field(default_factory=dict)

    def row(self, name: str) -> Row:
        """The row of this name."""
        return next(row for row in self.rows if row.name == name)

    def before(self, row: Row) -> Row | None:
        """The row that a row goes on from; `None` where it begins with fresh weights or a folder's."""
        return named(row.start, itertools.takewhile(lambda other: other.name != row.name, self.rows))

    def start(self, row: Row, runs: Path) -> Path:
        """Where the weights lie that a row goes on from."""
        return Path(row.start) if self.before(row) is None else runs / row.start

    def texts(self, row: Row) -> range:
        """Which texts of the world a row trains on."""
        if row.texts is not None:
            return range(*row.texts)
        before = self.before(row)
        first = 0 if before is None else self.texts(before).stop
        return range(first, first + {**self.training, **row.training}["max_steps"] * self.texts_of_step(row))

    def texts_of_step(self, row: Row) -> int:
        """How many texts an optimizer step of a row reads."""
        options = {**self.training, **row.training}
        return options["per_device_train_batch_size"] * options.get("gradient_accumulation_steps", 1)

    @property
    def num_texts(self) -> int:
        """Texts that the world must hold."""
        return max(self.texts(row).stop for row in self.rows)


def name_of(name: str, seed: int) -> str:
    """Of a row's run with a seed."""
    return f"{name}_seed{seed}" if seed else name


def named(start: str | None, earlier: Iterable[Row]) -> Row | None:
    """The row of `earlier` that `start` names, if it is one: a row comes before a folder of the same name."""
    return next((row for row in earlier if row.name == start), None)


def with_seeds(row: Row, earlier: list[Row]) -> Iterator[Row]:
    """The row, and the same with further seeds."""
    yield row
    for seed in range(1, row.seeds):
        start = row.start if named(row.start, earlier) is None else name_of(row.start, seed)
        yield replace(row, name=name_of(row.name, seed), seed=seed, start=start)


def load_plan(path: str | Path) -> Plan:
    """Read and check a study.

    Raises:
        `ValueError`: for names that a row does not have, two rows of one name, a start that is neither an earlier row
        nor a folder, or a `release` of no row.
    """
    values = read_yaml("plan", path)
    known = {f.name for f in fields(Row)}
    rows: list[Row] = []
    entries = values.pop("rows")
    for entry in entries:
        unknown = sorted(set(entry) - known)
        if unknown:
            raise ValueError(f"`rows`: {entry.get('name')!r} sets {unknown}; a row has {sorted(known)}.")
    for row in itertools.chain.from_iterable(with_seeds(Row(**entry), rows) for entry in entries):
        earlier = [other.name for other in rows]
        if row.name in earlier:
            raise ValueError(f"`rows`: {row.name!r} is there twice: give each row a name of its own.")
        if row.start is not None and named(row.start, rows) is None and not Path(row.start).is_dir():
            raise ValueError(
                f"`rows`: {row.name!r} starts from {row.start!r}, which is no folder and none of {earlier} before it."
            )
        if row.trainer not in TRAINERS or row.judged not in JUDGED:
            raise ValueError(
                f"`rows`: {row.name!r} has `trainer`={row.trainer!r} and `judged`={row.judged!r}, which must be of "
                f"{TRAINERS} and {JUDGED}."
            )
        if row.start is None and row.trainer != "base":
            raise ValueError(f"`rows`: `trainer`={row.trainer!r} of {row.name!r} needs `start`, a row to go on from.")
        options = {**values["training"], **row.training}
        counted = ["per_device_train_batch_size"] + ["max_steps"] * (row.texts is None)
        if missing := [name for name in counted if name not in options]:
            raise ValueError(
                f"`rows`: {row.name!r} has no {missing} in its `training` or the plan's, by which the texts that it "
                "reads are counted."
            )
        rows.append(row)
    plan = Plan(rows=rows, **values)
    unknown = sorted({entry["row"] for entry in plan.release.values()} - {row.name for row in rows})
    if unknown:
        raise ValueError(f"`release` names {unknown}, which are none of {[row.name for row in rows]}.")
    return plan
