# SPDX-License-Identifier: Apache-2.0
"""Recipes are used as a person would: every YAML is read by its recipe, and each recipe runs on a little text."""

import importlib
import json
import os
import re
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM

import convert_mdlm
import distill_sdtt
import posttrain_consistency
import prepare_images
import quickstart
import sample
import sample_images
import train_imagenette
import train_owt
import train_vq
from fpmgm import FPMaskGITPipeline, command_line
from fpmgm.command_line import parse_arguments
from fpmgm.data import load_text, train_tokenizer
from fpmgm.trainers import ConsistencyConfig, ConversionConfig, ImageTokenizerConfig, MGMTrainingConfig, SDTTConfig
from fpmgm.trainers.peft import LoraArguments
from image_data import CodesArguments, PictureArguments
from narration import say_what_is_trained
from tests.recipes.options import QUIET, RECIPES, SHORT, SMALL, configured
from tests.testing_utils import refused, saved_adapter, tiny_image_model, tiny_image_tokenizer, tiny_model
from tests.trainers.training_utils import make_trainer, token_rows
from text_data import DataArguments, PromptArguments
from train_and_export import OptionalStartArguments, StartArguments


DOCS = RECIPES.parent / "docs"


@pytest.fixture(scope="module")
def text_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog, and over what else it finds.\n" * 300)
    return str(path)


DATA = (DataArguments, CodesArguments)
READERS = {
    "fp_mdlm": (train_owt.ModelArguments, OptionalStartArguments, DataArguments, MGMTrainingConfig),
    "mdlm": (train_owt.ModelArguments, OptionalStartArguments, DataArguments, MGMTrainingConfig),
    "fp_maskgit": train_imagenette.TYPES,
    "maskgit": train_imagenette.TYPES,
    "consistency": (StartArguments, LoraArguments, *DATA, ConsistencyConfig),
    "convert": (StartArguments, convert_mdlm.ConvertArguments, LoraArguments, *DATA, ConversionConfig),
    "sdtt": (StartArguments, LoraArguments, *DATA, SDTTConfig),
    "sft": (train_owt.ModelArguments, OptionalStartArguments, PromptArguments, MGMTrainingConfig),
    "vq": (PictureArguments, train_vq.VQArguments, ImageTokenizerConfig),
}


@pytest.mark.parametrize("config", sorted(RECIPES.glob("configs/*.yaml")), ids=lambda path: path.name)
def test_every_yaml_is_read_by_its_recipe(config, monkeypatch):
    monkeypatch.setattr(command_line, "check_names", lambda *found: None)  # what they start from is not here
    types = READERS[config.stem.rsplit("_", 1)[0]]
    argv = ["--config", str(config), "--bf16", "False", "--use_cpu"]
    values = yaml.safe_load(config.read_text()) | {"bf16": False, "use_cpu": True}
    read = {name: value for instance in parse_arguments(types, "", argv) for name, value in vars(instance).items()}
    assert {name: read[name] for name in values} == values
    assert parse_arguments(types, "", [*argv, "--max_steps", "7"])[-1].max_steps == 7


