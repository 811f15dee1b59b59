# SPDX-License-Identifier: Apache-2.0
"""The image pipeline gives what its parts give by hand, wherever it is saved, and the animation what they reveal."""

import json
import math
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fpmgm import FPMaskGITPipeline, make_grid, reveal_frames, save_animation
from fpmgm.models.image_processing import make_image_processor
from tests.testing_utils import refused, tiny_image_model, tiny_image_tokenizer, tiny_model


NAMES = {0: "tench, Tinca tinca", 1: "church", 2: "gas pump"}
SIDE, SIZE, MASK = 3, 12, 7


@pytest.fixture(scope="module")
def pipeline() -> FPMaskGITPipeline:
    return FPMaskGITPipeline(tiny_image_model(num_classes=None, id2label=NAMES), tiny_image_tokenizer())


def pixels_by_hand(pipeline, codes) -> np.ndarray:
    """(B, S, S, 3) 8-bit pixels, without the pipeline's own decoding."""
    pixels = pipeline.tokenizer.decode(codes.view(-1, SIDE, SIDE)).double().permute(0, 2, 3, 1)
    return np.rint((pixels.numpy() + 1) * 127.5).astype(np.uint8)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height))


SQUARE = picture(SIZE, SIZE)


# --- drawing ---------------------------------------------------------------------------------------------------------


def test_it_gives_what_the_parts_give_by_hand(pipeline):
    out = pipeline(["gas pump", 0, "Tinca tinca"], 2, budget=20, guidance_scale=2.0, seed=3)
    classes = [2, 2, 0, 0, 0, 0]
    expected = pipeline.model.generate(
        class_labels=classes, budget=20, guidance_scale=2.0, seed=3, return_dict_in_generate=True
    )
    assert torch.equal(out.codes, expected.sequences)
    assert out.class_labels.tolist() == classes
    assert (out.block_evaluations, out.num_steps) == (expected.block_evaluations, expected.num_steps)
    assert out.guidance_evaluations == expected.guidance_evaluations > 0
    assert [image.mode for image in out.images] == ["RGB"] * 6
    pixels = pixels_by_hand(pipeline, out.codes)
    assert len(np.unique(pixels)) > 50  # something that could differ
    assert np.array_equal(np.stack([np.asarray(image) for image in out.images]), pixels)


def test_without_classes_it_draws_as_many_as_asked_for(pipeline):
    out = pipeline(num_images_per_class=3, budget=20, seed=1)
    assert torch.equal(out.codes, pipeline.model.generate(batch_size=3, budget=20, seed=1))
    assert out.class_labels is None


def test_all_outputs_are_the_same_pixels_whatever_is_decoded_at_a_time(pipeline, monkeypatch):
    sizes, pixels_of = [], pipeline.tokenizer.pixels
    monkeypatch.setattr(pipeline.tokenizer, "pixels", lambda x: (sizes.append(len(x)), pixels_of(x))[1])
    pil, pt, array = (
        pipeline("church", 5, budget=20, seed=0, output_type=kind, decode_batch_size=2).images
        for kind in ("pil", "pt", "np")
    )
    assert sizes == 3 * [2, 2, 1]
    assert pt.dtype == torch.uint8 and pt.shape == (5, 3, SIZE, SIZE)
    assert np.array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(np.stack([np.asarray(image) for image in pil]), array)
    whole = pipeline("church", 5, budget=20, seed=0, output_type="np").images
    assert np.abs(whole.astype(int) - array).max() <= 1


def test_dropout_of_parts_in_training_is_off():
    model, tokenizer = tiny_image_model(dropout=0.9), tiny_image_tokenizer()
    pipeline = FPMaskGITPipeline(model.train(), tokenizer.train())
    assert not model.training and not tokenizer.training
    first, second = (pipeline(1, budget=20, seed=0).codes for _ in range(2))
    assert torch.equal(first, second)


# --- inpainting ------------------------------------------------------------------------------------------------------


def given_codes(pipeline, image) -> torch.Tensor:
    pixels = pipeline.processor(image, return_tensors="pt")["pixel_values"]
    return pipeline.tokenizer.encode(pixels).flatten(1)


def grid_mask() -> torch.Tensor:
    return torch.tensor([[0, 1, 0], [0, 0, 0], [1, 0, 1]]).bool()


