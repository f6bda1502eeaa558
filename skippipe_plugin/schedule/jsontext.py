"""JSON from files of anybody: what cannot be reckoned with is refused when it is read."""

import json
from typing import Any, Final

LARGEST: Final = 1e100
"""No cost and no count is larger; sums and products of these stay finite."""
_LARGEST_WHOLE: Final = 2**63 - 1


def parse(text: str) -> Any:  # Any: JSON
    """Return what a text in JSON says.

    >>> parse("[1e308]")
    Traceback (most recent call last):
    ...
    ValueError: the number 1e308 is larger than any cost or count (1e+100)

    Raises:
        ValueError: It is no JSON, nested too deep, or holds a number that is too large.
    """
    try:
        return json.loads(text, parse_float=_float, parse_int=_whole)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _float(digits: str) -> float:
    value = float(digits)
    if abs(value) > LARGEST:
        raise ValueError(f"the number {_short(digits)} is larger than any cost or count ({LARGEST:g})")
    return value


def _whole(digits: str) -> int:
    if len(digits) > 20 or not abs(int(digits)) <= _LARGEST_WHOLE:
        raise ValueError(f"the number {_short(digits)} is larger than any cost or count ({_LARGEST_WHOLE})")
    return int(digits)


def _short(digits: str) -> str:
    return digits if len(digits) <= 24 else f"{digits[:20]}..."
