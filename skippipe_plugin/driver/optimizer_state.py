"""What user code sees of the optimizer's state for parameters that live on workers: nothing, and it is told so."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol, Self

from torch import Tensor

from ..engine.errors import SkipPipeError

_Entry = dict[str, Any]  # Any: the optimizer class defines it


class Elsewhere(Protocol):
    """Has the entries of the parameters that are elsewhere."""

    def take(self, key: Tensor) -> _Entry | None:
        """Drop the entry of one, and return it if there was one."""

    def drop(self) -> None:
        """Drop all entries."""


class Retired:
    """Stands for the workers of an optimizer that they no longer step: a later fit has made another."""

    def take(self, key: Tensor) -> _Entry | None:
        """Refuse to drop the entry of one parameter."""
        self.refuse()

    def drop(self) -> None:
        """Refuse to drop any."""
        self.refuse()

    @staticmethod
    def refuse() -> NoReturn:
        """Say what has become of it.

        Raises:
            SkipPipeError: Always.
        """
        raise SkipPipeError(
            "the state of this optimizer was on the workers, which step that of a later fit now. Save it before that "
            "fit (trainer.save_checkpoint, optimizer.state_dict()), or bring it here: trainer.strategy.gather()"
        )


class WatchedState(defaultdict[Tensor, _Entry]):
    """The ``state`` of an optimizer of which a part is elsewhere: reading that part is an error, not an empty dict.

    Args:
        state: What is here.
        name_of: Names a parameter that is elsewhere, None for others.
        elsewhere: Drops there what is dropped here.
    """

    def __init__(
        self, state: Mapping[Tensor, _Entry], name_of: Callable[[object], str | None], elsewhere: Elsewhere
    ) -> None:
        super().__init__(dict)
        super().update(state)
        self._elsewhere = elsewhere
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

    def __len__(self) -> int:
        self._check_all()
        return super().__len__()

    # A state is dropped to begin anew: what is elsewhere goes with it.

    def clear(self) -> None:
        """Drop the state of all parameters."""
        super().clear()
        if not self.is_open:
            self._elsewhere.drop()

    def pop(self, key: Any, *default: Any) -> Any:
        """Drop the state of a parameter, and return it."""
        if self.is_open or self._name_of(key) is None:
            return super().pop(key, *default)
        entry = self._elsewhere.take(key)
        if entry is None and not default:
            raise KeyError(key)
        return default[0] if entry is None else entry

    def __delitem__(self, key: Tensor) -> None:
        if self.is_open or self._name_of(key) is None:
            super().__delitem__(key)
        elif self._elsewhere.take(key) is None:
            raise KeyError(key)

    def popitem(self) -> tuple[Tensor, _Entry]:
        """Drop the last one's state, which may be elsewhere."""
        self._check_all()
        return super().popitem()

    def setdefault(self, key: Any, default: Any = None) -> Any:
        """Return an entry that is here, or make it."""
        self._check_key(key)
        return super().setdefault(key, default)

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Take over entries of what is here."""
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def __ior__(self, other: Any) -> Self:  # type: ignore[override, misc]
        self.update(other)
        return self

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
