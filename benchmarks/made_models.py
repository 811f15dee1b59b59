# SPDX-License-Identifier: Apache-2.0
"""Models that benchmarks make by the recipes' own commands, each once."""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from transformers import AutoModel

from fpmgm.evaluation.provenance import commit
from fpmgm.evaluation.report import write_report
from fpmgm.trainers import last_checkpoint


ROOT = Path(__file__).resolve().parents[1]


class Run(NamedTuple):
    """How a model is made, and how it is sampled."""

    recipe: str
    config: str | None  # its YAML in recipes/configs
    start: str | None  # the run whose model it goes on from
    overrides: str  # with {names} of numbers of steps
    reuses: list[str]


def folder_of(name: str, work_dir: str) -> Path:
    """Where a run's model is."""
    for found, put in ((", ", "_"), (" + ", "_"), (" ", "_"), ("/", "-")):
        name = name.lower().replace(found, put)
    return Path(work_dir) / name


def arguments_of(run: Run, name: str, work_dir: str, shared: str, steps: dict[str, int]) -> list[str]:
    """The recipe's arguments, but for its data."""
    argv = ["--config", f"{ROOT}/recipes/configs/{run.config}.yaml"] if run.config else []
    argv += ["--model_name_or_path", str(folder_of(run.start, work_dir))] if run.start else []
    argv += [*shared.split(), *run.overrides.format(**steps).split()]
    return [*argv, "--output_dir", str(folder_of(name, work_dir))]


def run_recipe(recipe: str, argv: list[str]) -> None:
    """Run a recipe in a process of its own."""
    subprocess.run([sys.executable, f"{ROOT}/recipes/{recipe}.py", *argv], check=True)


def make(recipe: str, argv: list[str], data: list[str], folder: Path, hidden: dict[str, str]) -> dict:
    """What the recipe measured of the model that it left in `folder`, now or before, with the command.

    `hidden`: folders of this machine, and what the command says for them; of `data` it says nothing.

    Raises:
        `ValueError`: if another command made what is in `folder`.
    """
    done = folder / "run.json"
    command = " ".join(["python", f"recipes/{recipe}.py", *argv]).replace(f"{ROOT}/", "")
    for place, name in hidden.items():
        command = command.replace(place, name)
    if not done.is_file():
        run_recipe(recipe, [*argv, *data])
        state = json.loads((Path(last_checkpoint(folder)) / "trainer_state.json").read_text(encoding="utf-8"))
        measured = json.loads((folder / "all_results.json").read_text(encoding="utf-8"))
        write_report(done, {"command": command, "commit": commit(), "steps": state["global_step"], **measured})
    found = json.loads(done.read_text(encoding="utf-8"))
    if found["command"] != command:
        raise ValueError(
            f"{folder} was made by `{found['command']}`, not by `{command}`: give the former options, another "
            "`work_dir`, or delete the folder to make it again."
        )
    return found


def parameters_of(folder: Path) -> int:
    """Of the model in `folder`."""
    return int(AutoModel.from_pretrained(folder).num_parameters())
