# SPDX-License-Identifier: Apache-2.0
"""Train one row of a study: fresh weights, or on from another row's export."""

import json
import time
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer, set_seed

from fpmgm import FPMDLMConfig, FPMDLMForMaskedDiffusion, convert_to_fixed_point
from fpmgm.evaluation.provenance import provenance
from fpmgm.evaluation.report import write_report
from fpmgm.trainers import (
    ConsistencyConfig,
    ConsistencyTrainer,
    ConversionConfig,
    ConversionTrainer,
    MGMTrainer,
    MGMTrainingConfig,
    SDTTConfig,
    SDTTTrainer,
    last_checkpoint,
)
from fpmgm.trainers.checkpoints import checkpoint_step
from fpmgm.trainers.run_record import Origin, describe_files
from sample_world import World
from study.plan import Plan, Row


TRAINERS = {
    "base": (MGMTrainer, MGMTrainingConfig),
    "consistency": (ConsistencyTrainer, ConsistencyConfig),
    "conversion": (ConversionTrainer, ConversionConfig),
    "sdtt": (SDTTTrainer, SDTTConfig),
}


def train_row(plan: Plan, row: Row, folder: Path, device: str) -> Path:
    """Train the row unless it is trained; an interrupted one goes on from its last checkpoint.

    Returns:
        `Path` of the export, with `training.json` beside the weights.
    """
    export = folder / "runs" / row.name
    check_same_row(plan, row, export)
    if (export / "training.json").exists():
        return export
    args, texts = training_arguments(plan, row, export, device), plan.texts(row)
    start = start_weights(plan, row, export)
    set_seed(row.seed)  # before fresh weights are drawn
    model, teachers = start_model(plan, row, folder)
    trainer = TRAINERS[row.trainer][0](
        model=model,
        args=args,
        train_dataset=World(folder / "world", len(texts), skip=texts.start),
        eval_dataset=World(folder / "held_out", plan.world["validation_texts"]),
        processing_class=AutoTokenizer.from_pretrained(folder / "world"),
        origin=Origin(options={"start": start}),
        **teachers,
    )
    last = last_checkpoint(args.output_dir)
    clock, cpu = time.perf_counter(), time.process_time()
    trainer.train(resume_from_checkpoint=last)
    seconds, cpu = time.perf_counter() - clock, time.process_time() - cpu
    trainer.save_model()
    found = {
        "name": row.name,
        "asked": asked(plan, row),
        "start_weights": start,
        "steps": trainer.state.global_step,
        "first_step": checkpoint_step(last) if last else 0,  # of the last start, as the seconds are
        "seconds": seconds,
        "cpu_seconds": cpu,
        "parameters": model.num_parameters(),
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if device != "cpu" else None,
        "log": trainer.state.log_history,
        "provenance": provenance(device),
    }
    write_report(export / "training.json", found)
    return export


def training_arguments(plan: Plan, row: Row, export: Path, device: str) -> MGMTrainingConfig:
    """Those of the row's trainer."""
    options = {"report_to": [], "disable_tqdm": False, "use_cpu": device == "cpu", "seed": row.seed}
    return TRAINERS[row.trainer][1](output_dir=str(export), **{**options, **plan.training, **row.training})


def asked(plan: Plan, row: Row) -> dict:
    """What a plan asks of the training of a row."""
    texts = plan.texts(row)
    return {
        "trainer": row.trainer,
        "start": row.start,
        "model": {**plan.model, **row.model},
        "training_options": {**plan.training, **row.training, "seed": row.seed},
        "texts": [texts.start, texts.stop],
    }


def start_weights(plan: Plan, row: Row, export: Path) -> list[dict]:
    """What the files hold that a row goes on from; nothing for fresh weights, or where they are not there."""
    if row.start is None:
        return []
    return describe_files(sorted(plan.start(row, export.parent).glob("*.safetensors")))


def check_same_row(plan: Plan, row: Row, export: Path) -> None:
    """Raise a `ValueError` for a run that was trained as another plan asked, or from other weights than there are."""
    path = export / "training.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    held = known.get("asked", {})  # an earlier version did not note it: nothing to compare
    wrong = {name: (held[name], value) for name, value in asked(plan, row).items() if held.get(name, value) != value}
    if wrong:
        raise ValueError(
            f"{export} was trained by another `plan` (what it was asked, what `plan` asks): {wrong}. Give the former "
            "plan, another name to the row, or delete the folder to train it again."
        )
    start = start_weights(plan, row, export)
    if start and known.get("start_weights", start) != start:
        raise ValueError(
            f"{export} went on from other weights than {plan.start(row, export.parent)} holds now: delete the folder "
            "to train it again, or put those back."
        )


def start_model(plan: Plan, row: Row, folder: Path) -> tuple[torch.nn.Module, dict]:
    """The model that a row trains, and what its trainer takes as a teacher."""
    if row.start is None:
        tokenizer = AutoTokenizer.from_pretrained(folder / "world")
        config = FPMDLMConfig(
            vocab_size=len(tokenizer),
            mask_token_id=tokenizer.mask_token_id,
            max_position_embeddings=plan.world["length"],
            **{**plan.model, **row.model},
        )
        return FPMDLMForMaskedDiffusion(config), {}
    start = plan.start(row, folder / "runs")
    full = {"dtype": torch.float32}  # what is released is stored in half of it
    if row.trainer == "conversion":
        teacher = AutoModel.from_pretrained(start, **full)
        return convert_to_fixed_point(teacher, **row.model), {"teacher": teacher}
    if "layer_map" in row.model:
        return convert_to_fixed_point(AutoModel.from_pretrained(start, **full), **row.model), {}
    return AutoModel.from_pretrained(start, **full, **row.model), {}
