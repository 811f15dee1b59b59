# SPDX-License-Identifier: Apache-2.0
"""Models that benchmarks make by the recipes' own commands, each once."""

import json
import subprocess
import sys
from pathlib import Path

from fpmgm.evaluation.provenance import commit
from fpmgm.evaluation.report import write_report
from fpmgm.trainers import last_checkpoint


ROOT = Path(__file__).resolve().parents[1]


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
