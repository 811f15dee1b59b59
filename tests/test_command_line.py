# SPDX-License-Identifier: Apache-2.0
"""The command lines of recipes: what is refused at once, what a YAML stands for, what --help shows."""

import io
import itertools
import sys
from dataclasses import dataclass, field, fields

import pytest

from fpmgm import FPMaskGITConfig, FPMDLMConfig
from fpmgm.command_line import DatasetName, LocalPath, ModelName, model_arguments, parse_arguments
from fpmgm.trainers import MGMTrainingConfig
from tests.testing_utils import refused


@dataclass
class Options:
    """Options of a test. Nothing else."""

    model: ModelName = field(default="gpt2", metadata={"help": "A model."})
    text_files: list[LocalPath] | None = field(default=None, metadata={"help": "Text, 100 % of it."})
    dataset_name: DatasetName | None = field(default=None, metadata={"help": "A dataset."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Of the optimizer."})
    budgets: list[int] = field(default_factory=lambda: [96], metadata={"help": "Block evaluations."})
    title: str | None = field(default=None, metadata={"help": "Any words."})
    quiet: bool = field(default=True, metadata={"help": "Whether to be quiet."})


def parse(*argv: str) -> Options:
    return parse_arguments((Options,), "A test.\n\n    python test.py --title words\n", list(argv))[0]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--learning_rat", "3"], "`learning_rat`.*did you mean `learning_rate`"),
        (["--learn=3"], "`learn`.*did you mean `learning_rate`"),
        (["--buget", "96"], "`buget`.*did you mean `budgets`"),
        (["--xyz", "1"], "`xyz`, which this command does not have; See --help"),
        (["--title", "a", "b"], "b"),  # a word without an option
        (["--budgets", "1", "--title", "a", "--budgets=2"], "`budgets` 2 times, of which the last alone would count"),
    ],
)
def test_what_is_no_option_is_refused_with_the_nearest_names(argv, message):
    refused(message, parse, *argv)


def test_a_yaml_stands_for_options_that_the_command_line_overrides(tmp_path):
    path, text = tmp_path / "some.yaml", tmp_path / "ä text.txt"
    text.write_text("words")
    path.write_text(f"text_files: {text}\nlearning_rate: 5e-4\nbudgets: [1, 2]\ntitle: -γ\nquiet: no\n", "utf-8")
    found = parse("--config", str(path), "--learning-rate", "2")
    assert found == Options(text_files=[str(text)], learning_rate=2.0, budgets=[1, 2], title="-γ", quiet=False)
    path.write_text("title: null\nbudgets: []\nquiet: true\n")
    assert parse(f"--config={path}") == Options(budgets=[])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning_rat: 3", "`learning_rat`.*did you mean `learning_rate`"),
        ("just words", "holds no `name: value` lines but str"),
        ("a: [", "is no YAML"),
        (b"title: \xff", "is no YAML"),
        ("title: a\nbudgets: [1]\ntitle: b", "gives `title` a second time in line 3"),
        ("budgets: [{a: 1, a: 1}]", "gives `a` a second time in line 1"),
    ],
)
def test_a_yaml_that_cannot_be_used_is_refused(tmp_path, content, message):
    path = tmp_path / "some.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(rf"some\.yaml'.*{message}", parse, "--config", str(path))
    refused(r"gone\.yaml' does not exist", parse, "--config", "gone.yaml")


@pytest.mark.parametrize("name", ["outputs/gone", "gone", "a/b/c", "./gone", "gone.ckpt"])
@pytest.mark.parametrize("option", ["model", "text_files", "dataset_name"])
def test_what_does_not_exist_is_said_before_anything_begins(tmp_path, option, name):
    refused(f"`{option}`.*'{name}' does not exist.*: give one that does", parse, f"--{option}", name)
    path = tmp_path / "some.yaml"
    path.write_text(f"{option}: {name}\n")
    refused(r"make it as the first lines of .*some\.yaml say", parse, "--config", str(path))


def test_what_exists_and_a_default_are_not_asked_of_the_hub(tmp_path):
    assert parse().model == "gpt2"
    assert parse("--model", str(tmp_path), "--text_files", __file__, str(tmp_path)).model == str(tmp_path)


def test_help_shows_common_options_first_and_those_of_hugging_face_last(capsys):
    architecture = model_arguments(FPMDLMConfig)
    with pytest.raises(SystemExit):
        parse_arguments((architecture, MGMTrainingConfig), "First.\n\n    python a.py\n    python b.py", ["--help"])
    shown = capsys.readouterr().out
    titles = [line for line in shown.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles[:3] == ["Common:", "Training:", "Architecture (FPMDLMConfig):"] and titles[-1].startswith("All else")
    assert "\n    python a.py\n    python b.py\n" in shown  # as it was written
    assert "Width D of the residual stream. [768]" in shown  # the configuration's own words
    assert "evaluated and exported. null or 0: no average." in shown  # and the trainer's
    undescribed = [a for a, b in itertools.pairwise(shown.splitlines()) if a.startswith("  --") and b[:6] != " " * 6]
    assert not undescribed
    names = [line.split()[0] for line in shown.splitlines() if line.startswith("  --")]
    every = {f.name for kind in (architecture, MGMTrainingConfig) for f in fields(kind) if f.init} | {"config"}
    assert sorted(names) == sorted(f"--{name}" for name in every)
    assert names.index("--output_dir") < names.index("--hidden_size") < names.index("--adam_beta1")


@pytest.mark.parametrize("config_class", [FPMDLMConfig, FPMaskGITConfig])
def test_architecture_options_have_words_of_their_own(config_class):
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    kind = model_arguments(config_class, exclude=("grid_size", *tokens))
    helps = {f.name: f.metadata["help"] for f in fields(kind)}
    assert all(len(text) > 10 for text in helps.values()) and "grid_size" not in helps
    assert len(set(helps.values())) == len(helps)


def test_an_ascii_terminal_is_no_reason_to_stop(monkeypatch):
    written = io.BytesIO()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(written, encoding="ascii", write_through=True))
    for stream in (sys.stdout, sys.stderr):
        with pytest.raises(UnicodeEncodeError):
            stream.write("γ")
    title = parse("--title", "γ").title
    for stream in (sys.stdout, sys.stderr):
        stream.write(title)
    assert written.getvalue() == b"??"
