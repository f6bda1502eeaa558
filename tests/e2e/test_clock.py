"""The clocks of the hosts are set while a run trains: by an hour to and fro, on the driver and on every worker."""

import time
from pathlib import Path

import pytest

from skippipe_plugin.callbacks import StageRecovery
from skippipe_plugin.strategies import stop_workers

from .models import Transformer, tokens
from .modules import LanguageModel, loader
from .support import assert_same_run, train
from .test_recovery import At, kill

JUMPING = """
import itertools, time
_real, _calls = time.time, itertools.count()
time.time = lambda: _real() + 3600 * (next(_calls) % 3 - 1)
"""


def make() -> LanguageModel:
    return LanguageModel(Transformer())


@pytest.mark.slow
def test_clocks_that_jump_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = loader(tokens(24))
    expected = train(make, data, 1)
    stop_workers()  # those that stand have the clock of before
    told = f"import os, pathlib\npathlib.Path({str(tmp_path)!r}, f'pid-{{os.getpid()}}').touch()\n"
    (tmp_path / "sitecustomize.py").write_text(JUMPING + told)
    monkeypatch.syspath_prepend(str(tmp_path))  # workers get the driver's paths
    before = time.time
    try:
        exec(JUMPING, {})
        assert abs(time.time() - time.time()) > 3000
        recovery = StageRecovery(spares=1)
        found = train(make, data, 3, {"replicas": 2}, callbacks=[recovery, At("on_train_batch_start", 3, kill(2))])
    finally:
        time.time = before
        stop_workers()
    assert_same_run(found, expected)
    assert len(list(tmp_path.glob("pid-*"))) >= 4  # workers and the spare, whose clocks jump
    assert [event.source for event in recovery.events] == ["replica"]
