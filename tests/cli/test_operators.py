"""`mergelab operators` prints what the operators declare of themselves, and the documentation page agrees."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from mergelab.cli.main import cli
from mergelab.operators import OPERATORS


def test_the_list_has_one_line_per_operator() -> None:
    lines = CliRunner().invoke(cli, ["operators"]).output.splitlines()
    assert [line.split()[0] for line in lines] == list(OPERATORS)
    assert all(operator.summary in line for line, operator in zip(lines, OPERATORS.values(), strict=True))


def test_one_operator_is_explained_with_its_parameters() -> None:
    text = CliRunner().invoke(cli, ["operators", "ties"]).output
    for parameter in OPERATORS["ties"].parameters:
        line = next(line for line in text.splitlines() if line.split()[:1] == [parameter.name])
        assert ("per model" in line) == parameter.per_model
        assert ("required" in line) == parameter.required


def test_json_is_the_whole_declaration() -> None:
    rows = json.loads(CliRunner().invoke(cli, ["operators", "--json"]).output)
    assert [row["name"] for row in rows] == list(OPERATORS)
    for row, operator in zip(rows, OPERATORS.values(), strict=True):
        assert [p["name"] for p in row["parameters"]] == [p.name for p in operator.parameters]
        assert row["base"] == operator.base


def test_an_unknown_operator_names_the_nearest() -> None:
    result = CliRunner().invoke(cli, ["operators", "tie"])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: there is no operator 'tie' (did you mean 'ties'?)")


def test_the_documentation_page_is_current(repository: Path) -> None:
    printed = CliRunner().invoke(cli, ["operators", "--markdown"]).output
    page = (repository / "docs" / "operators.md").read_text(encoding="utf-8")
    assert page == printed, "write it again: mergelab operators --markdown > docs/operators.md"
