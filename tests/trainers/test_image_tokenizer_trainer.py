# SPDX-License-Identifier: Apache-2.0
"""Training of an image tokenizer: unused codes come back, and the quality reported is that of the exported model."""

import math

import pytest
import torch
from transformers import JanusVQVAEConfig

from fpmgm.conversion import load_image_tokenizer
from fpmgm.models.modeling_vqgan import VQGANModel
from fpmgm.trainers import ImageTokenizerConfig, ImageTokenizerTrainer
from tests.testing_utils import refused


def rows(count: int, seed: int = 0) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 2, 2, generator=generator) * 2 - 1
    return [{"pixel_values": x} for x in coarse.repeat_interleave(4, -1).repeat_interleave(4, -2)]


def tokenizer_trainer(folder, max_steps=4, **options) -> ImageTokenizerTrainer:
    torch.manual_seed(0)
    config = JanusVQVAEConfig(
        num_patches=4, base_channels=32, channel_multiplier=[1, 1], num_res_blocks=1, latent_channels=32,
        embed_dim=4, num_embeddings=24,
    )  # fmt: skip
    model = VQGANModel(config)
    with torch.no_grad():
        model.codebook[4:] = model.codebook[0]  # of equal codes the first is taken
    options = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 3, "logging_steps": 1} | options
    args = ImageTokenizerConfig(
        output_dir=str(folder), max_steps=max_steps, warmup_steps=0, use_cpu=True, report_to="none", disable_tqdm=True,
        **options,
    )  # fmt: skip
    return ImageTokenizerTrainer(model=model, args=args, train_dataset=rows(16), eval_dataset=rows(8, seed=1))


def test_codes_that_nothing_uses_are_moved_to_latents(tmp_path):
    trainer = tokenizer_trainer(tmp_path / "off", restart_every=0)
    trainer.train()
    used = [entry["codebook_usage"] for entry in trainer.state.log_history if "codebook_usage" in entry]
    assert used[-1] < 6 / 24  # nineteen codes are never taken
    trainer = tokenizer_trainer(tmp_path / "on", restart_every=1)
    trainer.train()
    used = [entry["codebook_usage"] for entry in trainer.state.log_history if "codebook_usage" in entry]
    assert used[0] < 6 / 24 and used[-1] > 9 / 24


def test_saving_changes_nothing_that_is_learned(tmp_path):
    quiet, saving = (
        tokenizer_trainer(tmp_path / strategy, save_strategy=strategy, save_steps=1, learning_rate=1e-2)
        for strategy in ("no", "steps")
    )
    for trainer in (quiet, saving):
        trainer.train()
    for name, parameter in quiet.model.named_parameters():
        assert torch.equal(saving.model.get_parameter(name), parameter)
    saved = load_image_tokenizer(tmp_path / "steps/checkpoint-4").codebook
    torch.testing.assert_close(saved, torch.nn.functional.normalize(quiet.model.codebook, dim=-1))
    assert (quiet.model.codebook.norm(dim=-1) - 1).abs().max() > 0.1


@torch.no_grad()
def test_the_metrics_are_those_of_the_exported_tokenizer(tmp_path):
    trainer = tokenizer_trainer(tmp_path, restart_every=1)
    with torch.enable_grad():
        trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    tokenizer = load_image_tokenizer(tmp_path)
    torch.testing.assert_close(tokenizer.codebook.norm(dim=-1), torch.ones(24))
    pixels = torch.stack([row["pixel_values"] for row in rows(8, seed=1)])
    codes = tokenizer.encode(pixels)
    error = (tokenizer.decode(codes) - pixels).square().mean(dim=(1, 2, 3))
    expected = sum(10 * math.log10(4 / e) for e in error.tolist()) / 8
    assert abs(metrics["eval_psnr"] - expected) < 1e-3
    counts = [int((codes == k).sum()) for k in range(24)]
    shares = [c / codes.numel() for c in counts if c]
    assert abs(metrics["eval_codebook_usage"] - len(shares) / 24) < 1e-6
    assert abs(metrics["eval_codebook_perplexity"] - math.prod(p**-p for p in shares)) < 1e-6


