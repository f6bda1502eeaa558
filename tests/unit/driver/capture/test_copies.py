"""Copies of what user code may change: what is brought back is as it was, its order too."""

from collections import OrderedDict, defaultdict, deque
from typing import Any

import pytest

from skippipe_plugin.driver.capture.copies import container_copy


def moved() -> OrderedDict[str, int]:
    """An order that is not the one in which the keys came."""
    value = OrderedDict(a=1, b=2, c=3)
    value.move_to_end("a")
    return value


@pytest.mark.parametrize("value", [moved(), {"a": 1}, defaultdict(int, a=1), [1, 2], deque([1, 2], 2), {1, 2}])
def test_a_container_is_what_it_was(value: Any) -> None:
    before = list(value.items()) if isinstance(value, dict) else list(value)
    copied = container_copy("it", value, frozenset())
    assert not list(copied.changes())
    copied.restore()
    assert (list(value.items()) if isinstance(value, dict) else list(value)) == before
    value.clear()
    assert list(copied.changes())
    copied.restore()
    assert (list(value.items()) if isinstance(value, dict) else list(value)) == before