def test_inpainting_keeps_the_codes_outside_the_mask(pipeline):
    image, wanted = picture(SIZE, SIZE), grid_mask().flatten()
    given = given_codes(pipeline, image)
    assert len(given.unique()) > 2
    out = pipeline([1, 2], 3, image=image, mask=grid_mask(), budget=15, seed=0)
    assert (out.codes[:, ~wanted] == given[:, ~wanted]).all()
    assert (out.codes[:, wanted] != given[:, wanted]).any()
    by_hand = pipeline.model.generate(
        given.masked_fill(wanted, MASK).repeat(6, 1), class_labels=[1, 1, 1, 2, 2, 2], budget=15, seed=0
    )
    assert torch.equal(out.codes, by_hand)


def test_pictures_and_masks_of_pixels_go_the_same_way(pipeline):
    # 48 × 24 pixels: halved to 24 × 12, of which the middle twelve columns stay. A white pixel at column 12 + 2·9 and
    # row 2·5 comes to column 9 and row 5: to the code in row 1, column 2.
    image, mask = picture(48, 24), Image.new("L", (48, 24))
    mask.putpixel((12 + 2 * 9, 2 * 5), 255)
    mask.putpixel((5, 5), 255)  # cropped away
    mask.putpixel((20, 20), 120)  # darker than half
    wanted = torch.zeros(9, dtype=torch.bool)
    wanted[1 * SIDE + 2] = True
    out = pipeline("church", image=image, mask=mask, num_steps=1, iterations=2, seed=0)
    masked = given_codes(pipeline, image).masked_fill(wanted, MASK)
    expected = pipeline.model.generate(masked, class_labels=1, num_steps=1, iterations=2, seed=0)
    assert torch.equal(out.codes, expected)
    pixels = np.zeros((SIZE, SIZE))
    pixels[5, 9] = 1
    again = pipeline("church", image=image, mask=pixels, num_steps=1, iterations=2, seed=0)
    assert torch.equal(again.codes, expected)


def test_several_pictures_with_a_mask_each(pipeline):
    images = [picture(SIZE, SIZE, seed) for seed in (1, 2)]
    masks = [grid_mask(), ~grid_mask()]
    out = pipeline(2, 2, image=images, mask=masks, budget=15, seed=0)
    for row, (which, codes) in enumerate(zip([0, 0, 1, 1], out.codes, strict=True)):
        kept = ~masks[which].flatten()
        assert torch.equal(codes[kept], given_codes(pipeline, images[which])[0, kept]), row
    assert out.class_labels.tolist() == [2] * 4


@torch.no_grad()
def test_pictures_may_be_arrays_tensors_and_generators(pipeline):
    images = [picture(SIZE, SIZE, seed) for seed in (1, 2)]
    expected = torch.cat([given_codes(pipeline, image) for image in images])
    arrays = [np.asarray(image) for image in images]
    tensors = [torch.from_numpy(array.copy()).permute(2, 0, 1) for array in arrays]
    for given in (images, iter(images), arrays, np.stack(arrays), tensors, torch.stack(tensors), (x for x in tensors)):
        assert torch.equal(pipeline.encode(given), expected)
    assert torch.equal(pipeline.encode(arrays[0]), expected[:1])
    call = {"class_labels": 1, "image": (x for x in images), "mask": iter([grid_mask()] * 2), "budget": 15, "seed": 0}
    assert torch.equal(pipeline(**call).codes, pipeline(**call | {"image": images, "mask": grid_mask()}).codes)
    assert torch.equal(
        pipeline(iter(["church", 2]), budget=20, seed=0).codes, pipeline([1, 2], budget=20, seed=0).codes
    )


