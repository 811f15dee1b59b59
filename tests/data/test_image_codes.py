# SPDX-License-Identifier: Apache-2.0
"""Pictures become codes: every row is the tokenizer's answer to pixels made here with NumPy and Pillow."""

import json
import os
import re
import struct
import tracemalloc
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, load_from_disk
from PIL import Image as PILImage

from fpmgm.data import image_codes as module
from fpmgm.data import load_codes, load_images, make_image_processor, prepare_codes
from fpmgm.data.image_codes import read_image
from tests.testing_utils import refused


class MeanTokenizer:
    """The code of an 8 × 8 patch is its red channel's mean in 8 bits; `left` calls, then it fails."""

    image_size, grid_size, codebook_size, device, dtype = 16, 2, 256, "cpu", torch.float32
    codebook = torch.arange(256.0)[:, None]
    weight = torch.ones(1)

    def __init__(self, left: int = 10**6):
        self.left, self.calls = left, 0

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"encoder.weight": self.weight, "decoder.weight": torch.rand(1)}

    def encode(self, pixel_values):
        assert pixel_values.shape[1:] == (3, 16, 16) and pixel_values.abs().max() <= 1
        if self.calls == self.left:
            raise KeyboardInterrupt
        self.calls += 1
        red = (pixel_values[:, 0] + 1) * 127.5
        return red.view(-1, 2, 8, 2, 8).mean(dim=(2, 4)).round().long()


def codes_of(pixels: np.ndarray) -> list[int]:
    """Of (16, 16, 3) 8-bit pixels."""
    red = pixels[..., 0].astype(float)
    return [round(red[i : i + 8, j : j + 8].mean()) for i in (0, 8) for j in (0, 8)]


