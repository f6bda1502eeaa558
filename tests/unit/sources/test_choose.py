"""Which source a driver has, and what is said when there is none."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from skippipe_plugin.checked import SettingError
from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.job.launcher import Launcher, chosen_workers
from skippipe_plugin.job.network import NetworkConfig
from skippipe_plugin.sources import SOURCE_NAMES, Door, WorkerSource, make_source, workers_of
from skippipe_plugin.sources.launched import LaunchedSource
from skippipe_plugin.sources.local import LocalSource


class Mine:
    """A user's source."""

    def open(self) -> tuple[str, int]:
        return "127.0.0.1", 0

    def give(self, count: int, door: Door) -> Sequence[str]:
        return ()

    def gone(self) -> Mapping[str, str]:
        return {}

    def take_back(self, ticket: str) -> None: ...

    def close(self) -> None: ...


FIRST = Launcher(0, "10.0.0.1", 29500, hosts_store=True)
SECOND = Launcher(1, "10.0.0.1", 29500, hosts_store=True)


def a_source() -> WorkerSource:
    return Mine()


@pytest.mark.parametrize("workers", [None, *SOURCE_NAMES, a_source])
def test_a_setting_is_a_name_or_a_function(workers: Any) -> None:
    assert NetworkConfig(workers=workers).workers == workers


@pytest.mark.parametrize("workers", ["Ray", "rays", "", 3, True, Mine(), Mine, ["ray"]])
def test_anything_else_is_refused(workers: Any) -> None:
    with pytest.raises(SettingError, match=r"workers=.* is .*one of 'local', 'launched', 'ray', 'slurm', 'kubernetes'"):
        NetworkConfig(workers=workers)


def test_a_setting_comes_before_the_environment() -> None:
    assert workers_of(None, {}) is None
    assert workers_of(None, {"SKIPPIPE_WORKERS": "kubernetes"}) == "kubernetes"
    assert workers_of("ray", {"SKIPPIPE_WORKERS": "kubernetes"}) == "ray"
    with pytest.raises(SettingError, match=r"SKIPPIPE_WORKERS='pbs' is unknown; it is one of 'local'"):
        workers_of(None, {"SKIPPIPE_WORKERS": "pbs"})


def test_sources_by_name() -> None:
    assert isinstance(make_source("local"), LocalSource)
    assert isinstance(make_source("launched"), LaunchedSource)
    assert isinstance(make_source(Mine), Mine)


def test_a_package_that_is_missing_is_named_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SkipPipeError, match=r"needs the package ray, .*pip install 'skippipe-plugin\[ray\]'"):
        make_source("ray")


@pytest.mark.parametrize(("returned", "what"), [(None, "NoneType without open"), (Mine, "a class, not an inst")])
def test_a_function_that_returns_no_source(returned: Any, what: str) -> None:
    with pytest.raises(SkipPipeError, match=f"must return a source of workers.*{what}"):
        make_source(lambda: returned)


def test_what_a_launcher_leaves() -> None:
    assert chosen_workers(None, None, 1) == "local"
    assert chosen_workers(None, FIRST, 1) == chosen_workers("launched", FIRST, 1) == "launched"
    assert chosen_workers("ray", SECOND, 1) == "launched"
    with pytest.raises(SkipPipeError, match="workers='ray' brings workers, and a launcher has started"):
        chosen_workers("ray", FIRST, 1)
    with pytest.raises(SkipPipeError, match="workers='ray' takes one driver, and this run has drivers=2"):
        chosen_workers("ray", None, 2)
    assert chosen_workers("local", None, 2) == "local"


def test_a_supervisor_keeps_the_workers_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKIPPIPE_SUPERVISOR", "127.0.0.1:1")
    assert chosen_workers(None, None, 1) == "local"
    with pytest.raises(SkipPipeError, match="skippipe run keeps the workers itself"):
        chosen_workers("ray", None, 1)
    monkeypatch.undo()
    assert chosen_workers("ray", None, 1) == "ray"  # what the error advises


def test_a_limit_for_this_host_and_workers_from_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="local_workers=2 limits the workers of this host, and workers='ray' takes"):
        NetworkConfig(workers="ray", local_workers=2)
    assert NetworkConfig(workers="local", local_workers=2).local_workers == 2
    monkeypatch.setenv("SKIPPIPE_WORKERS", "ray")
    with pytest.raises(ValueError, match="local_workers=2 limits the workers of this host, and workers='ray' takes"):
        NetworkConfig(local_workers=2)


def test_a_door_gives_no_secret_away() -> None:
    door = Door("10.0.0.5", 29400, "ab" * 32)
    assert "ab" * 32 not in repr(door)
    assert not any("ab" * 32 in each for each in door.command("7"))
    assert door.environment()["SKIPPIPE_SECRET"] == "ab" * 32
