"""What user code sees of the optimizer's state for parameters that live on workers: nothing, and it is told so."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

from torch import Tensor

from ..engine.errors import SkipPipeError

_Entry = dict[str, Any]  # Any: the optimizer class defines it


class WatchedState(defaultdict[Tensor, _Entry]):
    """The ``state`` of an optimizer of which a part is elsewhere: reading that part is an error, not an empty dict.

    Args:
        state: What is here.
        name_of: Names a parameter that is elsewhere, None for others.
    """

    def __init__(self, state: Mapping[Tensor, _Entry], name_of: Callable[[object], str | None]) -> None:
        super().__init__(dict)
        self.update(state)
        self._name_of = name_of
        self.is_open = False
        """Whether the optimizer's own code reads it, which passes by parameters without gradients."""

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Let the body see what is here, and nothing of what is elsewhere."""
        before, self.is_open = self.is_open, True
        try:
            yield
        finally:
            self.is_open = before

    def __missing__(self, key: Tensor) -> _Entry:
        name = self._name_of(key)
        if name is None:
            return super().__missing__(key)
        if not self.is_open:
            self._refuse(f"the state of {name}")
        return {}

    def __setitem__(self, key: Tensor, value: _Entry) -> None:
        self._check_key(key)
        super().__setitem__(key, value)

    def __contains__(self, key: object) -> bool:
        self._check_key(key)
        return super().__contains__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        """Return an entry that is here."""
        self._check_key(key)
        return super().get(key, default)

    def __iter__(self) -> Iterator[Tensor]:
        self._check_all()
        return super().__iter__()

    def keys(self) -> Any:  # torch's kind of view
        """Return the parameters with state, which are not all here."""
        self._check_all()
        return super().keys()

    def values(self) -> Any:
        """Return the states, which are not all here."""
        self._check_all()
        return super().values()

    def items(self) -> Any:
        """Return parameters and states, which are not all here."""
        self._check_all()
        return super().items()

    def _check_key(self, key: object) -> None:
        if not self.is_open and "_name_of" in self.__dict__ and (name := self._name_of(key)) is not None:
            self._refuse(f"the state of {name}")

    def _check_all(self) -> None:
        if not self.is_open and "_name_of" in self.__dict__:
            self._refuse("a part of optimizer.state")

    @staticmethod
    def _refuse(what: str) -> NoReturn:
        raise SkipPipeError(
            f"{what} is kept by a worker, beside it; optimizer.state_dict() returns all of it, in the order of "
            "the parameters, and optimizer.load_state_dict() changes it"
        )
