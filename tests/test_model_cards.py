# SPDX-License-Identifier: Apache-2.0
"""The released checkpoints in `model_cards/`: they write what they wrote, and their cards say what was found."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

import release_digits
from study import release


FOLDERS = sorted(path.parent for path in (Path(__file__).parents[1] / "model_cards").glob("*/results.json"))
LIMIT = 60e6  # bytes of all of them


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def folder(request) -> Path:
    return request.param


@pytest.fixture
def results(folder) -> dict:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def test_it_writes_the_tokens_that_it_wrote(folder, results):
    model = AutoModel.from_pretrained(folder)
    assert model.dtype == torch.float32 and model.num_parameters() == results["parameters"]
    assert model.generate(batch_size=2, budget=24, seed=0).tolist() == results["tokens_of_budget_24"]
    if (folder / "tokenizer.json").exists():
        assert AutoTokenizer.from_pretrained(folder).mask_token_id == model.config.mask_token_id


@pytest.mark.parametrize("folder", [f for f in FOLDERS if (f / "tokenizer.json").exists()], ids=lambda f: f.name)
def test_a_blank_in_a_prompt_stands_for_a_word_with_its_space(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer("Once a big dog. They\nwere happy.")["input_ids"]
    big = tokenizer("big")["input_ids"][1]
    for prompt in ("Once a<|mask|> dog. They\nwere happy.", "Once a <|mask|> dog. They\nwere happy."):
        ids = tokenizer(prompt)["input_ids"]
        assert ids == [tokenizer.mask_token_id if token == big else token for token in text]


def test_such_a_tokenizer_is_made_of_llamas(tmp_path):
    judge, released = (FOLDERS[0].parent / name / "tokenizer.json" for name in ("stories-judge", "stories-cofre"))
    file = Path(shutil.copy(judge, tmp_path))
    release.read_masks_as_words(file)
    assert file.read_text(encoding="utf-8") == released.read_text(encoding="utf-8")


def test_its_card_says_what_its_results_say(folder, results, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (release_digits if folder.name == "digits" else release).write_card(tmp_path, results)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == (folder / "README.md").read_text(encoding="utf-8")


def test_all_of_them_are_small():
    files = [path for path in (Path(__file__).parents[1] / "model_cards").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < LIMIT
