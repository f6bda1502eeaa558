"""Which cases of a grid the ordinary run has time for: those that differ most. The others are marked slow."""

from collections.abc import Iterable
from typing import Any

import pytest
from _pytest.mark import ParameterSet


def slow(*values: Any) -> ParameterSet:
    """Mark one case slow."""
    return pytest.param(*values, marks=pytest.mark.slow)


def all_slow_but(cases: Iterable[Any], *quick: Any) -> list[Any]:
    """Mark all cases slow but some; a tuple is a case that has values for several names."""
    cases = list(cases)
    assert all(case in cases for case in quick), f"{quick} are not all among {cases}"
    return [case if case in quick else slow(*(case if isinstance(case, tuple) else (case,))) for case in cases]