def picture(seed: int, width: int = 24, height: int = 16, mode: str = "RGB") -> PILImage.Image:
    """Smooth, so that two ways of resizing agree within one code."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return PILImage.fromarray(coarse).resize((width, height), PILImage.Resampling.BICUBIC).convert(mode)


@pytest.fixture
def folder(tmp_path):
    """Two classes to train on and one more to validate on; a grayscale picture, broken ones and a note."""
    for split, name, count in (("train", "cat", 3), ("train", "ant", 2), ("val", "cat", 1), ("val", "bee", 1)):
        (tmp_path / "pictures" / split / name).mkdir(parents=True)
        for i in range(count):
            mode = "L" if i == 1 else "RGB"
            picture(10 * len(split) + i, mode=mode).save(tmp_path / "pictures" / split / name / f"{i}.PNG")
    train = tmp_path / "pictures/train"
    (train / "ant/broken.jpeg").write_bytes(b"no picture")
    (train / "cat/empty.png").write_bytes(b"")
    (train / "cat/half.png").write_bytes((train / "cat/0.PNG").read_bytes()[:200])
    (train / "cat/notes.txt").write_text("not a picture")
    return tmp_path / "pictures"


def middle(image: PILImage.Image) -> np.ndarray:
    """(16, 16, 3) of a picture of 24 × 16."""
    return np.asarray(image.convert("RGB"))[:, 4:20]


def test_a_folder_becomes_rows_of_codes_and_broken_pictures_are_named(folder, tmp_path, caplog):
    processor = make_image_processor(16)
    images = load_images(folder)
    codes = prepare_codes(images, MeanTokenizer(), processor, tmp_path / "codes", batch_size=2)
    files = [("ant", 0), ("ant", 1), ("cat", 0), ("cat", 1), ("cat", 2)]
    expected = [codes_of(middle(PILImage.open(folder / "train" / name / f"{i}.PNG"))) for name, i in files]
    assert codes["train"]["input_ids"][:] == expected
    assert codes["train"]["class_labels"][:] == [0, 0, 2, 2, 2]
    assert codes["validation"]["class_labels"][:] == [1, 2]  # the same ids where a class is missing
    assert codes["validation"].features["class_labels"].names == ["ant", "bee", "cat"]
    report = json.loads((tmp_path / "codes/preparation.json").read_text())
    assert [Path(name.split(" (")[0]).name for name in report["unreadable"]["train"]] == [
        "broken.jpeg", "empty.png", "half.png",
    ]  # fmt: skip
    assert report["counts"] == {"train": {"pictures": 8, "rows": 5}, "validation": {"pictures": 2, "rows": 2}}
    assert (report["codebook_size"], report["grid_size"], report["classes"]) == (256, 2, ["ant", "bee", "cat"])
    assert load_from_disk(tmp_path / "codes")["train"]["input_ids"][:] == expected


def test_pictures_are_resized_by_their_shortest_edge(folder, tmp_path):
    tall = picture(3, 40, 80)
    tall.save(folder / "val/cat/0.PNG")
    codes = prepare_codes(load_images(folder), MeanTokenizer(), make_image_processor(16), tmp_path / "codes")
    resized = np.asarray(tall.resize((16, 32), PILImage.Resampling.BILINEAR))[8:24]
    assert np.abs(np.array(codes["validation"][1]["input_ids"]) - codes_of(resized)).max() <= 1


def test_variants_are_made_of_pixels_and_only_to_train_on(folder, tmp_path):
    processor, images = make_image_processor(16), load_images(folder)
    codes = prepare_codes(images, MeanTokenizer(), processor, tmp_path / "flip", augment="flip", batch_size=4)
    first = middle(PILImage.open(folder / "train/ant/0.PNG"))
    assert codes["train"]["input_ids"][:2] == [codes_of(first), codes_of(first[:, ::-1])]
    assert codes["train"]["class_labels"][:] == [0] * 4 + [2] * 6
    assert len(codes["validation"]) == 2

    codes = prepare_codes(images, MeanTokenizer(), processor, tmp_path / "ten", augment="ten_crop")
    image = PILImage.open(folder / "train/ant/0.PNG").resize((27, 18), PILImage.Resampling.BILINEAR)
    pixels = np.asarray(image)
    corners = [(0, 0), (0, 11), (2, 0), (2, 11), (1, 6)]
    crops = [pixels[top : top + 16, left : left + 16] for top, left in corners]
    expected = [codes_of(crop) for crop in crops] + [codes_of(crop[:, ::-1]) for crop in crops]
    assert np.abs(np.array(codes["train"]["input_ids"][:10]) - expected).max() <= 1
    assert len(codes["train"]) == 50 and len(codes["validation"]) == 2


def interrupted_save(self, folder):
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    raise KeyboardInterrupt


def test_an_interrupted_preparation_goes_on_where_it_was(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PART", 2)
    images, processor = load_images(folder), make_image_processor(16)
    straight = MeanTokenizer()
    expected = prepare_codes(images, straight, processor, tmp_path / "straight", batch_size=1)
    stopped = MeanTokenizer(left=4)
    with pytest.raises(KeyboardInterrupt):
        prepare_codes(images, stopped, processor, tmp_path / "codes", batch_size=1)
    other = MeanTokenizer()
    refused("augment='none'", prepare_codes, images, other, processor, tmp_path / "codes", augment="flip")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # while the parts are joined
        patch.setattr(module.DatasetDict, "save_to_disk", interrupted_save)
        prepare_codes(images, other, processor, tmp_path / "codes", batch_size=1)
    codes = prepare_codes(images, other, processor, tmp_path / "codes", batch_size=1)
    assert other.calls < straight.calls  # finished parts were kept
    for split in ("train", "validation"):
        assert codes[split]["input_ids"][:] == expected[split]["input_ids"][:]
    report, whole = (json.loads((tmp_path / n / "preparation.json").read_text()) for n in ("codes", "straight"))
    assert report == whole and not (tmp_path / "codes/parts").exists()
    other.calls = 0
    prepare_codes(images, other, processor, tmp_path / "codes")
    assert other.calls == 0  # all was there


def test_another_tokenizer_or_other_pictures_are_refused_in_the_same_folder(folder, tmp_path):
    images, processor = load_images(folder), make_image_processor(16)
    prepare_codes(images, MeanTokenizer(), processor, tmp_path / "codes")
    other = MeanTokenizer()
    other.codebook = other.codebook + 1
    refused("codebook=", prepare_codes, images, other, processor, tmp_path / "codes")
    other = MeanTokenizer()
    other.weight = 2 * other.weight
    refused("encoder=", prepare_codes, images, other, processor, tmp_path / "codes")
    note = tmp_path / "codes/preparation.json"
    note.write_text(json.dumps({k: v for k, v in json.loads(note.read_text()).items() if k != "encoder"}))
    prepare_codes(images, other, processor, tmp_path / "codes")  # an earlier version's
    picture(6, width=30).save(folder / "train/cat/0.PNG")  # in the place of another
    refused("sizes=", prepare_codes, load_images(folder), MeanTokenizer(), processor, tmp_path / "codes")
    picture(5).save(folder / "train/cat/9.png")
    refused("pictures=", prepare_codes, load_images(folder), MeanTokenizer(), processor, tmp_path / "codes")


def test_sources_that_give_nothing_are_refused(folder, tmp_path):
    refused("give one of them", load_images)
    refused("test' does not exist", load_images, folder, eval_split="test")
    for path in folder.glob("val/*/*"):
        path.write_bytes(b"broken")
    with pytest.raises(ValueError, match="none of the 2 pictures in 'validation' can be read"):
        prepare_codes(load_images(folder), MeanTokenizer(), make_image_processor(16), tmp_path / "codes")
    for path in folder.glob("val/*/*"):
        path.unlink()
    refused("has no pictures", load_images, folder)
    with pytest.raises(ValueError, match=r"'mirror'.*ten_crop"):
        prepare_codes(load_images(folder, eval_split=None), None, None, tmp_path, augment="mirror")


def test_a_hub_dataset_gives_the_same_codes_as_its_folder(folder, tmp_path, monkeypatch):
    images = load_images(folder)
    rows = images["train"].select([0, 3, 4])
    embedded = [{"bytes": Path(row["image"]["path"]).read_bytes(), "path": None} for row in rows]
    features = Features({"img": Image(), "cls": images["train"].features["label"], "id": Value("int64")})
    hub = Dataset.from_dict({"img": embedded, "cls": rows["label"], "id": rows["label"]}, features=features)
    monkeypatch.setattr(module, "load_dataset", lambda name, config, split: {"train": hub}[split])
    source = {"dataset_name": "org/name", "eval_split": None}
    loaded = load_images(**source, image_column="img", label_column="cls")
    codes = prepare_codes(loaded, MeanTokenizer(), make_image_processor(16), tmp_path / "codes")
    expected = prepare_codes(images, MeanTokenizer(), make_image_processor(16), tmp_path / "folder")
    by_picture = expected["train"]["input_ids"][:]
    assert codes["train"]["input_ids"][:] == [by_picture[0], by_picture[2], by_picture[3]]
    refused(r"`image_column`='image'.*'img'", load_images, **source)
    hub = Dataset.from_dict({"img": embedded, "cls": [0, -1, None], "id": rows["label"]}, features=features)
    message = r"row 1 of the split 'train' of 'org/name', and 1 more, have no class .`label_column`='cls' holds -1"
    refused(message, load_images, **source, image_column="img", label_column="cls")


# --- reading codes ---------------------------------------------------------------------------------------------------


def write_codes(folder: Path, rows: list[list[int]], labels: list[int], names: list[str] | None) -> None:
    """A folder as `prepare_codes` leaves it, of 2 × 2 of 5 codes in the classes `ant` and `cat`."""
    dataset = Dataset.from_dict({"input_ids": rows, "class_labels": labels})
    if names is not None:
        dataset = dataset.cast_column("class_labels", ClassLabel(names=names))
    DatasetDict({"train": dataset}).save_to_disk(folder)
    preparation = {"grid_size": 2, "codebook_size": 5, "classes": ["ant", "cat"]}
    (folder / "preparation.json").write_text(json.dumps(preparation))


def test_codes_are_read_with_what_is_known_of_them(folder, tmp_path):
    codes = prepare_codes(load_images(folder), MeanTokenizer(), make_image_processor(16), tmp_path / "codes")
    read, preparation = load_codes(tmp_path / "codes")
    assert {split: rows[:] for split, rows in read.items()} == {split: rows[:] for split, rows in codes.items()}
    assert (preparation["grid_size"], preparation["codebook_size"]) == (2, 256)
    assert preparation["classes"] == ["ant", "bee", "cat"]
    write_codes(tmp_path / "most", [[0, 4, 4, 0]] * 2, [0, 1], None)
    load_codes(tmp_path / "most")


@pytest.mark.parametrize(
    ("rows", "labels", "names", "message"),
    [
        ([[0, 1, 2, 5]], [0], None, r"codes from 0 to 5, but .*`codebook_size`=5.* lie in \[0, 4\]"),
        ([[0, -1, 2, 3]], [0], None, "codes from -1 to 3"),
        ([[0, 1, 2, 3], [0, 1, 2]], [0, 1], None, r"numbers of codes in a row from 3 to 4, but .* lie in \[4, 4\]"),
        ([[0] * 9], [0], None, "numbers of codes in a row from 9 to 9"),
        ([[0] * 4], [2], None, r"class labels from 2 to 2, but .*2 classes\) they lie in \[0, 1\]"),
        ([[0] * 4], [-1], None, "class labels from -1 to -1"),
        ([[0] * 4], [0], ["cat", "ant"], r"classes \['cat', 'ant'\], but preparation.json says \['ant', 'cat'\]"),
        ([[0.0, 1.0, 2.0, 3.0]], [0], None, ".*`input_ids` of list<.*double>"),
        ([[0, 1, 2, 3]], [0.5], None, ".*`class_labels` of double"),
        (["abcd"], [0], None, ".*`input_ids` of string"),
        ([[0, 1, 2, 3], None], [0, 1], None, "1 rows or codes that are empty"),
        ([[0, 1, 2, 3], [0, 1, None, 3]], [0, 1], None, "1 rows or codes that are empty"),
        ([[0, 1, 2, 3]] * 2, [0, None], None, "1 rows or codes that are empty"),
    ],
)
def test_rows_that_are_not_what_was_prepared_are_refused(tmp_path, rows, labels, names, message):
    write_codes(tmp_path / "codes", rows, labels, names)
    refused(rf"'train' of `folder`='.*codes' has {message}", load_codes, tmp_path / "codes")


def test_a_folder_without_finished_codes_is_refused(folder, tmp_path):
    refused(r"has no preparation\.json", load_codes, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        prepare_codes(load_images(folder), MeanTokenizer(left=1), make_image_processor(16), tmp_path / "codes")
    refused("is not finished: repeat the command", load_codes, tmp_path / "codes")
    write_codes(tmp_path / "empty", [], [], None)
    refused("`folder`='.*empty' cannot be read", load_codes, tmp_path / "empty")
    write_codes(tmp_path / "other", [[0] * 4], [0], None)
    load_from_disk(tmp_path / "other").remove_columns("class_labels").save_to_disk(tmp_path / "codes")
    (tmp_path / "codes/parts").rename(tmp_path / "parts")
    refused(r"no column \['class_labels'\]", load_codes, tmp_path / "codes")


# --- pictures as viewers show them, and as weapons -------------------------------------------------------------------


def png(mode_pixels: np.ndarray) -> PILImage.Image:
    return PILImage.fromarray(mode_pixels)


def embedded(image: PILImage.Image, form: str = "PNG", **options) -> dict:
    file = BytesIO()
    image.save(file, form, **options)
    return {"bytes": file.getvalue(), "path": None}


def test_sixteen_bit_grey_keeps_its_shades():
    ramp = np.linspace(0, 65535, 24 * 16).round().astype(np.uint16).reshape(16, 24)
    for form in ("PNG", "TIFF"):
        pixels = np.asarray(read_image(embedded(png(ramp), form)))
        assert np.abs(pixels - (ramp / 257)[..., None]).max() <= 0.5
    transparent = embedded(png(ramp), transparency=int(ramp[3, 5]))
    assert (np.asarray(read_image(transparent))[3, 5] == 255).all()
    wide = png((ramp.astype(np.int32) - 1) * 2)
    refused(r"grey values from -2 to 131068 are not of 16 bits", read_image, embedded(wide, "TIFF"))
    refused("floating numbers", read_image, embedded(png(ramp.astype(np.float32)), "TIFF"))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_what_is_transparent_lies_on_white(mode):
    colours = np.zeros((8, 8, 4), dtype=np.uint8)
    colours[..., :3], colours[:4, :, 3], colours[4:6, :, 3] = 40, 255, 128  # rows: opaque, half, transparent
    options = {}
    if mode == "RGB":  # one colour counts as transparent
        image = PILImage.fromarray(colours[..., :3].copy())
        image.paste((1, 2, 3), (0, 6, 8, 8))
        options, half = {"transparency": (1, 2, 3)}, 40
    elif mode == "P":
        image = PILImage.fromarray(np.repeat([0] * 6 + [1] * 2, 8).reshape(8, 8).astype(np.uint8), "P")
        image.putpalette([40, 40, 40, 9, 9, 9])
        options, half = {"transparency": 1}, 40
    else:
        image, half = PILImage.fromarray(colours).convert(mode), round(40 * 128 / 255 + 255 * 127 / 255)
    pixels = np.asarray(read_image(embedded(image, **options)))
    assert (pixels[:4] == 40).all() and (pixels[6:] == 255).all()
    assert np.abs(pixels[4:6].astype(int) - half).max() <= 1


def test_hidden_folders_and_files_are_no_classes_and_no_pictures(folder, tmp_path):
    expected = load_images(folder)
    for name in (".ipynb_checkpoints", "__MACOSX", "@eaDir", "cat/.ipynb_checkpoints", "cat/__MACOSX"):
        (folder / "train" / name).mkdir()
        picture(1).save(folder / "train" / name / "0.png")
    picture(1).save(folder / "train/cat/._0.png")
    (folder / "train/nothing").mkdir()
    found = load_images(folder)
    assert found["train"].features["label"].names == ["ant", "bee", "cat"]
    assert found["train"][:] == expected["train"][:]


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def small_png(width: int, height: int) -> bytes:
    """A valid picture of a few bytes, whatever its size."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((width + 7) // 8 + 1) * min(height, 9))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


