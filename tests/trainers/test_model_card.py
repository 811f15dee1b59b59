# SPDX-License-Identifier: Apache-2.0
"""Cards: what they say is true of what lies beside them, and no name breaks out of its place."""

import ast
import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from peft import LoraConfig
from transformers import AutoModel, pipeline

from fpmgm import FPMaskGITPipeline, convert_to_fixed_point
from fpmgm.data import train_tokenizer
from fpmgm.model_cards.escape import python_string
from fpmgm.trainers import ConversionTrainer, SDTTTrainer
from fpmgm.trainers.run_record import Origin
from tests.testing_utils import tiny_image_model, tiny_image_tokenizer

from .training_utils import image_rows, make_trainer, training_model


HOSTILE = [
    'a | b || c"""; import os; os.remove("x") #',
    "first\n# Heading\n---\nlicense: mit\n---\n<script>alert(1)</script>",
    '</code>`` ``` \n```python\nboom(\n```\n"); boom("',
    "[link](http://x) ![image](y) *bold* _it_ ~~s~~ $x$ \\ \\| \u2028 \x00 \x1b[31m \ud800",
    "{{ config }} {% raw %} &lt; & ' \" \\",
]


def parsed(path: Path) -> list:
    """Tokens of a card without its front matter."""
    text = path.read_text(encoding="utf-8")
    front, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", text, flags=re.S).groups()
    assert isinstance(yaml.safe_load(front), dict) and "license" not in yaml.safe_load(front)
    return MarkdownIt("gfm-like", {"linkify": False}).parse(body)


def check(path: Path, headings: int) -> list[list[str]]:
    """The rows of all tables of a card that has so many headings and no HTML, links or pictures; its code compiles."""
    tokens = parsed(path)
    assert len([token for token in tokens if token.type == "heading_open"]) == headings
    inner = [child.type for token in tokens for child in token.children or []]
    assert not {token.type for token in tokens} & {"html_block", "hr"}
    assert not set(inner) & {"html_inline", "link_open", "image", "strong_open", "em_open", "s_open"}
    fences = [token for token in tokens if token.type == "fence"]
    assert fences and all(token.info == "python" for token in fences)
    for token in fences:
        called = {ast.unparse(node.func) for node in ast.walk(ast.parse(token.content)) if isinstance(node, ast.Call)}
        assert not any("boom" in name or "remove" in name for name in called)
    rows, row = [], None
    for i, token in enumerate(tokens):
        if token.type == "tr_open":
            row = []
        elif token.type in ("td_open", "th_open"):
            row.append("".join(child.content for child in tokens[i + 1].children))
        elif token.type == "tr_close":
            rows.append(row)
    assert rows and {len(row) for row in rows} == {2}
    return rows


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_breaks_out_of_a_model_card(tmp_path, name):
    model = training_model()
    model.config._name_or_path = name
    trainer = make_trainer(tmp_path, model, data_description=name, origin=Origin(base_model=name))
    trainer.args.hub_model_id = name
    (tmp_path / "eval_results.json").write_text(json.dumps({f"eval_{name}": 1.0, "eval_note": name, "eval_loss": 2.5}))
    (tmp_path / "a`b|c_results.json").write_text(json.dumps({"x": 1}))
    trainer.create_model_card()
    rows = dict(check(tmp_path / "README.md", headings=3))
    shown = " ".join("".join(c if c.isprintable() else " " for c in name).split())
    assert rows["trained on"] == rows["started from"] == rows["eval_note"] == shown
    assert rows["eval_loss"] == "2.5"
    adapter = make_trainer(tmp_path, training_model(), peft_config=LoraConfig(r=2), data_description=name)
    adapter.model.peft_config["default"].base_model_name_or_path = name
    adapter.create_model_card()
    check(tmp_path / "README.md", headings=3)


def test_no_class_name_breaks_out_of_a_pipeline_card(tmp_path):
    names = [*HOSTILE, "gas pump, petrol_pump"]
    model = tiny_image_model(num_classes=None, id2label=dict(enumerate(names)))
    built = FPMaskGITPipeline(model, tiny_image_tokenizer())
    built._card(HOSTILE[0]).save(tmp_path / "README.md")
    rows = check(tmp_path / "README.md", headings=3)
    assert ["5", "gas pump, petrol_pump"] in rows
    assert ["0", " ".join(HOSTILE[0].split())] in rows
    text = repr(built)
    assert f"{model.num_parameters():,} parameters" in text and "classes: 6" in text and len(text.splitlines()) == 6


@pytest.mark.parametrize("text", HOSTILE)
def test_a_literal_is_the_text_itself(text):
    assert ast.literal_eval(python_string(text)) == text and len(python_string(text).splitlines()) == 1


# --- what is there ---------------------------------------------------------------------------------------------------

WORDS = {"vocab_size": 270, "mask_token_id": 269}


def snippet(card: ModelCard) -> str:
    return re.search(r"```python\n(.*?)```", card.text, flags=re.S).group(1)


def run_snippet(folder: Path, monkeypatch) -> None:
    monkeypatch.chdir(folder.parent)
    exec(snippet(ModelCard.load(folder / "README.md")).replace("budget=96", "budget=24"), {"print": lambda *_: None})


def test_the_card_of_text_models_names_a_pipeline_and_tokenizers_that_are_there(tmp_path, monkeypatch):
    tokenizer = train_tokenizer(["the quick brown fox jumps over"] * 20, 270)
    base, bare, adapter = (tmp_path / name for name in ("base", "bare", "adapter"))
    make_trainer(base, training_model(**WORDS), processing_class=tokenizer, max_steps=1).save_model()
    assert pipeline("fill-mask", model=str(base), device="cpu")("the <|mask|> fox")
    make_trainer(bare, training_model(**WORDS)).save_model()
    monkeypatch.chdir(tmp_path)
    make_trainer(adapter, AutoModel.from_pretrained("base"), peft_config=LoraConfig(r=2)).save_model()
    cards = {folder.name: ModelCard.load(folder / "README.md") for folder in (base, bare, adapter)}
    assert {name: card.data.pipeline_tag for name, card in cards.items()} == {
        "base": "fill-mask", "bare": None, "adapter": "fill-mask",
    }  # fmt: skip
    assert (
        "AutoTokenizer" not in cards["bare"].text and 'AutoTokenizer.from_pretrained("base"' in cards["adapter"].text
    )
    assert pipeline("fill-mask", model=str(adapter), tokenizer="base", device="cpu")("the <|mask|> fox")
    for folder in (base, bare, adapter):
        run_snippet(folder, monkeypatch)


def test_the_card_is_that_of_an_image_model(tmp_path):
    trainer = make_trainer(
        tmp_path, tiny_image_model(), train_dataset=image_rows(4), max_steps=1, data_description="random codes"
    )
    trainer.train()
    trainer.save_model()
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag is None and "fpmgm" in card.data.tags
    assert "fixed-point masked generative image model" in card.text and "random codes" in card.text
    assert "| tokens, codes, classes | 9, 7, 3 |" in card.text
    assert "class_labels=[0]" in card.text and "AutoTokenizer" not in card.text


def test_the_cards_of_converted_and_distilled_models_say_what_they_come_from(tmp_path):
    explicit = training_model(num_pre_layers=4, num_fixed_point_layers=0, num_post_layers=0)
    explicit.save_pretrained(tmp_path / "mdlm")
    teacher = AutoModel.from_pretrained(tmp_path / "mdlm")
    student = convert_to_fixed_point(teacher, {"pre": [1], "fixed_point": [2, 3], "post": [4]})
    trainer = make_trainer(tmp_path / "fp", student, ConversionTrainer, teacher=teacher)
    trainer.create_model_card()
    rows = dict(check(tmp_path / "fp/README.md", headings=3))
    assert rows["started from"] == rows["teacher"] == str(tmp_path / "mdlm")
    assert rows["layers of the teacher (pre / fixed-point / post)"] == "1 / 2, 3 / 4"
    assert "conversion" in rows["method"] and "λ = 0.1, τ = 1.5" in rows["method"]
    hub = Origin(base_model="someone/mdlm")
    options = {"rounds": 2, "steps_per_round": 3, "origin": hub}
    make_trainer(tmp_path / "sdtt", training_model(), SDTTTrainer, **options).create_model_card()
    rows, card = dict(check(tmp_path / "sdtt/README.md", headings=3)), ModelCard.load(tmp_path / "sdtt/README.md")
    assert "2 rounds of 3 steps" in rows["method"] and rows["teacher"] == "someone/mdlm"
    assert (card.data.base_model, card.data.base_model_relation) == ("someone/mdlm", "finetune")
