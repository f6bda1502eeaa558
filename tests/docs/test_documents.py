"""Every code block of every document runs, from the first to the last, as a reader would type them."""

import json
import re
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from sybil import Document, Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

from skippipe_plugin.schedule import CostModel, full_schedule, simulate
from tests.grids import slow

from . import shell
from .project.my_project import MyLightningModule

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])


def run_commands(example: Example) -> None:
    for command in shell.commands(example.parsed, prompts=example.region.lexemes["arguments"] == "console"):
        shell.check(command)


SYBIL = Sybil(
    [
        PythonCodeBlockParser(),
        CodeBlockParser("bash", run_commands),
        CodeBlockParser("console", run_commands),
        SkipParser(),
    ]
)


def parse(path: Path) -> Document:
    document = SYBIL.parse(path)
    document.namespace["__name__"] = "__main__"  # as in the reader's script: its classes travel by value
    return document


def save_checkpoint(path: Path) -> None:
    module = MyLightningModule()
    state = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    torch.save({**state, "pytorch-lightning_version": "2.6.0"}, path)


def save_transformer(path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 32}
    LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=12)).save_pretrained(path)


SCHEDULE = full_schedule("1f1b", num_stages=3, num_microbatches=8)
COSTS = CostModel.uniform(3, 4, latency_s=0.1)
MAKE: dict[str, Callable[[Path], object]] = {
    "case.json": lambda path: shutil.copy(ROOT / "benchmarks/cases/two_cities.json", path),
    "schedule.json": SCHEDULE.save,
    "costs.json": COSTS.save,
    "*.trace.json": lambda path: path.write_text(json.dumps(simulate(SCHEDULE, COSTS).chrome_trace())),
    "last.ckpt": save_checkpoint,
    "hf-model": save_transformer,
}
"""The files that documents speak of, by patterns of their names."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a reader, with the files that the documents speak of."""
    shutil.copytree(Path(__file__).parent / "project", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


SLOW = [ROOT / "docs/guide" / name for name in ("accelerate.md", "joining.md", "timelines.md")]


@pytest.mark.parametrize(
    "path",
    [slow(path) if path in SLOW else path for path in DOCUMENTS],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_code_blocks_run(path: Path, folder: Path) -> None:
    document = parse(path)
    for name in dict.fromkeys(re.findall(r"[\w.-]+", document.text)):
        for pattern, make in MAKE.items():
            if fnmatch(name, pattern):
                make(folder / name)
    for example in document.examples():
        example.evaluate()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_local_links_lead_somewhere(path: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", path.read_text()):
        if "://" in target:
            continue
        folder = ROOT if target.startswith("/") else path.parent
        file = (folder / target.lstrip("/")).resolve() if target else path
        assert file.exists(), f"{path.name} links to {target}, which does not exist"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{path.name} links to {target}#{anchor}; there is no such heading"


def anchors(path: Path) -> set[str]:
    """Return the names that headings get on the web, and in the site; those that are set with ``(name)=`` too."""
    text = path.read_text()
    for included in re.findall(r"^```{include} (\S+)$", text, re.MULTILINE):
        text += (path.parent / included).read_text()
    headings = re.findall(r"^#+ (.*)", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    named = set(re.findall(r"^\((\S+)\)=$", text, re.MULTILINE))
    return named | {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
