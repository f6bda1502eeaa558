"""A replacement that does not start is tried again, and not for ever."""

import pytest

from skippipe_plugin.driver.pool import EndedEarly
from skippipe_plugin.engine.errors import SkipPipeError, StartRefused
from skippipe_plugin.job import job as job_module
from skippipe_plugin.job.job import DriverJob

NOT_NOW = [StartRefused("no process is left"), EndedEarly("it ended with exit status 1")]


class Job(DriverJob):
    """Gets workers when its host has been asked often enough."""

    def __init__(self, *failures: SkipPipeError) -> None:
        self.failures = list(failures)

    def acquire(self, num_workers: int) -> list:
        if self.failures:
            raise self.failures.pop(0)
        return [object()] * num_workers


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_module, "_TRIES_AFTER_S", (0.0, 0.0, 0.0))


def test_a_replacement_is_tried_again() -> None:
    assert len(Job(*NOT_NOW).take(2)) == 2


def test_what_never_starts_is_an_error() -> None:
    with pytest.raises(StartRefused, match="no process is left"):
        Job(*NOT_NOW, *NOT_NOW[:1] * 2).take(1)


def test_another_error_is_raised_at_once() -> None:
    job = Job(SkipPipeError("nobody came in time"), *NOT_NOW)
    with pytest.raises(SkipPipeError, match="in time"):
        job.take(1)
    assert len(job.failures) == 2
