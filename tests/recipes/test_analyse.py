# SPDX-License-Identifier: Apache-2.0
"""The recipe that analyses models, on tiny ones."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoModel

import analyse
from fpmgm.analysis import masked_trajectory, measure_solver
from fpmgm.conversion import layer_similarity
from fpmgm.data import load_text, pack
from tests.evaluation.helpers import tiny_judge
from tests.testing_utils import refused, tiny_image_model, tiny_model


FEW = ["--num_sequences", "3", "--batch_size", "2", "--num_steps", "4"]
FEW += ["--lag_num_steps", "4", "6", "--lags", "1", "2"]
PICTURES = {"movement.png", "start_distances.png", "residuals.png", "lagged_divergence.png"}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A fixed-point model and an explicit one that share a tokenizer, and some text."""
    tokenizer = tiny_judge().tokenizer
    sizes = {"vocab_size": len(tokenizer), "mask_token_id": tokenizer.mask_token_id, "input_injection": "diagonal"}
    for name, layers in (("fp", 1), ("plain", 0)):
        tiny_model(scale=0.1, num_fixed_point_layers=layers, **sizes).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 3)
    return tmp_path


def test_text_is_analysed_once(folder, monkeypatch, capsys):
    models = ["--model", str(folder / "fp"), str(folder / "plain"), "--text_files", str(folder / "text.txt")]
    argv = [*models, *FEW, "--device", "cpu", "--output_dir", str(folder / "out")]
    found = analyse.main(argv)
    written = json.loads((folder / "out/analysis.json").read_text())
    assert written["models"]["fp"]["solver"] == found["models"]["fp"]["solver"]
    assert written["models"]["plain"]["solver"] is None and "torch" in written["provenance"]["versions"]
    pictures = {path.name for path in (folder / "out").glob("*.png") if path.stat().st_size > 5000}
    assert pictures == PICTURES | {"cka_fp.png", "cka_plain.png"}
    assert (folder / "out/analysis.md").read_text() in capsys.readouterr().out

    # the numbers are those of the library on the same blocks
    model = AutoModel.from_pretrained(folder / "fp")
    blocks = torch.tensor(pack(load_text(str(folder / "text.txt")), tiny_judge().tokenizer, 8)[:3]["input_ids"])
    expected = measure_solver(model, masked_trajectory(model, blocks, 4, seed=[0, 1, 2]))
    residuals = torch.tensor(written["models"]["fp"]["solver"]["residuals"]["3sr"])
    torch.testing.assert_close(residuals, expected.residuals[2].mean(dim=-1), rtol=1e-4, atol=1e-6)
    moved = torch.tensor(written["models"]["fp"]["solver"]["movement"]["masked"][1:3])
    torch.testing.assert_close(moved, expected.movement[1:3, 2].nanmean(dim=-1), rtol=1e-4, atol=1e-5)
    assert list(written["models"]["plain"]["lagged_divergence"]) == ["4", "6"]
    assert all(value > 0 for value in written["models"]["plain"]["lagged_divergence"]["6"]["mean"].values())
    similarity = layer_similarity(model, blocks.split(2))
    torch.testing.assert_close(torch.tensor(written["models"]["fp"]["similarity"]), similarity, rtol=1e-3, atol=1e-3)

    for name in ("measure_solver", "lagged_divergence", "layer_similarity"):
        monkeypatch.setattr(analyse, name, None)
    again = analyse.main(argv)
    assert json.dumps(again) == json.dumps(found)


@pytest.mark.slow
def test_what_a_model_writes_is_analysed(folder, monkeypatch):
    image = tiny_image_model(scale=0.1, input_injection="diagonal")
    image.save_pretrained(folder / "image")
    argv = ["--model", str(folder / "image"), *FEW, "--device", "cpu", "--output_dir", str(folder / "out")]
    found = analyse.main([*argv, "--guidance_scale", "2"])
    assert found["models"]["image"]["solver"]["shares"]["changed"][1] > 0
    monkeypatch.setattr(analyse, "sampled_trajectory", None)
    assert analyse.main([*argv, "--guidance_scale", "2"])["models"] == found["models"]
    with pytest.raises(TypeError):  # other sequences, which nobody has written yet
        analyse.main(argv)


def test_image_codes_are_analysed_with_their_classes(folder):
    image = tiny_image_model(scale=0.1, input_injection="diagonal")
    image.save_pretrained(folder / "image")
    rows = {"input_ids": torch.randint(0, 7, (3, 9)).tolist(), "class_labels": [0, 2, 1]}
    DatasetDict({"validation": Dataset.from_dict(rows)}).save_to_disk(folder / "codes")
    argv = ["--model", str(folder / "image"), "--codes_dir", str(folder / "codes"), *FEW]
    found = analyse.main([*argv, "--device", "cpu", "--output_dir", str(folder / "out")])
    rows = Dataset.from_dict(rows).shuffle(seed=0).with_format("torch")[:3]
    states = masked_trajectory(image, rows["input_ids"], 4, rows["class_labels"], [0, 1, 2])
    expected = measure_solver(image, states).residuals.mean(dim=-1)
    residuals = list(found["models"]["image"]["solver"]["residuals"].values())
    torch.testing.assert_close(torch.tensor(residuals), expected, rtol=1e-4, atol=1e-6)


def test_what_cannot_be_compared_is_refused(folder):
    other = tiny_model(vocab_size=12, mask_token_id=11)
    other.save_pretrained(folder / "other")
    quiet = ["--device", "cpu", "--output_dir", str(folder / "out")]
    with pytest.raises(ValueError, match="differ in \\(vocabulary, mask id\\)"):
        analyse.main(["--model", str(folder / "fp"), str(folder / "other"), *quiet])
    refused(r"names .* twice", analyse.main, ["--model", str(folder / "fp"), f"{folder}/./fp", *quiet])
    argv = ["--model", str(folder / "fp"), "--text_files", str(folder / "text.txt"), "--num_sequences", "500"]
    refused("the data give 22 sequences, fewer than `num_sequences`=500", analyse.main, [*argv, *quiet])