def test_a_smaller_last_micro_batch_weighs_as_its_pictures(tmp_path):
    trained = []
    for size, accumulated in ((4, 1), (2, 2)):  # 7 pictures: steps of 4 and of 3
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated, "optim": "sgd"}
        trainer = tokenizer_trainer(tmp_path, 2, restart_every=0, **options)
        trainer.train_dataset = rows(7)
        trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        trained.append((losses, torch.cat([p.detach().flatten() for p in trainer.model.parameters()])))
    (losses, weights), (other_losses, other_weights) = trained
    assert losses == pytest.approx(other_losses, rel=1e-5)
    torch.testing.assert_close(weights, other_weights, rtol=0, atol=1e-6)


def test_pictures_that_fill_the_last_batch_of_several_processes_count_once(tmp_path, monkeypatch):
    trainer = tokenizer_trainer(tmp_path)
    expected = trainer.evaluate()  # batches of 3, 3 and 2
    for name in ("_codes", "_quality"):
        getattr(trainer, name).zero_()
    trainer._eval_rows, pictures = 8, rows(8, seed=1)
    for rank in (0, 1):  # the batches 0 and 2, and 1 and 3, of which the first pictures come again
        monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
        monkeypatch.setattr(type(trainer.accelerator), "process_index", rank)
        trainer._eval_batch = 0
        for first in (3 * rank, 6 + 3 * rank):
            batch = torch.stack([pictures[i % 8]["pixel_values"] for i in range(first, first + 3)])
            trainer.prediction_step(trainer.model.eval(), {"pixel_values": batch}, True)
    total, count = trainer._quality.tolist()
    assert count == 8 and total / 8 == pytest.approx(expected["eval_psnr"])
    used = (trainer._codes > 0).float().mean().item()
    assert used == expected["eval_codebook_usage"] and trainer._codes.sum() == 8 * 16


def test_pictures_are_mirrored_by_the_step(tmp_path):
    def seen(mirror):
        trainer, pixels = tokenizer_trainer(tmp_path, 2, mirror=mirror), []
        trainer.model.register_forward_pre_hook(lambda module, args: pixels.append(args[0]))
        trainer.train()
        return torch.cat(pixels)

    plain, mirrored, again = seen(False), seen(True), seen(True)
    assert torch.equal(mirrored, again)
    flipped = [torch.equal(a, b.flip(-1)) for a, b in zip(mirrored, plain, strict=True)]
    assert 0 < sum(flipped) < 8
    assert all(f or torch.equal(a, b) for f, a, b in zip(flipped, mirrored, plain, strict=True))


def test_rows_that_are_no_pictures_are_named_and_predictions_are_reconstructions(tmp_path):
    good = rows(8)
    wrong = {
        "three columns": ({"pictures": good[0]["pixel_values"]}, "must have `pixel_values`"),
        "8 bits": (
            {"pixel_values": torch.full((3, 8, 8), 255.0)},
            r"row 5 of the evaluation data: .*255.*2 \* image / 255",
        ),
        "no number": ({"pixel_values": torch.full((3, 8, 8), float("nan"))}, "row 5 of the evaluation data.*nan"),
    }
    trainer = tokenizer_trainer(tmp_path, 1)
    for bad, message in wrong.values():
        data = [*good[:5], bad] if "pixel_values" in bad else [bad] * 3
        refused(message, trainer.evaluate, data)
    small = [{"pixel_values": torch.zeros(3, 4, 4)}] * 2
    refused(r"row 0 of the evaluation data: `pixel_values` is of shape \(3, 4, 4\)", trainer.evaluate, small)
    labelled = [{**row, "label": 1} for row in good]
    found = trainer.predict(labelled)
    pixels = torch.stack([row["pixel_values"] for row in good])
    assert torch.equal(torch.tensor(found.label_ids), pixels)
    with torch.no_grad():
        expected = trainer.model.eval()(pixels).pixel_values
    torch.testing.assert_close(torch.tensor(found.predictions), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_codes_and_pictures_have_no_dropout_in_the_midst_of_a_training(tmp_path):
    model, pixels = tokenizer_trainer(tmp_path).model, torch.stack([row["pixel_values"] for row in rows(4)])
    dropouts = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    codes = model.eval().encode(pixels)
    pictures = model.decode(codes)
    for module in dropouts:
        module.p = 0.5
    model.train()
    assert dropouts and not model(pixels).codes.equal(codes)  # the training's own pass has it
    assert model.encode(pixels).equal(codes) and model.decode(codes).equal(pictures)
    assert all(module.training for module in model.modules())
