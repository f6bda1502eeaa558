"""The messages that the page on troubleshooting explains are those of the code."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/guide/troubleshooting.md"
HOLE = "..."


def texts(tree: ast.AST) -> Iterator[str]:
    """Yield the strings of a module; what is formatted into one is a hole."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(
                str(part.value) if isinstance(part, ast.Constant) else HOLE
                for part in node.values
                if isinstance(part, ast.Constant | ast.FormattedValue)
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.sub(r"%[sd.\df]+", HOLE, node.value)  # logging's


def pattern(heading: str) -> re.Pattern[str]:
    """Any text may stand in the place of a hole."""
    return re.compile(".*?".join(map(re.escape, heading.split(HOLE))), re.DOTALL)


def test_every_message_that_is_explained_exists() -> None:
    folders = (ROOT / name for name in ("skippipe_plugin", "strategies", "callbacks"))
    files = [file for folder in folders for file in folder.rglob("*.py")]
    said = [text for file in files for text in texts(ast.parse(file.read_text()))]
    headings = re.findall(r"^### `(.*)`$", PAGE.read_text(), re.MULTILINE)
    assert len(headings) > 20
    assert [each for each in headings if not any(pattern(each).search(text) for text in said)] == []