def test_a_given_picture_is_what_viewers_show(pipeline):
    ramp = (257 * np.arange(SIZE**2, dtype=np.uint16)).reshape(SIZE, SIZE)
    eight = Image.fromarray((ramp // 257).astype(np.uint8))
    assert torch.equal(pipeline.encode(Image.fromarray(ramp)), pipeline.encode(eight))
    see_through = picture(SIZE, SIZE)
    see_through.putalpha(0)
    assert torch.equal(pipeline.encode(see_through), pipeline.encode(Image.new("RGB", (SIZE, SIZE), "white")))


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": "trout"}, r"'trout' must be a name.*one of \['tench, Tinca tinca', 'church', 'gas pump'\]"),
        ({"class_labels": ["church", 4]}, r"`class_labels`=\[1, 4\] must be .* from 0 to 2, or 3 for no class"),
        ({"class_labels": []}, r"`class_labels`=\[\] must be"),
        ({"num_images_per_class": 0}, "`num_images_per_class`=0 must be a whole number of pictures"),
        ({"decode_batch_size": 0}, "`decode_batch_size`=0 must be a whole number of pictures"),
        ({"output_type": "jpg"}, r"`output_type`='jpg' must be one of \('pil', 'pt', 'np'\)"),
        ({"image": SQUARE}, "`mask`=None: give `image` and"),
        ({"mask": grid_mask()}, "`image`=None: give `image` and"),
        ({"image": SQUARE, "mask": torch.zeros(3, 3)}, "`mask` marks nothing"),
        ({"image": SQUARE, "mask": torch.ones(4, 4)}, r"\(4, 4\) must be \(3, 3\) codes or \(12, 12\) pixels"),
        ({"image": SQUARE, "mask": Image.new("L", (9, 9), 255)}, r"size \(9, 9\) must have the size \(12, 12\)"),
        ({"image": [SQUARE] * 2, "mask": [grid_mask()] * 3}, "3 masks for 2 pictures"),
        ({"image": [SQUARE] * 2, "mask": grid_mask(), "class_labels": [0, 1, 2]}, "2 pictures for 3 entries of `cl"),
        ({"max_length": 3}, r"unknown generation argument.*max_length"),
        ({"image": picture(400, 2), "mask": grid_mask()}, r"`image`: 400 × 2 pixels: the longer side may be 20 times"),
        ({"image": SQUARE, "mask": "all"}, r"`mask`='all' must be a `PIL\.Image\.Image`, a tensor or an array"),
        ({"image": [], "mask": grid_mask()}, r"`image`=\[\] holds no picture"),
    ],
)
def test_mistakes_are_named(pipeline, arguments, message):
    refused(message, pipeline, **arguments)


