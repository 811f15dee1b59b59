# SPDX-License-Identifier: Apache-2.0
"""Recipes are used as a person would: every YAML is read by its recipe, and each recipe runs on a little text."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fpmgm.data import train_tokenizer
from fpmgm.trainers import MGMTrainingConfig
from fpmgm.trainers.arguments import parse_arguments
from tests.testing_utils import tiny_config


RECIPES = Path(__file__).parents[2] / "recipes"
sys.path.insert(0, str(RECIPES))

import quickstart  # noqa: E402
import sample  # noqa: E402
import train_owt  # noqa: E402


SMALL = ["--hidden_size", "16", "--num_attention_heads", "2", "--intermediate_size", "32", "--conditioning_size", "8"]
QUIET = ["--use_cpu", "--disable_tqdm", "True", "--report_to", "none"]


@pytest.fixture(scope="module")
def text_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog, and over what else it finds.\n" * 300)
    return str(path)


@pytest.mark.parametrize("config", sorted(RECIPES.glob("configs/*.yaml")), ids=lambda path: path.name)
def test_every_yaml_is_read_by_its_recipe(config):
    types = (train_owt.ModelArguments, train_owt.DataArguments, MGMTrainingConfig)
    argv = ["--config", str(config), "--bf16", "False", "--use_cpu"]
    model_args, data, args = parse_arguments(types, "", argv)
    values = yaml.safe_load(config.read_text())
    for name in ("num_pre_layers", "num_fixed_point_layers"):
        assert getattr(model_args, name) == values[name]
    assert data.dataset_name == values.get("dataset_name")
    assert args.learning_rate == values["learning_rate"] and args.max_steps == values["max_steps"]
    assert parse_arguments(types, "", [*argv, "--max_steps", "7"])[2].max_steps == 7


def test_a_yaml_with_an_unknown_name_or_without_a_file_is_refused(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("output_dir: x\nnum_layers: 3\n")
    with pytest.raises(ValueError, match=r"sets \['num_layers'\]"):
        parse_arguments((MGMTrainingConfig,), "", ["--config", str(path)])
    with pytest.raises(ValueError, match=r"gone\.yaml.*does not exist"):
        parse_arguments((MGMTrainingConfig,), "", ["--config=gone.yaml"])


def test_training_goes_on_from_its_last_checkpoint_and_the_result_can_be_sampled(tmp_path, text_file, capsys):
    folder = tmp_path / "model"
    argv = ["--config", str(RECIPES / "configs/fp_mdlm_small.yaml"), "--text_files", text_file, *SMALL, *QUIET]
    argv += [
        "--tokenizer_vocab_size",
        "280",
        "--max_position_embeddings",
        "16",
        "--warmup_steps",
        "1",
        "--save_steps",
        "2",
    ]
    argv += ["--eval_steps", "2", "--per_device_train_batch_size", "4", "--output_dir", str(folder)]
    train_owt.main([*argv, "--max_steps", "2"])
    metrics = train_owt.main([*argv, "--max_steps", "4"])
    history = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    assert {entry["step"] for entry in history if "eval_loss" in entry} == {2, 4}  # the second run went on
    straight = train_owt.main([*argv, "--max_steps", "4", "--output_dir", str(tmp_path / "straight")])
    assert straight["eval_loss"] == metrics["eval_loss"]
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
    fresh = ["--config", str(RECIPES / "configs/fp_mdlm_small.yaml"), *SMALL, "--max_position_embeddings", "16", *data]
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
        with pytest.raises(ValueError, match=message):
            train_owt.main([*start, *wrong])
    with pytest.raises(ValueError, match=r"`use_peft`.*`model_name_or_path`"):
        train_owt.main([*fresh, "--use_peft", "--output_dir", adapter])


def other_tokenizer(folder: Path) -> Path:
    train_tokenizer(["the quick brown fox and the lazy dog"] * 3, 270).save_pretrained(folder / "tokenizer")
    return folder / "tokenizer"


def test_the_quickstart_writes_a_table_a_picture_and_models_that_load(tmp_path, text_file, capsys):
    argv = f"--text_files {text_file} --output_dir {tmp_path} --vocab_size 280 --length 16 --hidden_size 16".split()
    argv += [
        "--max_steps",
        "3",
        "--batch_size",
        "4",
        "--budgets",
        "24",
        "48",
        "--num_samples",
        "3",
        "--eval_blocks",
        "20",
    ]
    results = quickstart.main(argv)
    assert [row["reuse"] for row in results["samples"] if row["model"] == "fp_mdlm"] == ["none", "full", "3sr"] * 2
    assert all(row["block_evaluations"] <= row["budget"] for row in results["samples"])
    assert results["models"]["fp_mdlm"]["parameters"] < results["models"]["mdlm"]["parameters"]
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out
    assert (tmp_path / "denoising.png").stat().st_size > 1000
    from transformers import AutoModel

    model = AutoModel.from_pretrained(tmp_path / "fp_mdlm")
    assert model.generate(budget=12, seed=0).shape == torch.Size([1, 16])


def test_a_text_too_short_for_a_block_is_refused(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("Too short. " * 12)
    argv = ["--config", str(RECIPES / "configs/fp_mdlm_small.yaml"), "--text_files", str(path), *SMALL, *QUIET]
    argv += ["--output_dir", str(tmp_path / "out"), "--max_position_embeddings", "1024"]
    with pytest.raises(ValueError, match="shorter than one block of `length`=1024"):
        train_owt.main([*argv, "--tokenizer_vocab_size", "258"])


def test_model_arguments_are_the_architectures_own_fields():
    own = set(vars(train_owt.ModelArguments()))
    assert own < set(vars(tiny_config()))
    assert {"input_injection", "num_fixed_point_layers", "dropout"} < own and "vocab_size" not in own
