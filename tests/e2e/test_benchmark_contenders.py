"""The contenders of benchmarks/overhead.py: whatever they are built on, they train what one process does."""

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