@pytest.mark.parametrize(
    "image",
    ["http://127.0.0.1:9/a.png", "/etc/hostname", __file__, "data:image/png;base64,aaaa", b"bytes", Path(__file__), 3,
     {"path": __file__}, np.zeros((12, 12, 3)), np.zeros((12, 12), np.uint8), torch.zeros(12, 12, 3).byte()],
    ids=lambda image: str(image)[:20],
)  # fmt: skip
def test_only_pictures_are_taken_nothing_is_fetched_or_opened(pipeline, image, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("fetched or opened")

    monkeypatch.setattr(Image, "open", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    refused(r"`image`.* must be pictures: .*Addresses are not fetched", pipeline, image=image, mask=grid_mask())
    refused(r"`images`.* must be pictures", pipeline.encode, [image])


def test_names_of_many_classes_are_not_all_listed_and_shared_names_are_refused():
    names = {i: f"species {i:03d}" for i in range(40)} | {7: "crane", 9: "crane, lifting device"}
    pipeline = FPMaskGITPipeline(tiny_image_model(num_classes=None, id2label=names), tiny_image_tokenizer())
    assert refused(r"such as \['species 023'.*from 0 to 39", pipeline, "spezies 023").count("species") == 5
    refused(r"'crane' names the classes \[7, 9\]: give an id", pipeline, "crane")


@pytest.mark.parametrize(
    ("model", "tokenizer", "message"),
    [
        ({}, {"codebook_size": 9}, "`model` has `codebook_size`=7, `tokenizer` has `codebook_size`=9"),
        ({"grid_size": 4}, {}, "`model` has `grid_size`=4, `tokenizer` has `grid_size`=3"),
    ],
)
def test_parts_that_do_not_fit_are_refused_when_made_and_when_loaded(pipeline, tmp_path, model, tokenizer, message):
    model, tokenizer = tiny_image_model(**model), tiny_image_tokenizer(**tokenizer)
    refused(message, FPMaskGITPipeline, model, tokenizer)
    pipeline.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "vq")
    refused(message, FPMaskGITPipeline.from_pretrained, tmp_path)


def test_other_models_and_processors_are_refused():
    refused("`model_type`='fpmdlm' must be an image model", FPMaskGITPipeline, tiny_model(), tiny_image_tokenizer())
    with pytest.raises(ValueError, match="gives pictures of 16 × 16 pixels, `tokenizer` takes 12 × 12"):
        FPMaskGITPipeline(tiny_image_model(), tiny_image_tokenizer(), make_image_processor(16))


# --- folders ---------------------------------------------------------------------------------------------------------


def test_a_saved_pipeline_draws_the_same(pipeline, tmp_path):
    pipeline.processor.resample = 3
    pipeline.save_pretrained(tmp_path / "mine")
    loaded = FPMaskGITPipeline.from_pretrained(tmp_path / "mine")
    assert (loaded.processor.resample, loaded.model.config.id2label) == (3, NAMES)
    call = {"class_labels": ["church", 2], "budget": 20, "seed": 5, "output_type": "np"}
    expected, out = pipeline(**call), loaded(**call)
    assert torch.equal(out.codes, expected.codes)
    assert np.array_equal(out.images, expected.images)
    index = json.loads((tmp_path / "mine" / "model_index.json").read_text())
    assert index["_class_name"] == "FPMaskGITPipeline"
    assert index["model"] == ["fpmgm", "FPMaskGITModel"] and index["vq"] == ["fpmgm", "XQGANModel"]
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "| 2 | gas pump |" in card and "| `budget` | 96 |" in card and 'from_pretrained("mine")' in card


def test_the_model_alone_takes_another_dtype(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    loaded = FPMaskGITPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert (loaded.model.dtype, loaded.tokenizer.dtype) == (torch.bfloat16, torch.float32)
    assert loaded("church", budget=20, seed=0).images[0].size == (SIZE, SIZE)


def test_a_folder_of_something_else_is_refused(pipeline, tmp_path):
    pipeline.model.save_pretrained(tmp_path)
    load = FPMaskGITPipeline.from_pretrained
    refused(r"has no model_index\.json.*FPMaskGITPipeline\(model, tokenizer\)", load, tmp_path)
    refused(r"`path_or_repo`='.*gone' does not exist: correct the path", load, tmp_path / "gone")


def weights(part: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Damage to a part's weights."""

    def damage(folder: Path) -> None:
        path = folder / part / "model.safetensors"
        state = load_file(path)
        change(state)
        save_file(state, path, {"format": "pt"})

    return damage


def fields(name: str, **changes) -> Callable[[Path], None]:
    """Other values in a JSON file."""
    return lambda folder: (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))


NORM, MODEL, VQ = "final_norm.weight", "model/config.json", "vq/config.json"
PROCESSOR = "processor/preprocessor_config.json"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (weights("model", lambda w: w.pop(NORM)), r"model` do not fit FPMaskGITModel:\n  missing: final_norm"),
        (weights("vq", lambda w: w.pop("codebook")), r"vq` do not fit XQGANModel:\n  missing: codebook \(7, 4\)"),
        (weights("model", lambda w: w[NORM].fill_(math.nan)), "model` do not fit .*\n  not finite: final_norm"),
        (weights("vq", lambda w: w["codebook"][0].fill_(math.inf)), r"vq` do not fit .*\n  not finite: codebook"),
        (fields(VQ, num_hidden_layers=10**9), r"vq/config\.json' .*1,000,000,000 layers"),
        (fields(MODEL, grid_size=50), r"model` do not fit .*wrong shape: position_emb"),
        (fields(MODEL, grid_size=10**5), r"model/config\.json' cannot be read .*`grid_size`=100000 must be"),
        (fields(VQ, codebook_size=10**12), r"vq` do not fit .*wrong shape: codebook"),
        (fields(VQ, model_type="bert"), "vq' holds `model_type`='bert'"),
        (lambda f: (f / VQ).write_text("{"), r"vq/config\.json' cannot be read as a JSON object"),
        (lambda f: (f / MODEL).unlink(), r"model/config\.json' does not exist"),
        (lambda f: (f / "model/model.safetensors").write_bytes(b""), r"model/model\.safetensors' .* it is empty"),
        (lambda f: (f / "vq/model.safetensors").unlink(), r"vq' holds no weights"),
        (lambda f: (f / "model_index.json").write_text("[]"), r"model_index\.json' cannot be read"),
        (lambda f: (f / PROCESSOR).write_text("x"), "processor' cannot be read"),
        (fields(PROCESSOR, size={"shortest_edge": 10**9}), "do not fit together .*`processor` resizes pictures to"),
    ],
)
def test_a_damaged_or_hostile_folder_is_named(pipeline, tmp_path, damage, message):
    folder = tmp_path / "mine"
    pipeline.save_pretrained(folder)
    damage(folder)
    assert str(folder) in refused(f"(?s){message}", FPMaskGITPipeline.from_pretrained, folder)


