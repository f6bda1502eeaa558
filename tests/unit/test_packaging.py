"""What is installed is what is tracked."""

import os
import re
import subprocess
import sys
import tomllib
import venv
import warnings
import zipfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[2]
MOUNTED = ("strategies", "callbacks")  # root folders that install as skippipe_plugin.<name>
MAX_LINES, GOOD_LINES = 600, 400


@pytest.fixture(scope="module")
def tracked() -> dict[str, str]:
    """Every tracked file that is still there, with its mode in git."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    lines = subprocess.check_output(["git", "ls-files", "--stage", "-z"], cwd=ROOT, text=True).split("\0")
    files = {line.partition("\t")[2]: line.split()[0] for line in lines if line}
    return {name: mode for name, mode in files.items() if os.path.lexists(ROOT / name)}


@pytest.fixture(scope="module")
def package_files(tracked) -> set[str]:
    """The tracked files of the package, as they are named once installed."""
    mounted = {f"skippipe_plugin/{name}" for name in tracked if name.split("/")[0] in MOUNTED}
    return mounted | {
        name for name, mode in tracked.items() if name.startswith("skippipe_plugin/") and mode != "120000"
    }


@pytest.fixture(scope="module")
def wheel(tracked, tmp_path_factory) -> Path:
    """A wheel that is built from the tracked files only."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name, mode in tracked.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        if mode == "120000":
            (source / name).symlink_to((ROOT / name).readlink())
        else:
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(output), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = output.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel_files(wheel) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def test_the_wheel_holds_exactly_the_tracked_package_files(wheel_files, package_files) -> None:
    assert {name for name in wheel_files if ".dist-info/" not in name} == package_files


def test_no_generic_top_level_package_is_installed(wheel_files) -> None:
    top = {name.split("/")[0] for name in wheel_files}
    assert {name for name in top if not name.endswith(".dist-info")} == {"skippipe_plugin"}
    top_level = next(name for name in wheel_files if name.endswith("top_level.txt"))
    assert top_level.startswith("skippipe_plugin-")


def test_every_subpackage_is_listed(package_files) -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {str(PurePosixPath(name).parent).replace("/", ".") for name in package_files if name.endswith(".py")}
    assert packages == set(settings["packages"])
    assert {f"{package.replace('.', '/')}/__init__.py" for package in packages} <= package_files


def test_the_mounted_folders_are_links_in_git(tracked) -> None:
    for name in MOUNTED:
        assert tracked[f"skippipe_plugin/{name}"] == "120000"
        assert (ROOT / "skippipe_plugin" / name).resolve() == ROOT / name


def test_the_package_is_typed(wheel_files) -> None:
    assert "skippipe_plugin/py.typed" in wheel_files


def test_modules_stay_short(package_files, tracked) -> None:
    modules = [ROOT / name for name in tracked if name.endswith(".py") and not name.startswith("tests/")]
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in modules}
    if long := {name: lines for name, lines in lengths.items() if GOOD_LINES < lines <= MAX_LINES}:
        warnings.warn(f"longer than the {GOOD_LINES} lines that a module should have: {long}", stacklevel=1)
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


def test_continuous_integration_runs_the_line_of_the_readme() -> None:
    """It takes the command from there, so the two cannot differ; here is what it would find."""
    assert os.access(ROOT / ".ci/run", os.X_OK)
    (pattern,) = re.findall(r"sed -n '(s/.*/p)' README.md", (ROOT / ".ci/run").read_text())
    found = subprocess.run(["sed", "-n", pattern, "README.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[0] == 'pip install -e ".[test]" && pytest'
    assert (ROOT / "README.md").read_text().index(found.stdout.splitlines()[0]) < 1000, "not on the first screen"


def test_importing_the_package_imports_nothing_else_and_starts_nothing() -> None:
    program = """
import sys, threading
before = set(sys.modules)
import skippipe_plugin
print(*{name.partition(".")[0] for name in set(sys.modules) - before}, threading.active_count())
"""
    *imported, threads = run_elsewhere(sys.executable, "-c", program, PYTHONPATH=str(ROOT)).split()
    assert set(imported) - sys.stdlib_module_names == {"skippipe_plugin"}
    assert threads == "1"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_wheel_runs_the_quickstart_in_an_empty_environment(wheel, tmp_path) -> None:
    """The packages come from the index, as for a user; nothing of this environment or checkout is there."""
    venv.create(tmp_path / "environment", with_pip=True)
    python = str(tmp_path / "environment/bin/python")
    install = [python, "-m", "pip", "--disable-pip-version-check", "-q", "install", "--no-compile", str(wheel)]
    subprocess.run(install, check=True, timeout=800)
    (tmp_path / "project").mkdir()
    (tmp_path / "project/my_project.py").write_bytes((ROOT / "tests/docs/project/my_project.py").read_bytes())
    readme = (ROOT / "README.md").read_text()
    block = re.search(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    assert block
    ending = "import skippipe_plugin\nprint(trainer.global_step, skippipe_plugin.__file__)\n"
    (tmp_path / "project/train.py").write_text(block[1] + ending)
    steps, origin = run_elsewhere(python, "train.py", cwd=tmp_path / "project").splitlines()[-1].split()
    assert (int(steps), Path(origin).is_relative_to(tmp_path / "environment")) == (6, True)


def run_elsewhere(*command: str, cwd: Path | str = "/", **variables: str) -> str:
    """Run a program without the variables that lead to this checkout; return what it prints."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | variables
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=150, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout
