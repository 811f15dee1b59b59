# SPDX-License-Identifier: Apache-2.0
"""The documents say what is true: their Python runs, their commands are taken, their files and links are there."""

import importlib.util
import json
import os
import re
import shlex
import sys

import pytest
from markdown_it import MarkdownIt
from setuptools.config.pyprojecttoml import load_file
from transformers import TrainingArguments

from fpmgm import command_line

from .hub_server import HubServer
from .testing_utils import ROOT, run_python


PROJECT = load_file(ROOT / "pyproject.toml")["project"]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}
FENCES = {name: [token for token in MarkdownIt().parse(text) if token.type == "fence"] for name, text in PAGES.items()}
PYTHON = {name: [token.content for token in found if token.info == "python"] for name, found in FENCES.items()}
SHELL = {name: [token.content for token in found if token.info == ""] for name, found in FENCES.items()}

# --- Python ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def errors(tmp_path_factory) -> dict[str, str]:
    """What went wrong on each page, from one process that runs them all beside a hub of this machine."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "pages.json").write_text(json.dumps({name: found for name, found in PYTHON.items() if found}))
    with HubServer() as server:
        here = {"HF_ENDPOINT": server.url, "HF_TOKEN": "dummy", "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "home")}
        command = ("-m", "tests.docs_script", "pages.json", "errors.json")
        run_python(*command, cwd=folder, **here, PYTHONPATH=str(ROOT))
    return json.loads((folder / "errors.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", [name for name, found in PYTHON.items() if found])
def test_the_python_of_a_page_runs_from_top_to_bottom(page, errors):
    assert page not in errors, errors[page]


# --- commands --------------------------------------------------------------------------------------------------------

SCRIPT = re.compile(r"(?:recipes|benchmarks)/[\w/]+\.py")


def commands(text: str) -> list[str]:
    """The lines of a block of commands, without comments, continued lines joined."""
    lines = [line.split(" #")[0].strip() for line in text.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def inline_commands(text: str) -> list[str]:
    """Commands inside sentences and tables; a script without options is named, not called."""
    found = [
        found for found in re.findall(r"`([^`\n]+)`", text) if re.match(r"(python|accelerate launch) \w+/", found)
    ]
    return [line for line in found if " --" in line]


class ParsedError(Exception):
    """Thrown in place of the work that follows a command line that was understood."""


def check_script(words: list[str], monkeypatch) -> None:
    """A recipe or benchmark is there and understands its options."""
    place = next(i for i, word in enumerate(words) if SCRIPT.fullmatch(word))
    path, argv = ROOT / words[place], words[place + 1 :]
    monkeypatch.syspath_prepend(str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules.setdefault(path.stem, importlib.util.module_from_spec(spec))
    if not hasattr(module, "main"):
        spec.loader.exec_module(module)

    def parse(types, description, given=None):
        here = ["--bf16", "False", "--use_cpu"] if issubclass(types[-1], TrainingArguments) else []
        command_line.parse_arguments(types, description, [*(argv[1:] if path.stem == "sweep" else argv), *here])
        raise ParsedError

    home = sys.modules["train_and_export"] if not hasattr(module, "parse_arguments") else module
    monkeypatch.setattr(home, "parse_arguments", parse)
    monkeypatch.setattr(command_line, "check_names", lambda *found: None)  # what they name is the reader's
    with pytest.raises(ParsedError):
        module.main(argv) if module.main.__code__.co_argcount else module.main()


def check_command(line: str, monkeypatch) -> None:
    """A command of a document is one that exists, with options that it takes."""
    words = shlex.split(line)
    if any(SCRIPT.fullmatch(word) for word in words):
        assert words[0] in ("python", "accelerate", "torchrun"), line
        check_script(words, monkeypatch)
    elif words[0] == "pip":
        extras = {extra for found in re.findall(r"\[([\w,-]+)\]", line) for extra in found.split(",")}
        assert extras <= set(PROJECT["optional-dependencies"]), line
    elif words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(encoding="utf-8"), line
    elif words[0] in ("python", "accelerate"):
        assert importlib.util.find_spec(words[words.index("-m") + 1]), line
    elif (ROOT / words[0]).is_file():
        assert os.access(ROOT / words[0], os.X_OK), line
    else:
        assert words[0] in PROJECT["scripts"], line


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_are_taken(page, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)  # where `--config recipes/…` is read from
    lines = [line for block in SHELL[page] for line in commands(block)] + inline_commands(PAGES[page])
    for line in lines:
        with monkeypatch.context() as own:
            check_command(line, own)


# --- files and links -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_are_there(page):
    named = re.findall(r"`((?:fpmgm|recipes|benchmarks|tests)/[\w/*.-]+\.\w+)`", PAGES[page])
    assert [name for name in named if not list(ROOT.glob(name))] == []


@pytest.mark.parametrize("page", PAGES)
def test_links_between_files_lead_somewhere(page):
    targets = re.findall(r"\]\((?!https?:)([^)#\s]+)", PAGES[page])
    assert [target for target in targets if not (ROOT / page).parent.joinpath(target).exists()] == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_picture_of_the_method_is_the_one_that_its_script_draws(theme):
    spec = importlib.util.spec_from_file_location("method", ROOT / "docs/method.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert (ROOT / f"docs/method_{theme}.svg").read_text(encoding="utf-8") == script.method(theme)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="mkdocstrings of Python 3.10 does not fit pymdown-extensions")
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs_autorefs", reason="needs `pip install 'fpmgm[docs]'`")
    command = ("-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site"))
    run_python(*command, NO_MKDOCS_2_WARNING="1")
    reference = {page.parent.name: page.read_text("utf-8") for page in tmp_path.glob("site/reference/*/index.html")}
    assert 'id="fpmgm.MGMGenerationMixin.generate"' in reference["sampling"]
    # Markdown takes the >>> of an example for a quotation, unless it stands under "Examples:" or between fences.
    assert [name for name, page in reference.items() if "<blockquote>" in page] == []
