"""The examples do what the README says: the same module, in one process and as a pipeline, ends at the same loss."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = ["--steps", "12", "--layers", "3", "--width", "32", "--batch-size", "8"]


def run_example(name: str, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def train_lm(folder: Path, *arguments: str) -> str:
    return run_example("train_lm.py", *SMALL, "--output", str(folder), *arguments)


def validation_loss(output: str) -> float:
    match = re.search(r"validation loss: ([0-9.]+) nats per byte", output)
    assert match, output
    return float(match[1])


def test_the_example_trains_the_same_model_either_way(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 400)
    alone = train_lm(tmp_path / "alone", "--text", str(text), "--strategy", "none")
    pipeline = train_lm(tmp_path / "pipeline", "--text", str(text))
    assert validation_loss(pipeline) == pytest.approx(validation_loss(alone), abs=2e-4)
    assert "a sample:\nThe " in pipeline
    (checkpoint,) = (tmp_path / "pipeline").rglob("*.ckpt")
    assert checkpoint.stat().st_size > 0


@pytest.mark.slow
def test_the_plain_loop_prints_the_same_losses_either_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    losses = [
        [float(loss) for loss in re.findall(r"loss ([0-9.]+)", run_example("plain_loop.py", *arguments))]
        for arguments in ([], ["--plain"])
    ]
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)
    assert losses[0][0] > 2 * losses[0][-1] > 0


@pytest.mark.slow
def test_experts_are_balanced_in_a_partial_pipeline(tmp_path: Path) -> None:
    output = run_example("train_moe.py", *SMALL, "--num-microbatches", "4", "--output", str(tmp_path))
    assert validation_loss(output) < 6.0
    assert re.search(r"MaxVio of the last step: [0-9.]+", output)
    assert (tmp_path / "expert-loads.png").stat().st_size > 10_000


@pytest.mark.slow
def test_experts_are_spread_and_moved_in_a_partial_pipeline(tmp_path: Path) -> None:
    spread = ("--expert-parallel", "2", "--devices", "7", "--experts", "all")
    output = run_example("train_moe.py", *SMALL, *spread, "--num-microbatches", "4", "--output", str(tmp_path))
    assert validation_loss(output) < 6.0
    assert re.search(r"of the blocks' products each token got 67%", output)


@pytest.mark.slow
def test_stages_are_left_out_of_models(tmp_path: Path) -> None:
    picture = tmp_path / "omission.svg"
    output = run_example(
        "omission.py",
        *(
            "--stages",
            "3",
            "--layers",
            "3",
            "--width",
            "32",
            "--steps",
            "6",
            "--skip-ratio",
            "0.33",
            "--output",
            str(picture),
        ),
    )
    assert [line.split()[:3] for line in output.splitlines() if " of 3 " in line] == [
        [kept, "of", "3"] for kept in "321"
    ]
    assert "trained skipping 33%" in picture.read_text()


@pytest.mark.slow
def test_the_example_for_accelerate_trains_the_same_model_either_way(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 400)
    small = ["--steps", "12", "--layers", "3", "--width", "32", "--text", str(text)]
    alone = run_example("accelerate_lm.py", *small, "--plain", "--output", str(tmp_path / "alone"))
    pipeline = run_example("accelerate_lm.py", *small, "--output", str(tmp_path / "pipeline"))
    assert validation_loss(pipeline) == pytest.approx(validation_loss(alone), abs=2e-4)
    names = {file.name for file in (tmp_path / "pipeline").iterdir()} - {"skippipe.json"}
    assert names == {file.name for file in (tmp_path / "alone").iterdir()}
