# SPDX-License-Identifier: Apache-2.0
"""What the recipes that judge samples are tried on."""

import shutil
from pathlib import Path

import pytest

from tests.evaluation.helpers import judged_model, tiny_judge


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Two models and a judge that share a tokenizer, another model with another one, and some text."""
    folder, judge = tmp_path_factory.mktemp("judged"), tiny_judge(length=64)
    for name, layers in (("fp", 1), ("plain", 0)):
        judged_model(num_fixed_point_layers=layers).save_pretrained(folder / name)
        judge.tokenizer.save_pretrained(folder / name)
    judge.model.float().save_pretrained(folder / "judge")
    judge.tokenizer.save_pretrained(folder / "judge")
    shutil.copytree(folder / "fp", folder / "other")
    judge.tokenizer.add_tokens(["fox"])
    judge.tokenizer.save_pretrained(folder / "other")
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 10)
    return folder