WEAPONS = {
    "line.png": (small_png(2000, 1), "2000 × 1 pixels: the longer side may be 20 times the shorter at most"),
    "column.png": (small_png(1, 60000), "1 × 60000 pixels"),
    "bomb.png": (small_png(60000, 60000), "could be decompression bomb"),
    "large.png": (small_png(10000, 9000), "could be decompression bomb"),
    "header.png": (b"\x89PNG\r\n\x1a\n" + bytes(40), "or its header is damaged"),
    "script.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "it is none of BMP"),
    "folder.png": (None, "it is no regular file"),
    "pipe.png": (None, "it is no regular file"),
    "gone.png": (None, "there is no such file"),
    "nam\udcff.png": (small_png(8, 8), "there is no such file; one whose name is not UTF-8"),
}


def test_pictures_as_weapons_are_left_out_and_listed(folder, tmp_path, monkeypatch):
    target = folder / "train/cat"
    for name, (content, _) in WEAPONS.items():
        if content is not None:
            (target / name).write_bytes(content)
    (target / "folder.png").mkdir()
    os.mkfifo(target / "pipe.png")
    (target / "gone.png").symlink_to(target / "nowhere.png")
    tracemalloc.start()
    codes = prepare_codes(load_images(folder), MeanTokenizer(), make_image_processor(16), tmp_path / "codes")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6
    assert len(codes["train"]) == 5
    report = json.loads((tmp_path / "codes/preparation.json").read_text())
    listed = dict(line.rstrip(")").split(" (", 1) for line in report["unreadable"]["train"])
    assert len(listed) == report["left_out"]["train"] == 3 + len(WEAPONS)
    for name, (_, reason) in WEAPONS.items():
        shown = str(target / name).replace("\udcff", "\\xff")
        assert reason in listed[shown]
        refused(re.escape(reason), read_image, {"path": shown, "bytes": None})
    monkeypatch.setattr(module, "MOST_LISTED", 4)
    prepare_codes(load_images(folder), MeanTokenizer(), make_image_processor(16), tmp_path / "again")
    report = json.loads((tmp_path / "again/preparation.json").read_text())
    assert report["left_out"] == {"train": 3 + len(WEAPONS), "validation": 0}
    assert report["unreadable"] == {
        "train": [f"{name} ({listed[name]})" for name in list(listed)[:4]],
        "validation": [],
    }


