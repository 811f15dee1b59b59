# SPDX-License-Identifier: Apache-2.0
"""Files of results."""

import json

import pytest

from fpmgm.evaluation.report import as_json, short_names, table, write_report
from tests.testing_utils import refused


def test_a_cell_cannot_end_its_line_or_column():
    lines = table(["a|b", "c"], [["x\ny", None], [1.5, "|"]]).splitlines()
    assert lines == ["| a\\|b | c |", "|---|---|", "| x y |  |", "| 1.5 | \\| |"]


def test_results_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "γ.json"
    write_report(path, {"γ": 1.0}, "table ±\n")
    assert json.loads(path.read_text("utf-8")) == {"γ": 1.0}
    assert path.with_suffix(".md").read_text("utf-8") == "table ±\n"
    with pytest.raises(TypeError):
        write_report(path, {"γ": object()}, "other")
    assert path.with_suffix(".md").read_text("utf-8") == "table ±\n"
    assert sorted(p.name for p in path.parent.iterdir()) == ["γ.json", "γ.md"]


def test_of_several_processes_one_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("fpmgm.evaluation.report.rank", lambda: 1)
    write_report(tmp_path / "a.json", {}, "text")
    assert not list(tmp_path.iterdir())


def test_names_are_as_short_as_tells_all_apart(tmp_path):
    (tmp_path / "export").mkdir()
    paths = ["org/export", str(tmp_path / "export"), f"{tmp_path}/export/../other/run"]
    assert short_names("model", paths) == ["org-export", f"{tmp_path.name}-export", "other-run"]
    refused(r"`model`=.* twice", short_names, "model", [str(tmp_path), f"{tmp_path}/export/.."])


def test_json_is_what_the_standard_library_reads_and_writes():
    value = {24: [1, {"a": {}, "b": []}], True: None, None: [[1.5, "é\n"], ()], "c": {"d": [{0.5: 1}]}}
    assert json.loads(as_json(value)) == json.loads(json.dumps(value))
