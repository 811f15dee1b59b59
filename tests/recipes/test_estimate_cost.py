# SPDX-License-Identifier: Apache-2.0
"""The cost recipe as a person would use it."""

import json

import pytest
import yaml

import estimate_cost
from fpmgm.analysis.cost import count_parameters
from tests.recipes.options import RECIPES
from tests.testing_utils import refused, tiny_config


SHORT = ["--budgets", "24", "--batch_size", "64", "--gpus", "4"]


@pytest.mark.slow
def test_presets_of_the_paper_and_of_one_and_eight_billion_weights(capsys):
    sizes = {name: count_parameters(estimate_cost.load_config(name, 0))["total"] for name in estimate_cost.MODELS}
    assert (sizes["mdlm"], sizes["fp_mdlm"]) == (169_627_218, 104_659_794)
    for name, size in sizes.items():
        if name.endswith("b"):
            assert size == pytest.approx(int(name[-2]) * 1e9, rel=0.08), name
    found = estimate_cost.main(["--model", "mdlm", "fp_mdlm", "--price", "2.5", *SHORT])
    printed = capsys.readouterr().out
    assert "169,627,218" in printed and "104,659,794" in printed and "| fsdp2 | yes |" in printed
    runs = [[row["run"].split()[0].rstrip(",") for row in model["runs"]] for model in found]
    assert runs == [["pretraining", "SDTT"], ["pretraining", "consistency", "conversion"]]
    for row in found[0]["runs"]:
        assert row["cost"] == pytest.approx(2.5 * 4 * row["hours"])
    assert [row["num_steps"] for model in found for row in model["sampling"]] == [2, 4]


@pytest.mark.slow
def test_what_makes_a_run_longer_or_fit():
    def run(*argv):
        return estimate_cost.main(["--model", "mdlm", *SHORT, *argv])[0]

    base = run()
    hours = base["runs"][0]["hours"]
    assert run("--steps", "500000")["runs"][0]["hours"] == pytest.approx(hours / 2)
    assert run("--utilisation", "0.055")["runs"][0]["hours"] == pytest.approx(2 * hours, rel=0.02)
    assert run("--checkpointing")["runs"][0]["hours"] > 1.2 * hours
    assert run("--hardware", "A100-80GB")["runs"][0]["hours"] > 3 * hours
    other = run("--gpus", "2", "--micro_batch_size", "16", "--sampling_batch_size", "64")  # the batch of `base` twice
    assert hours < other["runs"][0]["hours"] < 2 * hours  # shorter waits for the slowest
    assert base["sampling"][0]["seconds"] > other["sampling"][0]["seconds"]
    large = estimate_cost.main(["--model", "mdlm_8b", "--budgets", "72", *SHORT[2:]])[0]["memory"]
    fits = {(row["engine"], row["checkpointing"]): row["largest_micro_batch"] for row in large}
    assert (
        fits["ddp", False] is None and fits["fsdp2", True] >= 8 and fits["zero3", True] >= (fits["zero3", False] or 0)
    )


@pytest.mark.slow
def test_yaml_folder_and_json(tmp_path, capsys):
    small = yaml.safe_load((RECIPES / "configs/fp_mdlm_small.yaml").read_text())
    config = estimate_cost.load_config(str(RECIPES / "configs/fp_mdlm_small.yaml"), 50258)
    assert config.vocab_size == small["tokenizer_vocab_size"] and config.input_injection == "diagonal"
    assert config.hidden_size == small["hidden_size"] and config.mask_token_id == config.vocab_size - 1
    owt = estimate_cost.load_config(str(RECIPES / "configs/mdlm_owt.yaml"), 50258)
    assert count_parameters(owt)["total"] == 169_627_218

    tiny_config(num_pre_layers=2).save_pretrained(tmp_path)
    argv = ["--model", str(tmp_path), "--json", "--gpus", "1", "--batch_size", "8", "--budgets", "24"]
    found = estimate_cost.main([*argv, "--micro_batch_size", "2"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["models"] == json.loads(json.dumps(found)) and printed["arguments"]["gpus"] == 1
    (model,) = found
    assert model["parameters"] == count_parameters(tiny_config(num_pre_layers=2))
    assert [row["engine"] for row in model["memory"]] == ["single", "single"]
    assert all(row["gradients"] > 0 for row in model["memory"])  # four micro-batches
    assert model["runs"][0]["cost"] is None and model["runs"][0]["tokens"] == 1_000_000 * 8 * 8


@pytest.mark.slow
def test_images(capsys):
    argv = ["--gpus", "1", "--batch_size", "128", "--budgets", "48", "--model", "maskgit_large", "fp_maskgit"]
    found = estimate_cost.main([*argv, str(RECIPES / "configs/fp_maskgit_imagenette.yaml")])
    assert "186,221,569" in capsys.readouterr().out
    assert found[1] == {**found[2], "model": "fp_maskgit"}
    assert [[row["run"].split()[0] for row in model["runs"]] for model in found[:2]] == [
        ["pretraining"], ["pretraining", "consistency", "conversion"]
    ]  # fmt: skip
    assert found[0]["runs"][0]["tokens"] == 50_000 * 128 * 256
    assert [model["sampling"][0]["num_steps"] for model in found[:2]] == [2, 4]


def test_this_machine_is_timed(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    argv = ["--model", str(tmp_path), "--hardware", "cpu", "--gpus", "1", "--batch_size", "8", "--dtype", "float32"]
    (found,) = estimate_cost.main([*argv, "--budgets", "24"])
    assert found["sampling"][0]["seconds"] > 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--gpus", "3"], "`batch_size`=512 must be a multiple of `gpus`=3"),
        (["--gpus", "0"], "`gpus`=0 must be at least 1"),
        (["--hardware", "TPU"], "`hardware`='TPU' must be one of"),
        (["--utilisation", "1.5"], r"`utilisation`=1\.5 must lie in"),
        (["--dtype", "float16"], "`dtype`='float16' must be one of"),
        (["--model", str(RECIPES / "configs/convert_owt.yaml")], "does not set `num_pre_layers`"),
    ],
)
def test_bad_arguments_are_refused(argv, message):
    refused(message, estimate_cost.main, argv)


@pytest.mark.parametrize("name", ["mdlm_2b", "gone/folder", "gone.yaml"])
def test_a_model_that_does_not_exist_is_said_with_the_presets(name):
    with pytest.raises(ValueError, match=rf"`model`.*'{name}' does not exist.*or a preset \(mdlm, fp_mdlm"):
        estimate_cost.main(["--model", name, *SHORT])
