"""Experts that are spread over the replicas of several drivers' stages."""

import pytest

from .support import plain, run


@pytest.mark.slow
def test_two_drivers_share_spread_experts() -> None:
    """Both drivers' microbatches meet in turn on the same replicas: the result is that of DDP."""
    expected = run(plain(0, 2, "experts"))
    found = run(plain(6, 2, "experts"))
    assert len(found) == 2
    for mine, theirs in zip(found, expected, strict=True):
        assert mine["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
        assert mine["metrics"] == pytest.approx(theirs["metrics"], rel=1e-5)
