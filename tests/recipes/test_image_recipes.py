# SPDX-License-Identifier: Apache-2.0
"""The way of pictures through the recipes: codes, training, resuming, each post-training, and what must be refused."""

import json
import math
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, JanusVQVAEConfig

import convert_mdlm
import digits
import distill_sdtt
import posttrain_consistency
import sample_images
import train_and_export
import train_imagenette
from fpmgm.conversion import load_image_tokenizer
from fpmgm.models.image_tokenizer import to_uint8
from fpmgm.models.modeling_vqgan import VQGANModel
from tests.conversion.test_maskgit import CLASSES, CODES, SIDE, original_state
from tests.conversion.test_mdlm import explicit_model
from tests.conversion.test_mdlm import original_state as mdlm_state
from tests.recipes.options import QUIET, SHORT, configured
from tests.testing_utils import refused
from train_and_export import load_model


SMALL = ["--hidden_size", "16", "--num_attention_heads", "2", "--intermediate_size", "24"]
FEW = [*SHORT, *QUIET, "--lr_scheduler_type", "constant"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> str:
    folder, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, name in (("train", "ant"), ("train", "cat"), ("val", "ant"), ("val", "cat")):
        (folder / split / name).mkdir(parents=True)
        for i in range(4):
            pixels = generator.integers(0, 256, (16, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return str(folder)


def write_tokenizer(folder: Path, seed: int) -> str:
    """16 × 16 pixels become 4 × 4 of 12 codes, by random weights."""
    torch.manual_seed(seed)
    sizes = {"base_channels": 32, "channel_multiplier": [1, 1, 1], "num_res_blocks": 1, "latent_channels": 32}
    VQGANModel(JanusVQVAEConfig(num_embeddings=12, embed_dim=4, num_patches=4, **sizes)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, pictures) -> tuple[str, str, str]:
    """Folders of codes, of an FP-MaskGIT and of a MaskGIT trained on them."""
    folder = tmp_path_factory.mktemp("images")
    source = ["--image_dir", pictures, "--tokenizer", write_tokenizer(folder / "vq", 0)]
    data = ["--codes_dir", str(folder / "codes"), *SMALL, *FEW, "--max_steps", "2"]
    train_imagenette.main([*configured("fp_maskgit_small"), *source, *data, "--output_dir", str(folder / "fp")])
    layers = ["--num_pre_layers", "4", "--output_dir", str(folder / "maskgit")]
    train_imagenette.main([*configured("maskgit_small"), *data, *layers])  # the codes are there by now
    return tuple(str(folder / name) for name in ("codes", "fp", "maskgit"))


def test_pictures_become_codes_and_a_model_that_loads(prepared):
    codes, folder, _ = prepared
    model = AutoModel.from_pretrained(folder)
    config = model.config
    assert (config.codebook_size, config.grid_size, config.id2label) == (12, 4, {0: "ant", 1: "cat"})
    assert (config.num_pre_layers, config.num_fixed_point_layers, config.input_injection) == (1, 1, "diagonal")
    drawn = model.generate(class_labels=[0, 1], guidance_scale=2.0, num_steps=4, iterations=2, seed=0)
    assert drawn.shape == (2, 16) and drawn.max() < 12
    assert json.loads((Path(codes) / "preparation.json").read_text())["counts"]["train"]["rows"] == 16  # with flips
    assert "codes of 8 pictures of 2 classes" in (Path(folder) / "README.md").read_text()
    metrics = json.loads((Path(folder) / "eval_results.json").read_text())
    assert metrics["eval_loss"] == pytest.approx(math.log(12), rel=0.1)  # the codes of noise cannot be learned


def test_training_goes_on_from_its_last_checkpoint(prepared, tmp_path):
    codes, folder, _ = prepared
    argv = [*configured("fp_maskgit_small"), "--codes_dir", codes, *SMALL, *FEW, "--output_dir", str(tmp_path)]
    train_imagenette.main([*argv, "--max_steps", "1"])
    metrics = train_imagenette.main([*argv, "--max_steps", "2"])
    history = json.loads((tmp_path / "checkpoint-2/trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [1, 2]
    straight, resumed = (load_file(Path(f) / "model.safetensors") for f in (folder, tmp_path))
    assert all(torch.equal(resumed[name], expected) for name, expected in straight.items())
    assert json.loads((Path(folder) / "eval_results.json").read_text())["eval_loss"] == metrics["eval_loss"]


@pytest.mark.parametrize(
    ("recipe", "config", "start", "options", "stacks"),
    [
        (train_imagenette, "fp_maskgit_small", "fp", ["--use_peft", "--lora_r", "2", *SMALL], None),
        (posttrain_consistency, "consistency_small", "fp", [], (1, 1, 1)),
        (posttrain_consistency, "consistency_small", "maskgit", ["--use_peft"], None),
        (convert_mdlm, "convert_small", "maskgit", ["--cka_blocks", "4"], (1, 1, 1)),
        (convert_mdlm, "convert_imagenette", "maskgit", ["--layer_map", "1/2,3/4", "--bf16", "False"], (1, 2, 1)),
        (distill_sdtt, "sdtt_small", "fp", ["--steps_per_round", "1", "--rounds", "2"], (1, 1, 1)),
    ],
    ids=["adapter", "consistency", "consistency of an adapter", "conversion by similarity", "by hand", "sdtt"],
)
def test_recipes_go_on_from_an_image_model_and_export_another(
    recipe, config, start, options, stacks, prepared, tmp_path
):
    codes, start = prepared[0], prepared[1 if start == "fp" else 2]
    argv = [*configured(config), "--codes_dir", codes, *FEW, "--dataloader_num_workers", "0", *options]
    argv += ["--max_steps", "2"]
    metrics = recipe.main([*argv, "--model_name_or_path", start, "--output_dir", str(tmp_path)])
    assert metrics["eval_loss"] < 2 * math.log(12)
    assert (tmp_path / "preparation.json").read_text() == (Path(codes) / "preparation.json").read_text()
    model = AutoModel.from_pretrained(tmp_path)
    assert model.generate(class_labels=1, num_steps=2, seed=0).shape == (1, 16)
    if stacks is None:
        adapter = load_file(tmp_path / "adapter_model.safetensors")
        assert any("gate_proj" in name for name in adapter) and any(tensor.any() for tensor in adapter.values())
    else:
        names = ("num_pre_layers", "num_fixed_point_layers", "num_post_layers")
        assert tuple(getattr(model.config, name) for name in names) == stacks
        assert model.config.id2label == {0: "ant", 1: "cat"}


def write_codes(folder: Path, rows: list[list[int]], labels: list[int], **changes) -> str:
    """A folder as preparation leaves it, by default for `original_state`'s model, with `changes` of what it says."""
    names = [f"class {i}" for i in range(CLASSES)]
    dataset = Dataset.from_dict({"input_ids": rows, "class_labels": labels})
    if all(label < CLASSES for label in labels):
        dataset = dataset.cast_column("class_labels", ClassLabel(names=names))
    DatasetDict({"train": dataset, "validation": dataset}).save_to_disk(folder)
    preparation = {"grid_size": SIDE, "codebook_size": CODES, "classes": names, "codebook": "0"}
    counts = {"train": {"pictures": len(rows)}}
    (folder / "preparation.json").write_text(json.dumps({**preparation, "counts": counts, **changes}))
    return str(folder)


def test_an_original_maskgit_is_converted_on_codes_and_goes_on(tmp_path):
    torch.save({"model_state_dict": original_state(384, heads=6)}, tmp_path / "maskgit.pth")  # the tiny size's width
    codes = write_codes(tmp_path / "codes", [[i % CODES] * 9 for i in range(8)], [i % CLASSES for i in range(8)])
    argv = ["--codes_dir", codes, *FEW, "--model_name_or_path", str(tmp_path / "maskgit.pth"), "--max_steps", "1"]
    layers = ["--layer_map", "1/2/2", "--output_dir", str(tmp_path / "converted")]
    assert math.isfinite(convert_mdlm.main([*configured("convert_small"), *argv, *layers])["eval_loss"])
    assert AutoModel.from_pretrained(tmp_path / "converted").config.num_attention_heads == 6
    tuned = ["--output_dir", str(tmp_path / "tuned"), "--learning_rate", "1e-4"]
    assert math.isfinite(train_imagenette.main([*argv, *tuned])["eval_loss"])


def test_the_command_that_training_ends_with_draws_pictures(prepared, tmp_path):
    folder = prepared[1]
    told = json.loads((Path(folder) / "preparation.json").read_text())
    command = shlex.split(train_imagenette.sampling_command(folder, told))
    assert command[:2] == ["python", "recipes/sample_images.py"]
    small = ["--num_steps", "2", "--device", "cpu", "--output_dir"]
    out = sample_images.main([*command[2:], *small, str(tmp_path / "told")])
    grid = Image.open(tmp_path / "told/grid.png")
    assert grid.size == (128, 128) and (tmp_path / "told/reveal.gif").is_file()  # 16 pixels, eight times as large
    tokenizer = load_image_tokenizer(told["tokenizer"])
    pixels = tokenizer.decode(AutoModel.from_pretrained(folder).generate(class_labels=0, num_steps=2, seed=0))
    assert np.array_equal(np.asarray(out.images[0]), to_uint8(pixels)[0].permute(1, 2, 0).numpy())
    found = sample_images.main(["--model", folder, "--class_labels", "ant", *small, str(tmp_path / "found")])
    assert torch.equal(found.codes, out.codes)

    other = ["--model", folder, "--tokenizer", write_tokenizer(tmp_path / "vq", 1)]
    with pytest.raises(ValueError, match="was trained on codes of another image tokenizer than `tokenizer`="):
        sample_images.main([*other, *small, str(tmp_path / "other")])
    untold = shutil.copytree(folder, tmp_path / "untold")
    (untold / "preparation.json").write_text(json.dumps({**told, "tokenizer": None}))
    with pytest.raises(ValueError, match=r"`tokenizer` is needed: `model`='.*untold' is no pipeline"):
        sample_images.main(["--model", str(untold), *small, str(tmp_path / "untold")])
    (tmp_path / "photo.png").write_bytes(b"no picture")
    image = ["--image", str(tmp_path / "photo.png"), "--mask", str(tmp_path / "photo.png")]
    with pytest.raises(ValueError, match=r"`image`='.*photo\.png' cannot be read: it is none of"):
        sample_images.main([*command[2:], *image, *small, str(tmp_path / "photo")])


def test_training_says_how_to_draw(prepared, tmp_path, capsys):
    argv = ["--codes_dir", prepared[0], *FEW, "--model_name_or_path", prepared[1], "--max_steps", "1"]
    train_imagenette.main([*argv, "--output_dir", str(tmp_path), "--learning_rate", "1e-4"])
    told = json.loads((tmp_path / "preparation.json").read_text())
    assert f"draw with: {train_imagenette.sampling_command(str(tmp_path), told)}\n" in capsys.readouterr().out


def test_recipes_start_from_descendants_of_mdlm_too(tmp_path, monkeypatch):
    teacher = explicit_model()
    save_file(mdlm_state(teacher, prefix=""), tmp_path / "model.safetensors")  # DiDi-Instruct: no configuration
    torch.testing.assert_close(load_model(str(tmp_path)).state_dict(), teacher.state_dict(), rtol=0, atol=0)
    (tmp_path / "config.json").write_text('{"model": {"n_heads": 2, "length": 8}}', encoding="utf-8")  # SDTT: no type
    assert load_model(str(tmp_path)).config.max_position_embeddings == 8
    explicit_model().bfloat16().save_pretrained(tmp_path / "ours")
    assert load_model(str(tmp_path / "ours")).dtype == torch.float32
    asked = []
    monkeypatch.setattr(train_and_export, "cached_file", lambda *names, revision, **kwargs: asked.append(revision))
    monkeypatch.setattr(train_and_export, "load_mdlm", lambda name, revision: asked.append((name, revision)))
    load_model("jdeschena/sdtt", "scaling")
    assert asked == ["scaling", "scaling", ("jdeschena/sdtt", "scaling")]


@pytest.mark.slow
def test_digits_need_no_download_and_go_on_with_the_models_that_are_missing(tmp_path, monkeypatch):
    argv = ["--output_dir", str(tmp_path), "--hidden_size", "16", "--max_steps", "2", "--consistency_steps", "2"]
    argv += ["--batch_size", "8", "--num_samples", "20", "--budgets", "6", "--reuse", "none", "3sr"]
    monkeypatch.setattr(digits, "MODELS", {**digits.MODELS, "maskgit-12": (2, 0, 0)})
    first = digits.main(argv)["runs"]
    assert [each["further"] for each in first] == [None, "further", "consistency"]
    assert len({each["validation_loss"] for each in first}) == 3
    assert [row["guidance_evaluations"] > 0 for row in first[0]["samples"]] == [False, True, True] * 2
    check_sheet(np.asarray(Image.open(tmp_path / "digits.png").convert("L")), rows=3 * 3)
    results = digits.main([*argv, "--models", "fp-maskgit", "maskgit-12"])
    assert results["held_out"]["recognised"] > 0.95  # real digits, by a judge that saw others
    assert json.loads((tmp_path / "results.json").read_text())["runs"] == results["runs"]
    assert results["runs"][:3] == first and len(results["runs"]) == 2 * 3
    assert len(results["runs"][-1]["samples"]) == 3  # its blocks leave nothing to reuse
    assert f"{results['runs'][-1]['validation_loss']:.3f}" in (tmp_path / "results.md").read_text()
    with pytest.raises(ValueError, match=r"fp-maskgit_seed0 was made with \{'budgets': \[6\]\}: give the same"):
        digits.main([word if word != "6" else "12" for word in argv])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--reuse", "none", "half"], "`reuse`='half' must be one of"),
        (["--guidance_scales", "1", "-2"], "`guidance_scale`=-2"),
        (["--models", "fp-maskgit", "maskgit-24", "--budgets", "12"], "pay no step of 'maskgit-24'"),
        (["--seeds", "0", "1", "0"], r"`seeds`=\[0, 1, 0\] has one twice"),
        (["--num_samples", "15"], "`num_samples`=15 must be 20 at least"),
    ],
)
def test_what_digits_cannot_draw_is_said_before_anything_is_trained(tmp_path, options, message):
    refused(message, digits.main, ["--output_dir", str(tmp_path / "out"), "--hidden_size", "16", *options])
    assert not (tmp_path / "out").exists()


def check_sheet(sheet, rows: int) -> None:
    """Enlarged digits, words above and beside them."""
    side, gap = digits.ENLARGED * 8, 2
    top, left = sheet.shape[0] - rows * side - (rows - 1) * gap, np.flatnonzero((sheet < 255).mean(axis=0) > 0.5)[0]
    assert (sheet[:top] < 128).any() and (sheet[top:, : left - gap] < 128).any()
    for row in range(rows):
        for digit in range(10):
            tile = sheet[top + row * (side + gap) :, left + digit * (side + gap) :][:side, :side]
            assert (tile == np.kron(tile[:: digits.ENLARGED, :: digits.ENLARGED], np.ones((8, 8)))).all()


# --- what is refused -------------------------------------------------------------------------------------------------


def test_codes_that_a_model_does_not_read_are_refused(prepared, tmp_path, pictures):
    codes, fp, _ = prepared
    rows, labels = [[0] * 16] * 2, [0, 1]
    post = [*configured("consistency_small"), *FEW, "--max_steps", "1", "--output_dir", str(tmp_path / "out")]
    sizes = {"grid_size": 4, "codebook_size": 12}
    other = write_codes(tmp_path / "four_classes", rows, labels, **sizes)
    with pytest.raises(ValueError, match=r"'num_classes': 2.*`codes_dir` has .*'num_classes': 4"):
        posttrain_consistency.main([*post, "--model_name_or_path", fp, "--codes_dir", other])
    with pytest.raises(ValueError, match=r"`codes_dir`=None .*'fpmaskgit': give `codes_dir` to an image"):
        posttrain_consistency.main([*post, "--model_name_or_path", fp])
    with pytest.raises(ValueError, match=r"\{'eval_share': 0\.5\} does nothing where `codes_dir` is trained on"):
        posttrain_consistency.main([*post, "--model_name_or_path", fp, "--codes_dir", codes, "--eval_share", "0.5"])
    with pytest.raises(ValueError, match=r"\{'eval_images': 5\} does nothing where text is trained on"):
        posttrain_consistency.main([*post, "--model_name_or_path", fp, "--eval_images", "5"])
    with pytest.raises(ValueError, match="`tokenizer_subfolder`='vq' is of `tokenizer`"):
        sample_images.main(["--model", fp, "--tokenizer_subfolder", "vq"])

    retold = shutil.copytree(codes, tmp_path / "retold")
    written = json.loads((retold / "preparation.json").read_text())
    (retold / "preparation.json").write_text(json.dumps({**written, "codebook": "another"}))
    with pytest.raises(ValueError, match="codes of another tokenizer than `codes_dir`"):
        train_imagenette.main([*post[2:], "--model_name_or_path", fp, "--codes_dir", str(retold)])
    with pytest.raises(ValueError, match=r"\{'hidden_size': 32\} is not what `model_name_or_path`"):
        train_imagenette.main([*post[2:], "--model_name_or_path", fp, "--codes_dir", codes, "--hidden_size", "32"])

    fresh = [*configured("fp_maskgit_small"), *SMALL, *post[2:], "--image_dir", pictures, "--codes_dir", codes]
    with pytest.raises(ValueError, match=r"holds codes made with codebook=.*, and codebook=.* is asked for"):
        train_imagenette.main([*fresh, "--tokenizer", write_tokenizer(tmp_path / "vq", 1)])
    refused("`tokenizer` is needed", train_imagenette.main, fresh)
    refused("`codes_dir` is needed", train_imagenette.main, [*SMALL, *post[2:]])


def test_a_model_that_knows_other_classes_is_refused(prepared, tmp_path):
    codes, fp, _ = prepared
    folder = shutil.copytree(fp, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "id2label": {"0": "cat", "1": "ant"}}))
    argv = [*configured("sdtt_small"), *FEW, "--codes_dir", codes, "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=r"knows the classes \['cat', 'ant'\], but `codes_dir` \['ant', 'cat'\]"):
        distill_sdtt.main([*argv, "--model_name_or_path", str(folder)])
