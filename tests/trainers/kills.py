# SPDX-License-Identifier: Apache-2.0
"""Runs of every trainer that are killed again and again, and pairs of runs in one folder, in processes of their own,
for `test_kills.py`. What they saw is written to `done.json`.

python -m tests.trainers.kills killed NUMBER FOLDER
python -m tests.trainers.kills pairs NUMBER FOLDER
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from peft import LoraConfig
from transformers import Trainer

from fpmgm.trainers import ConsistencyTrainer, ConversionTrainer, SDTTTrainer, last_checkpoint
from tests.testing_utils import tiny_image_model

from . import faults
from .same_run import contents, differences
from .test_image_tokenizer_trainer import tokenizer_trainer
from .training_utils import image_rows, make_trainer, token_rows, training_model


SAVING = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "logging_steps": 3}
RUN = {
    **SAVING, "ema_decay": 0.5, "eval_strategy": "steps", "eval_steps": 4, "eval_num_draws": 1,
    "eval_dataset": token_rows(4, seed=1), "train_dataset": token_rows(20),
}  # fmt: skip
EXPLICIT = {"num_pre_layers": 3, "num_fixed_point_layers": 0, "num_post_layers": 0}


def images(folder: Path, steps: int) -> Trainer:
    rows = {"train_dataset": image_rows(20), "eval_dataset": image_rows(4, seed=1)}
    return make_trainer(folder, tiny_image_model(scale=0.1), max_steps=steps, **{**RUN, **rows})


def consistency(folder: Path, steps: int) -> Trainer:
    options = {"consistency_loss": "projected_cosine", "stop_at_perplexity_increase": 1e6}
    return make_trainer(folder, training_model(dropout=0.1), ConsistencyTrainer, max_steps=steps, **RUN, **options)


def conversion(folder: Path, steps: int) -> Trainer:
    teacher = training_model(1, **EXPLICIT)
    return make_trainer(folder, training_model(), ConversionTrainer, teacher=teacher, max_steps=steps, **RUN)


def sdtt(folder: Path, steps: int) -> Trainer:
    rounds = {"rounds": 3, "steps_per_round": -(-steps // 3), "max_steps": steps, "first_step_size": 0.05}
    return make_trainer(folder, training_model(), SDTTTrainer, **RUN, **rounds)


def adapter(folder: Path, steps: int) -> Trainer:
    accumulation = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    return make_trainer(
        folder, training_model(dropout=0.1), peft_config=LoraConfig(r=2), max_steps=steps, **RUN, **accumulation
    )


def pictures(folder: Path, steps: int) -> Trainer:
    evaluation = {"eval_strategy": "steps", "eval_steps": 4, "restart_every": 3, "mirror": True}
    saving = {name: value for name, value in SAVING.items() if name != "logging_steps"}
    return tokenizer_trainer(folder, steps, **saving, **evaluation)


TRAINERS = {
    "text": lambda folder, steps: make_trainer(folder, training_model(dropout=0.1), max_steps=steps, **RUN),
    "images": images,
    "adapter": adapter,
    "consistency": consistency,
    "conversion": conversion,
    "sdtt": sdtt,
    "image tokenizer": pictures,
}


def train(kind: str, folder: Path, steps: int) -> None:
    """Go on in `folder` from the last whole checkpoint; a folder that another holds is noted."""
    try:
        TRAINERS[kind](folder, steps).train(resume_from_checkpoint=last_checkpoint(folder))
    except ValueError as error:
        folder.with_name(f"refused-{os.getpid()}").write_text(str(error))
        raise


def is_writing(folder: Path) -> bool:
    """Whether a checkpoint is being written in `folder`."""
    try:
        return any((folder / "_saving").glob("checkpoint-*/*"))
    except FileNotFoundError:  # it was put in its place while its files were listed
        return False


def kill_in_time(pid: int, folder: Path, writing: bool, draw: random.Random) -> None:
    """Kill after one more checkpoint: while the next is written, or at some other time."""
    target = faults.newest(folder) + 2
    while faults.is_running(pid) and faults.newest(folder) < target:
        time.sleep(0.001)
    while writing and faults.is_running(pid) and not is_writing(folder):
        time.sleep(0.0005)
    time.sleep(draw.uniform(0, 0.01 if writing else 0.1))
    os.kill(pid, signal.SIGKILL)


def killed(kind: str, number: int, folder: Path) -> dict:
    """What a run of `kind` that was killed `number` times differs in from the uninterrupted one."""
    steps, draw, kills, torn = 6 * number + 6, random.Random(kind), 0, 0
    faults.finish(faults.start(train, kind, folder / "straight", steps))
    while True:
        pid = faults.start(train, kind, folder / "killed", steps)
        if kills < number:
            kill_in_time(pid, folder / "killed", kills % 2 == 0, draw)
        if faults.finish(pid) == 0:
            break
        kills += 1
        torn += is_writing(folder / "killed")
    pairs = [[contents(folder / name / f"checkpoint-{step}") for name in ("killed", "straight")]
             for step in (steps - 2, steps)]  # fmt: skip
    found = [text for pair in pairs for text in differences(*pair)]
    return {"kills": kills, "torn": torn, "differences": found, "lines": len(pairs[-1][0]["lines"])}


def pairs(number: int, folder: Path) -> list[dict]:
    """What happens when two runs begin in one folder at once."""
    steps, draw, seen = 10, random.Random(0), []
    faults.finish(faults.start(train, "text", folder / "straight", steps))
    for i in range(number):
        together = folder / str(i) / "run"
        together.mkdir(parents=True)
        first = faults.start(train, "text", together, steps)
        time.sleep(draw.uniform(0, 0.1))
        both = (first, faults.start(train, "text", together, steps))
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in both]
        refused = [path.read_text() for path in together.parent.glob("refused-*")]
        found = differences(*(contents(run / f"checkpoint-{steps}") for run in (together, folder / "straight")))
        names = sorted(path.name for path in together.iterdir())
        seen.append({"codes": codes, "pids": both, "refused": refused, "differences": found, "names": names})
        shutil.rmtree(together.parent)
    return seen


def main() -> None:
    way, number, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    if way == "killed":
        done = {kind: killed(kind, number, folder / kind) for kind in TRAINERS}
    else:
        done = pairs(number, folder)
    (folder / "done.json").write_text(json.dumps(done))


if __name__ == "__main__":
    main()
