"""Imports point one way, and few modules know the frameworks."""

import ast
from pathlib import Path

import skippipe_plugin

ROOT = Path(skippipe_plugin.__file__).parent
LAYERS = {
    **{"schedule": 0, "moe": 1, "recovery": 1, "engine": 1, "worker": 2, "driver": 3, "job": 4, "supervisor": 4},
    **{"sources": 3, "model": 5, "strategies": 6, "accelerate": 6, "callbacks": 7, "testing": 7},
}
APART = {("engine", "moe"), ("engine", "recovery"), ("moe", "engine"), ("recovery", "engine"), ("recovery", "moe")}
"""Those that stand beside each other and import none of the other."""


def imports(path: Path) -> set[str]:
    """Return the absolute names of what a module imports, at its top or inside of functions."""
    package = ["skippipe_plugin", *path.relative_to(ROOT).parts[:-1]]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            found.add(".".join([*base, *(node.module or "").split(".")]).strip("."))
    return found


def modules() -> list[Path]:
    return [path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] in LAYERS]


def folder(name: str) -> str:
    parts = name.split(".")
    return parts[1] if parts[0] == "skippipe_plugin" and len(parts) > 1 else ""


def test_imports_point_one_way() -> None:
    wrong = []
    for path in modules():
        own = path.relative_to(ROOT).parts[0]
        for name in imports(path):
            other = folder(name)
            upward = other in LAYERS and LAYERS[other] > LAYERS[own]
            if upward or (own, other) in APART:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_what_user_code_sees_of_blocks_knows_no_spread_model() -> None:
    wrong = [path.name for path in (ROOT / "driver" / "capture").glob("*.py") if "model" in map(folder, imports(path))]
    assert not wrong


def test_only_two_folders_know_lightning() -> None:
    names = ("lightning", "lightning_fabric", "pytorch_lightning")
    known = {p.relative_to(ROOT).parts[0] for p in modules() if any(n.split(".")[0] in names for n in imports(p))}
    assert known <= {"strategies", "callbacks"}


def test_few_files_know_accelerate() -> None:
    known = {str(p.relative_to(ROOT)) for p in modules() if any(n.split(".")[0] == "accelerate" for n in imports(p))}
    assert known <= {"accelerate/pipe.py", "accelerate/accelerator.py", "accelerate/__init__.py"}


def test_schedules_need_no_torch() -> None:
    assert not [p.name for p in (ROOT / "schedule").glob("*.py") if any(n.split(".")[0] == "torch" for n in imports(p))]


def test_nobody_reads_a_clock_that_jumps() -> None:
    """Waits and measurements last as long as they do when a host's clock is set, or when summer time ends."""
    jumping = {
        ("time", "time"),
        ("time", "time_ns"),
        ("time", "localtime"),
        ("datetime", "now"),
        ("datetime", "utcnow"),
    }
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and (node.value.id, node.attr) in jumping
    ]
    assert not wrong