def test_any_error_of_a_decoder_says_why(folder, monkeypatch):
    def decode(*args, **kwargs):
        raise RecursionError("a decoder's\n own")

    monkeypatch.setattr(PILImage, "open", decode)
    refused(r"^a decoder's own$", read_image, {"path": str(folder / "val/cat/0.PNG"), "bytes": None})


def test_a_class_whose_name_is_not_utf8_must_be_renamed(folder):
    (folder / "train/caf\udce9").mkdir()
    refused(r"class '.*caf\\\\xe9' is not UTF-8: rename", load_images, folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"grid_size": 2}', '{"grid_size": "2", "codebook_size": 5, "classes": ["a"]}',
             '{"grid_size": 2, "codebook_size": 5, "classes": [1]}',
             '{"grid_size": 1e400, "codebook_size": 5, "classes": ["ant", "cat"]}', "[" * 10**5],
    ids=lambda text: text[:40],
)  # fmt: skip
def test_a_damaged_preparation_is_named(tmp_path, text):
    write_codes(tmp_path / "codes", [[0] * 4], [0], None)
    (tmp_path / "codes/preparation.json").write_text(text)
    refused(r"codes/preparation\.json", load_codes, tmp_path / "codes")


@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "state"])
def test_damaged_codes_are_named(tmp_path, damage):
    write_codes(tmp_path / "codes", [[0, 1, 2, 3]] * 50, [0] * 50, None)
    (file,) = (tmp_path / "codes/train").glob("*.arrow")
    content = file.read_bytes()
    if damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "flip":  # offsets that point outside
        file.write_bytes(content.replace(struct.pack("<2i", 4, 8), struct.pack("<2i", 4, 2**30)))
    elif damage == "gone":
        file.unlink()
    else:
        (tmp_path / "codes/train/state.json").write_text("{}")
    refused(r"codes' cannot be read as codes that `prepare_codes` wrote", load_codes, tmp_path / "codes")
