"""What benchmarks compare trains what one process does: the contenders of overhead.py, and models of zoo.py."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.timeout(180)


def test_contenders_of_the_overhead_agree(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import overhead
    from models import Case

    case = Case("two blocks", "linear", 2, (4, 8), 2)
    contenders = [overhead.one_process(), overhead.engine("1f1b", driver_stage=True, size=2), overhead.trainer(2)]
    with overhead.started(contenders):
        for contender in contenders:
            contender.build(case, warmup=1)
        losses = [contender.sample(1, lead_s=0.1)["loss"] for contender in contenders]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    for name in ("bounds", "measure", "models", "overhead", "wan"):
        sys.modules.pop(name, None)


def test_a_row_of_the_zoo(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import zoo

    row = zoo.examine("gan", zoo.ZOO["gan"], zoo.QUICK)
    # Ten rows of 16 numbers in four microbatches, on three links: there and back, and once more without gradients.
    assert (row.stack, row.calls, row.step, row.hidden_bytes) == ("generator.blocks", 2, "once", 9 * 640 // 4)
    assert max(row.difference, row.skipping) < 1e-5
    for name in ("measure", "models", "zoo"):
        sys.modules.pop(name, None)
