"""Each line of the contract names tests, and they exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/contract.md"
ROWS = [
    line for line in PAGE.read_text().splitlines() if line.startswith("| ") and not line.startswith(("| what", "| ---"))
]


def functions(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[2:60])
def test_every_line_names_tests_that_exist(row: str) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", row)
    assert named, "the line names no test"
    for file, function in named:
        assert (ROOT / file).is_file(), f"there is no {file}"
        assert not function or function in functions(ROOT / file), f"{file} has no {function}"


def test_the_contract_has_lines() -> None:
    assert len(ROWS) > 30
