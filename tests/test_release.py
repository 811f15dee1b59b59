# SPDX-License-Identifier: Apache-2.0
"""What a release is made of: its notes, its version in every place, workflows that name what exists."""

import importlib.util
import re
from itertools import chain
from pathlib import Path

import pytest
import yaml
from setuptools.config.pyprojecttoml import load_file

import fpmgm
from tests.testing_utils import refused


ROOT = Path(__file__).parents[1]
PROJECT = load_file(ROOT / "pyproject.toml")["project"]


def load(path: str):
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_release_notes_are_the_changelogs_entry_of_that_version():
    notes = load(".ci/release_notes.py")
    text = (
        "# Changelog\n\n## Unreleased\n\n- new\n\n## 0.2.0 - 2030-01-01\n\n### Added\n\n- this\n\n## 0.1.0\n\n- first"
    )
    assert notes.release_notes(text, "0.2.0") == "### Added\n\n- this\n"
    assert notes.release_notes(text, "0.1.0") == "- first\n"
    for version in ("0.2", "0.3.0"):
        refused(f"no entry `## {re.escape(version)}`", notes.release_notes, text, version)
    refused(rf"the tag says 9\.9\.9, fpmgm/__init__.py {re.escape(fpmgm.__version__)}", notes.main, "9.9.9")


def test_the_version_is_one():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == fpmgm.__version__
    assert (citation["license"], PROJECT["license"]) == ("Apache-2.0", "Apache-2.0")


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_workflows_and_forms_call_what_exists(path):
    text = path.read_text(encoding="utf-8")
    read = yaml.safe_load(text)
    made = {line.split(":")[0] for line in (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()}
    assert set(re.findall(r"run: make ([\w-]+)", text)) <= made
    assert [name for name in re.findall(r"\.ci/[\w.]+", text) if not (ROOT / name).is_file()] == []
    for part in read.get("body", []):  # of a form
        assert part["attributes"]["label"] and part["type"] in ("textarea", "input")


def test_pinned_versions_are_those_that_the_extras_allow():
    from packaging.requirements import Requirement

    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(re.sub("_", "-", line).lower().split("==") for line in lines if "==" in line)
    asked = [*PROJECT["dependencies"], *chain(*PROJECT["optional-dependencies"].values())]
    for requirement in map(Requirement, asked):
        name = re.sub("_", "-", requirement.name).lower()
        assert name == "fpmgm" or requirement.specifier.contains(pinned[name]), str(requirement)