# --- sheets and animations -------------------------------------------------------------------------------------------


def test_a_grid_shows_the_pictures_row_by_row():
    colors = [(10 * i, 20, 30) for i in range(5)]
    sheet = make_grid([Image.new("RGB", (4, 3), color) for color in colors], columns=3, scale=2)
    pixels = np.asarray(sheet)
    assert pixels.shape == (2 * 6 + 2, 3 * 8 + 2 * 2, 3)
    corners = [(0, 0), (0, 10), (0, 20), (8, 0), (8, 10)]
    for (top, left), color in zip(corners, colors, strict=True):
        assert (pixels[top : top + 6, left : left + 8] == color).all()
    assert (pixels[8:, 20:] == 255).all() and (pixels[6:8] == 255).all() and (pixels[:, 8:10] == 255).all()
    refused("`images` has 0 pictures", make_grid, [])


def test_small_pictures_are_enlarged_by_whole_factors_and_large_sheets_are_not():
    for width, count, factor in ((12, 4, 10), (128, 4, 1), (300, 2, 1), (32, 400, 3), (8, 1, 16)):
        columns = math.ceil(count**0.5)
        sheet = make_grid(Image.new("RGB", (width, width), (9, 9, 9)) for _ in range(count))
        assert sheet.width == columns * (factor * width + 2) - 2, width


def test_labels_stand_beside_their_rows_and_above_their_columns():
    images = [Image.new("RGB", (40, 30), (200, 0, 0)) for _ in range(6)]
    plain = np.asarray(make_grid(images, columns=3, scale=1))
    sheet = np.asarray(make_grid(images, 3, 1, ["first", "the second row"], ["a", "b", "long words"]))
    red = (sheet == (200, 0, 0)).all(axis=-1)
    top, left = np.argwhere(red)[0]
    height, width = plain.shape[:2]
    assert (sheet[top : top + height, left : left + width] == plain).all()
    ink = (sheet < 128).all(axis=-1)
    beside, above = np.argwhere(ink[:, :left]), np.argwhere(ink[:top])
    assert {int((y - top) // 32) for y, _ in beside} == {0, 1}
    assert {int((x - left) // 42) for _, x in above} >= {0, 1, 2}
    refused("`row_labels` has 1 labels for 2", make_grid, images, 3, 1, ["first"])


def test_the_animation_shows_each_step_and_ends_with_the_pictures(pipeline, tmp_path):
    steps = []
    out = pipeline([0, 1], num_steps=4, iterations=2, seed=0, callback=steps.append)
    frames = reveal_frames(steps, pipeline.tokenizer, columns=2, scale=1)
    assert len(frames) == 4
    assert np.array_equal(np.asarray(frames[-1]), np.asarray(make_grid(out.images, columns=2, scale=1)))
    for frame, step in zip(frames, steps, strict=True):
        pixels = np.asarray(frame)[:, :SIZE].reshape(SIDE, 4, SIDE, 4, 3)  # of the first picture, by code
        grey = (pixels == 128).all(axis=(1, 3, 4)).flatten()
        assert grey.tolist() == (step.sequences[0] == MASK).tolist()
    for name in ("reveal.gif", "reveal.png"):
        path = save_animation(frames, tmp_path / name, seconds_per_frame=0.1, hold=3)
        with Image.open(path) as animation:
            shown, times = [], []
            for i in range(animation.n_frames):
                animation.seek(i)
                shown.append(np.asarray(animation.convert("RGB")))
                times.append(animation.info["duration"])
        assert times == [100] * (len(frames) - 1) + [3000]
        if name.endswith("png"):  # without loss
            assert all(np.array_equal(a, np.asarray(b)) for a, b in zip(shown, frames, strict=True))
    refused("`frames` is empty", save_animation, [], tmp_path / "none.gif")
