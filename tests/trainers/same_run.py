# SPDX-License-Identifier: Apache-2.0
"""Whether two checkpoints are of the same run, bit for bit."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file


CLOCKS = ("tokens_per_second", "runtime", "samples_per_second", "steps_per_second")


def contents(folder: Path) -> dict:
    """Everything that a resumed run goes on from, but for the clock and the place of the folder."""
    state = json.loads((folder / "trainer_state.json").read_text())
    lines = [{name: x for name, x in line.items() if not name.endswith(CLOCKS)} for line in state.pop("log_history")]
    best = state.pop("best_model_checkpoint")
    pickled = {path.stem: torch.load(path, weights_only=False) for path in folder.glob("*.pt*")}
    tensors = {path.stem: load_file(path) for path in folder.glob("*.safetensors")}
    assert {"optimizer", "scheduler", "rng_state"} <= pickled.keys() or {"rng_state_0"} <= pickled.keys()
    assert len(pickled["optimizer"]["state"]) > 10 and {"model", "adapter_model"} & tensors.keys()
    names = {"best": None if best is None else Path(best).name}
    return {"state": state, "lines": lines, **names, **tensors, **pickled}


def differences(actual, expected, where: str = "") -> list[str]:
    """Paths at which two nests of dicts and sequences differ in any bit."""
    if type(actual) is not type(expected):
        return [where]
    if isinstance(actual, torch.Tensor):
        return [] if torch.equal(actual, expected) else [where]
    if isinstance(actual, dict) and actual.keys() == expected.keys():
        return [d for key in actual for d in differences(actual[key], expected[key], f"{where}/{key}")]
    if isinstance(actual, list | tuple) and len(actual) == len(expected):
        pairs = enumerate(zip(actual, expected, strict=True))
        return [d for i, (a, e) in pairs for d in differences(a, e, f"{where}/{i}")]
    if hasattr(actual, "tobytes"):
        return [] if actual.tobytes() == expected.tobytes() else [where]
    return [] if actual == expected else [where]