SCRIPTS = sorted(path for path in RECIPES.glob("*.py") if "parse_arguments(" in path.read_text("utf-8"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_every_recipe_has_a_help_with_its_usage_as_written(path, capsys):
    if path.name in ("judged_samples.py", "train_and_export.py"):
        pytest.skip("shared by recipes")
    recipe = importlib.import_module(path.stem)
    with pytest.raises(SystemExit):
        recipe.main(["plans", "--help"] if path.stem == "sweep" else ["--help"])
    shown = capsys.readouterr().out
    usage = [line for line in recipe.__doc__.splitlines() if f"recipes/{path.name}" in line]
    assert usage and all(line in shown.splitlines() for line in usage)
    assert "\nCommon:\n  --config" in shown


def test_every_yaml_starts_from_what_a_command_in_its_first_lines_makes():
    texts = {path.name: path.read_text(encoding="utf-8") for path in RECIPES.glob("configs/*.yaml")}
    makers = {yaml.safe_load(text)["output_dir"]: name for name, text in texts.items()}
    assert len(makers) == len(texts)
    starts = {name: yaml.safe_load(text).get("model_name_or_path") for name, text in texts.items()}
    starts = {name: start for name, start in starts.items() if (start or "").startswith("outputs/")}
    assert {name: f"--config recipes/configs/{makers[start]}" in texts[name] for name, start in starts.items()} == (
        dict.fromkeys(starts, True)
    )
    # The order in which the documents give them.
    commands = re.findall(r"--config recipes/configs/(\w+_small\.yaml)", (DOCS / "posttraining.md").read_text("utf-8"))
    assert {name for name in starts if "small" in name} <= set(commands)
    assert all(makers[starts[name]] in commands[:place] for place, name in enumerate(commands) if name in starts)


@pytest.mark.parametrize("config", sorted(RECIPES.glob("accelerate/*.yaml")), ids=lambda path: path.name)
def test_every_launch_configuration_is_read_by_accelerate(config):
    engines = {"ddp": "MULTI_GPU", "zero1": "DEEPSPEED", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED", "fsdp2": "FSDP"}
    read = load_config_from_file(str(config))  # refuses unknown names, but not inside the engine's part
    assert read.distributed_type == engines[config.stem]
    options = vars(launch_command_parser().parse_args(["script.py"]))
    assert set(read.deepspeed_config) | set(read.fsdp_config) <= set(options)
    if read.distributed_type == "DEEPSPEED":
        assert read.deepspeed_config["zero_stage"] == int(config.stem[-1])


def test_an_adapter_is_no_start(tmp_path, text_file):
    saved_adapter(tmp_path, tiny_model())
    argv = ["--model_name_or_path", str(tmp_path / "adapter"), "--text_files", text_file, *QUIET]
    for recipe in (train_owt, convert_mdlm, posttrain_consistency, distill_sdtt):
        output_dir = ["--output_dir", str(tmp_path / "out")]
        refused(r"`model_name_or_path`=.*is an adapter: start from its model", recipe.main, [*argv, *output_dir])


def test_a_run_that_epochs_plan_is_told_in_epochs(tmp_path, capsys):
    trainer = make_trainer(tmp_path, num_train_epochs=2.5, max_steps=-1, eval_dataset=token_rows(4))
    say_what_is_trained(trainer, None)
    assert f"run: 2.5 epochs in steps of 4 rows in {tmp_path}, from its beginning" in capsys.readouterr().out


def test_training_goes_on_from_its_last_checkpoint_and_the_result_can_be_sampled(tmp_path, text_file, capsys):
    folder = tmp_path / "model"
    argv = [*configured("fp_mdlm_small"), "--text_files", text_file, *SMALL, *QUIET]
    argv += ["--tokenizer_vocab_size", "280", "--max_position_embeddings", "16", "--warmup_steps", "1"]
    argv += ["--save_steps", "2", "--eval_steps", "2", "--per_device_train_batch_size", "4"]
    argv += ["--output_dir", str(folder)]
    train_owt.main([*argv, "--max_steps", "2"])
    said = capsys.readouterr().out
    assert "tokenizer: trained here on 1 local file(s), 280 tokens" in said
    assert "model: 1 pre, 1 fixed-point, 1 post blocks; " in said and " rows of 16 tokens to train on, " in said
    assert f"run: 2 steps of 4 rows in {folder}, from its beginning" in said
    metrics = train_owt.main([*argv, "--max_steps", "4"])
    said = capsys.readouterr().out
    assert f"resuming from {folder / 'checkpoint-2'}" in said
    shown = f"{metrics['eval_perplexity']:.2f} ± {metrics['eval_perplexity_stderr']:.2f}"
    assert f"exported to {folder}: validation perplexity {shown}" in said
    next_recipe = f"consistency_small.yaml --model_name_or_path {folder} --text_files {text_file}"
    assert f"next:\n    python recipes/sample.py --model {folder}\n" in said and next_recipe in said
    history = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    assert {entry["step"] for entry in history if "eval_loss" in entry} == {2, 4}  # the second run went on
    straight = train_owt.main([*argv, "--max_steps", "4", "--output_dir", str(tmp_path / "straight")])
    assert straight["eval_loss"] == metrics["eval_loss"]
    os.truncate(folder / "checkpoint-4/ema.safetensors", 100)  # so that it goes on from checkpoint-2
    assert train_owt.main([*argv, "--max_steps", "4"])["eval_loss"] == metrics["eval_loss"]
    trained = (folder / "train_results.json").read_text()
    assert train_owt.main([*argv, "--max_steps", "4"])["eval_loss"] == metrics["eval_loss"]  # nothing is left to do
    assert (folder / "train_results.json").read_text() == trained
    assert json.loads((folder / "eval_results.json").read_text())["eval_loss"] == metrics["eval_loss"]
    assert "1 local file(s)" in (folder / "README.md").read_text()

    prompt = ["--prompt", "The quick <|mask|*3> fox", "--num_samples", "2", "--device", "cpu"]
    texts = sample.main(["--model", str(folder), "--budget", "24", *prompt])
    assert len(texts) == 2 and all("The quick" in text and "<|mask|>" not in text for text in texts)
    output = tmp_path / "texts.jsonl"
    sample.main(["--model", str(folder), "--device", "cpu", "--budget", "12", "--output", str(output)])
    assert "12 block evaluations" in capsys.readouterr().out
    assert len(output.read_text().splitlines()) == 1


def test_an_adapter_is_trained_on_a_model_folder_and_can_be_sampled(tmp_path, text_file):
    data = ["--text_files", text_file, "--per_device_train_batch_size", "4", "--warmup_steps", "0", *QUIET]
    fresh = [*configured("fp_mdlm_small"), *SMALL, "--max_position_embeddings", "16", *data]
    base, adapter = str(tmp_path / "base"), str(tmp_path / "adapter")
    train_owt.main([*fresh, "--tokenizer_vocab_size", "280", "--max_steps", "2", "--output_dir", base])
    start = ["--model_name_or_path", base, "--tokenizer", base, *data, "--output_dir", adapter, "--max_steps", "2"]
    train_owt.main([*start, "--use_peft", "--lora_r", "2", "--num_pre_layers", "1", "--learning_rate", "0.1"])
    written = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (written["r"], written["base_model_name_or_path"]) == (2, base)
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert len(tensors) == 3 * 4 * 2 and all(2 in tensor.shape and tensor.any() for tensor in tensors.values())
    assert len(sample.main(["--model", adapter, "--budget", "12", "--device", "cpu"])) == 1

    for wrong, message in (
        (["--hidden_size", "32"], r"\{'hidden_size': 32\} is not what `model_name_or_path`"),
        (["--tokenizer", str(other_tokenizer(tmp_path))], "`tokenizer` has 270 tokens"),
    ):
        refused(message, train_owt.main, [*start, *wrong])
    refused(r"`use_peft`.*`model_name_or_path`", train_owt.main, [*fresh, "--use_peft", "--output_dir", adapter])


def other_tokenizer(folder: Path) -> Path:
    train_tokenizer(["the quick brown fox and the lazy dog"] * 3, 270).save_pretrained(folder / "tokenizer")
    return folder / "tokenizer"


@pytest.fixture
def stories(tmp_path, text_file) -> Path:
    """Released models and a judge as the quickstart expects them, tiny ones."""
    folder = tmp_path / "cards"
    tokenizer = train_tokenizer(load_text(text_files=[str(text_file)])["text"], 280)
    ids = {"vocab_size": len(tokenizer), "mask_token_id": tokenizer.mask_token_id}
    explicit = {"num_pre_layers": 3, "num_fixed_point_layers": 0, "num_post_layers": 0}
    for name in quickstart.STORYTELLERS:
        layers = {"input_injection": "diagonal"} if name == "stories-cofre" else explicit
        tiny_model(**ids, **layers, max_position_embeddings=128).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    judge = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=512, bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(judge).save_pretrained(folder / "stories-judge")
    tokenizer.save_pretrained(folder / "stories-judge")
    return folder


def test_the_quickstart_tells_stories_and_trains_a_model_that_loads(tmp_path, text_file, stories, capsys):
    options = "--vocab_size 280 --length 16 --hidden_size 16 --max_steps 3 --batch_size 4 --budgets 24 48"
    options += f" --num_samples 3 --eval_blocks 20 --num_stories 2 --stories {stories}"
    results = quickstart.main([*options.split(), "--text_files", str(text_file), "--output_dir", str(tmp_path)])
    assert [row["model"] for row in results["stories"]["rows"]] == [*quickstart.STORYTELLERS] * 2
    samplers = [("ancestral", "none"), ("ancestral", "3sr"), ("halton", "none")]
    assert [(row["order"], row["reuse"]) for row in results["samples"]] == samplers * 2
    assert all(row["block_evaluations"] <= row["budget"] for row in (*results["stories"]["rows"], *results["samples"]))
    assert "They were happy." in results["stories"]["completed"]
    assert "mask" not in results["stories"]["completed"]
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out
    assert (tmp_path / "denoising.png").stat().st_size > 1000
    model = AutoModel.from_pretrained(tmp_path / "fp_mdlm")
    assert model.generate(budget=12, seed=0).shape == torch.Size([1, 16])


@pytest.fixture(scope="module")
def mdlm(tmp_path_factory, text_file) -> str:
    folder = str(tmp_path_factory.mktemp("mdlm"))
    argv = [*configured("mdlm_small"), "--text_files", text_file, *SMALL, *QUIET]
    argv += ["--tokenizer_vocab_size", "280", "--max_position_embeddings", "16", "--num_pre_layers", "4"]
    train_owt.main([*argv, *SHORT, "--max_steps", "2", "--output_dir", folder])
    return folder


@pytest.mark.parametrize(
    ("recipe", "config", "options"),
    [
        (posttrain_consistency, "consistency_small", []),
        (posttrain_consistency, "consistency_small", ["--use_peft"]),
        (convert_mdlm, "convert_small", ["--cka_blocks", "4"]),
        (convert_mdlm, "convert_small", ["--layer_map", "1/2,3/4", "--initialize", "False"]),
        (distill_sdtt, "sdtt_small", ["--steps_per_round", "1", "--rounds", "2"]),
    ],
    ids=["consistency", "consistency of an adapter", "conversion by similarity", "conversion by hand", "sdtt"],
)
def test_recipes_go_on_from_a_model_folder_and_export_another(
    recipe, config, options, tmp_path, mdlm, text_file, capsys
):
    argv = [*configured(config), "--text_files", text_file, *QUIET, *SHORT, "--max_steps", "2"]
    argv += ["--model_name_or_path", mdlm, "--output_dir", str(tmp_path), *options]
    metrics = recipe.main(argv)
    again = recipe.main(argv)  # nothing is left to do
    assert again["eval_loss"] == metrics["eval_loss"] and again["before_loss"] == metrics["before_loss"]
    said = capsys.readouterr().out
    assert f"after {metrics['eval_perplexity']:.2f}" in said
    assert "next:" in said and f"recipes/{recipe.__name__}.py" not in said
    assert json.loads((tmp_path / "before_results.json").read_text())["before_loss"] == metrics["before_loss"]
    model = AutoModel.from_pretrained(tmp_path)
    assert model.generate(num_steps=2, seed=0).shape == torch.Size([1, 16])
    stacks = {1: (1, 1, 1), 2: (1, 2, 1)}.get(model.config.num_fixed_point_layers, (4, 0, 0))
    assert (model.config.num_pre_layers, model.config.num_fixed_point_layers, model.config.num_post_layers) == stacks
    assert (tmp_path / "cka.png").is_file() == (config == "convert_small" and "--layer_map" not in options)


def test_pictures_train_a_tokenizer_that_encodes_them(tmp_path, capsys):
    for split, name in (("train", "ant"), ("train", "cat"), ("val", "cat")):
        (tmp_path / "pictures" / split / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (20, 16), (60 * i, 200, len(name + split) * 9)).save(
                tmp_path / "pictures" / split / name / f"{i}.png"
            )
    source = ["--image_dir", str(tmp_path / "pictures")]
    argv = [*configured("vq_small"), *source, "--output_dir", str(tmp_path / "vq"), *QUIET]
    argv += ["--image_size", "16", "--codebook_size", "16", "--max_steps", "1", "--per_device_train_batch_size", "2"]
    metrics = train_vq.main(argv)
    assert f"PSNR {metrics['eval_psnr']:.2f} dB on 4 held-out pictures" in capsys.readouterr().out
    assert Image.open(tmp_path / "vq/reconstructions.png").size == (3 * 4 * 16, 3 * 2 * 16)
    argv = [*source, "--tokenizer", str(tmp_path / "vq"), "--output_dir", str(tmp_path / "codes"), "--augment", "flip"]
    codes = prepare_images.main([*argv, "--device", "cpu"])
    assert "train: 8 pictures, 0 unreadable, 16 rows" in capsys.readouterr().out
    assert codes["validation"]["class_labels"][:] == [1] * 4 and len(codes["train"][0]["input_ids"]) == 16


def test_a_pipeline_draws_a_grid_and_an_animation_and_into_a_picture(tmp_path, capsys):
    names = {0: "tench, Tinca tinca", 1: "3", 2: "gas pump"}
    model = tiny_image_model(num_classes=None, id2label=names)
    FPMaskGITPipeline(model, tiny_image_tokenizer()).save_pretrained(tmp_path / "pipeline")
    config, folder = tmp_path / "config.yaml", tmp_path / "pictures"
    config.write_text("class_labels: [gas pump, tench]\nnum_images_per_class: 2\nnum_steps: 5\nguidance_scale: 2.0\n")
    argv = ["--config", str(config), "--model", str(tmp_path / "pipeline"), "--output_dir", str(folder)]
    argv += ["--device", "cpu", "--budget", "25"]
    out = sample_images.main(argv)
    assert "4 picture(s)" in (printed := capsys.readouterr().out)
    assert "5 steps, 25 block evaluations each, 25 more for guidance" in printed
    files = ["0000-gas_pump.png", "0001-gas_pump.png", "0002-tench.png", "0003-tench.png", "grid.png", "reveal.gif"]
    assert sorted(path.name for path in folder.iterdir()) == files
    for name, drawn in zip(files, out.images, strict=False):
        with Image.open(folder / name) as image:
            assert image.tobytes() == drawn.tobytes()
    with Image.open(folder / "grid.png") as grid, Image.open(folder / "reveal.gif") as reveal:
        assert grid.size == reveal.size == (242, 242) and reveal.n_frames == 5  # of 2 × 2 pictures, enlarged

    Image.new("RGB", (24, 12), "red").save(tmp_path / "image.png")
    Image.linear_gradient("L").resize((24, 12)).save(tmp_path / "mask.png")  # white below
    argv = [*argv, "--image", str(tmp_path / "image.png"), "--mask", str(tmp_path / "mask.png")]
    out = sample_images.main([*argv, "--class_labels", "3", "2", "--budget", "10", "--num_steps", "2"])
    assert out.class_labels.tolist() == [1, 1, 2, 2]  # "3" is a name here, "2" an id
    assert (out.codes[:, :3] == out.codes[0, :3]).all() and (out.codes[:, 3:] != out.codes[0, 3:]).any()
