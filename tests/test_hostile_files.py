# SPDX-License-Identifier: Apache-2.0
"""Every reader of others' files against damaged and hostile ones: what it does not read, it names, in bounded time.

`FPMGM_HOSTILE=1` takes all of them, about a thousand, in place of every twelfth.
"""

import os
import pickle
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict
from PIL import Image
from safetensors.torch import save_file

from fpmgm import FPMaskGITPipeline, load_halton_maskgit, load_mdlm
from fpmgm.conversion import load_image_tokenizer
from fpmgm.data import load_codes
from fpmgm.data.image_codes import read_image
from fpmgm.evaluation import ImageStatistics, image_statistics

from .conversion.test_image_tokenizers import xqgan_state
from .conversion.test_maskgit import original_state as maskgit_state
from .conversion.test_mdlm import explicit_model, original_state, write_checkpoint, write_folder
from .conversion.test_mdlm_layouts import save_tokenizer
from .hostile import damaged, damaged_json, hostile_pickles, hostile_safetensors
from .testing_utils import tiny_image_model, tiny_image_tokenizer


EVERY = 1 if os.environ.get("FPMGM_HOSTILE") else 12
SECONDS = 10


def mdlm_folder(folder: Path):
    write_folder(folder, explicit_model())
    return lambda: load_mdlm(folder)


def mdlm_tokenizer(folder: Path):
    write_folder(folder, explicit_model())
    save_tokenizer(folder, "[MASK]")
    return lambda: load_mdlm(folder)


def mdlm_bin(folder: Path):
    torch.save(original_state(explicit_model()), folder / "pytorch_model.bin")
    return lambda: load_mdlm(folder)


def mdlm_shards(folder: Path):
    save_file(original_state(explicit_model()), folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        '{"metadata": {}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}', encoding="utf-8"
    )
    return lambda: load_mdlm(folder)


def mdlm_checkpoint(folder: Path):
    write_checkpoint(folder / "last.ckpt", explicit_model(0), explicit_model(1))
    return lambda: load_mdlm(folder / "last.ckpt")


def maskgit(folder: Path):
    torch.save({"model_state_dict": maskgit_state()}, folder / "maskgit.pth")
    return lambda: load_halton_maskgit(folder / "maskgit.pth", {"heads": 2})


def tokenizer_file(folder: Path):
    torch.save({"model": xqgan_state()}, folder / "xqgan.pt")
    return lambda: load_image_tokenizer(folder / "xqgan.pt")


def tokenizer_folder(folder: Path):
    tiny_image_tokenizer().save_pretrained(folder)
    return lambda: load_image_tokenizer(folder)


def pipeline(folder: Path):
    FPMaskGITPipeline(tiny_image_model(), tiny_image_tokenizer()).save_pretrained(folder)
    return lambda: FPMaskGITPipeline.from_pretrained(folder)


def codes(folder: Path):
    rows = Dataset.from_dict({"input_ids": [[0, 1, 2, 3]] * 9, "class_labels": [0, 1, 0] * 3})
    rows = rows.cast_column("class_labels", ClassLabel(names=["ant", "cat"]))
    DatasetDict({"train": rows}).save_to_disk(folder)
    text = '{"grid_size": 2, "codebook_size": 5, "classes": ["ant", "cat"]}'
    (folder / "preparation.json").write_text(text, encoding="utf-8")
    return lambda: load_codes(folder)


def statistics(folder: Path):
    class Extractor:
        name, resize = "corner", "none"

    path = folder / "reference.safetensors"
    image_statistics(np.random.default_rng(0).normal(size=(9, 3)), Extractor, "nine").save(path)
    return lambda: ImageStatistics.load(path)


def a_picture(form: str):
    def make(folder: Path):
        pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"picture.{form}")
        return lambda: read_image({"path": str(folder / f"picture.{form}"), "bytes": None})

    return make


READERS = {  # name: what writes a good one and gives its reader, the files that are damaged
    "mdlm": (mdlm_folder, ["model.safetensors", "config.json"]),
    "mdlm tokenizer": (mdlm_tokenizer, ["tokenizer.json", "tokenizer_config.json"]),
    "mdlm bin": (mdlm_bin, ["pytorch_model.bin"]),
    "mdlm shards": (mdlm_shards, ["model.safetensors.index.json", "model-00001-of-00001.safetensors"]),
    "mdlm checkpoint": (mdlm_checkpoint, ["last.ckpt"]),
    "maskgit": (maskgit, ["maskgit.pth"]),
    "tokenizer file": (tokenizer_file, ["xqgan.pt"]),
    "tokenizer": (tokenizer_folder, ["model.safetensors", "config.json"]),
    "pipeline": (
        pipeline,
        ["model_index.json", "model/config.json", "model/model.safetensors", "vq/config.json", "vq/model.safetensors",
         "processor/preprocessor_config.json"],
    ),
    "codes": (codes, ["preparation.json", "dataset_dict.json", "train/state.json", "train/dataset_info.json",
                      "train/data-00000-of-00001.arrow"]),
    "statistics": (statistics, ["reference.safetensors"]),
    **{f"{form} picture": (a_picture(form), [f"picture.{form}"]) for form in ("png", "jpeg", "gif", "bmp", "webp")},
}  # fmt: skip


def attacks(path: Path, trace: Path, rng: random.Random) -> list[tuple[str, bytes]]:
    content = path.read_bytes()
    found = list(damaged(content, rng))
    if path.suffix == ".json":
        found += damaged_json(content, rng)
    elif path.suffix == ".safetensors":
        found += hostile_safetensors()
    elif path.suffix in (".bin", ".ckpt", ".pt", ".pth"):
        found += hostile_pickles(trace)
    return found


def test_an_attack_that_is_unpickled_leaves_a_trace(tmp_path):
    kinds = dict(hostile_pickles(tmp_path / "trace"))
    assert len(kinds) > 40
    pickle.loads(kinds["system, plain"])
    assert (tmp_path / "trace").exists()


class TookTooLong(BaseException):
    """No reader may catch it."""


def alarm(*args):
    raise TookTooLong


@pytest.mark.parametrize("name", READERS)
def test_what_cannot_be_read_is_named_in_bounded_time_and_runs_nothing(name, tmp_path, record_property):
    make, files = READERS[name]
    folder, trace = tmp_path / "given", tmp_path / "trace"
    folder.mkdir()
    read = make(folder)
    read()
    rng, wrong, count = random.Random(name), [], 0
    signal.signal(signal.SIGALRM, alarm)
    for file in files:
        path = folder / file
        whole = path.read_bytes()
        for kind, content in attacks(path, trace, rng)[rng.randrange(EVERY) :: EVERY]:
            path.write_bytes(content)
            count += 1
            signal.alarm(SECONDS)
            try:
                read()
            except ValueError as error:
                named = "picture" in name or str(folder) in str(error)
                wrong += [] if named and len(str(error)) < 9000 else [f"{file}, {kind}: {str(error)[:300]}"]
            except BaseException as error:
                wrong.append(f"{file}, {kind}: {type(error).__name__}: {str(error)[:300]}")
            finally:
                signal.alarm(0)
            if trace.exists():
                wrong.append(f"{file}, {kind}: ran")
                trace.rmdir() if trace.is_dir() else trace.unlink()
        path.write_bytes(whole)
    record_property("files", count)
    assert wrong == []
    read()
