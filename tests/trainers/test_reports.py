# SPDX-License-Identifier: Apache-2.0
"""What a run measures beside the loss reaches TensorBoard and W&B under `report_to`."""

import pytest

from fpmgm.trainers import MGMTrainer, MGMTrainingConfig

from ..testing_utils import tiny_model


MEASURED = {"loss", "residual", "residual_ratio", "masked_accuracy", "iterations", "tokens_per_second"}


def train(folder, report_to: str) -> list[dict]:
    """Two steps; what the run's own log holds."""
    model = tiny_model()
    rows = [{"input_ids": [3] * model.config.max_position_embeddings}] * 4
    args = MGMTrainingConfig(
        output_dir=str(folder), max_steps=2, warmup_steps=1, logging_steps=1, use_cpu=True, disable_tqdm=True,
        report_to=report_to,
    )  # fmt: skip
    trainer = MGMTrainer(model=model, args=args, train_dataset=rows)
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


def test_tensorboard_has_what_the_log_has(tmp_path, monkeypatch):
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="runs in test-extras"
    )
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    logged = train(tmp_path, "tensorboard")
    events = reader.EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    for name in MEASURED:
        shown = {event.step: event.value for event in events.Scalars(f"train/{name}")}
        assert shown == pytest.approx({line["step"]: line[name] for line in logged}), name


def test_wandb_has_what_the_log_has(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="runs in test-extras")
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    logged = train(tmp_path, "wandb")
    try:
        summary = {name: wandb.run.summary[f"train/{name}"] for name in MEASURED}
    finally:
        wandb.finish()
    assert summary == pytest.approx({name: logged[-1][name] for name in MEASURED})
