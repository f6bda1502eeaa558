"""What stands on the driver for a tensor that a block returned beside its hidden states and that stayed on its worker.

It may be unpacked, kept and dropped like any value; whatever asks for more is an error that names the block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from ...engine.call import Made
from ...engine.errors import SkipPipeError


@dataclass(slots=True, eq=False)
class Recording:
    """What all that stands for tensors of one call of the stack knows: whether the call is still being made."""

    is_over: bool = False
    """Whether the last block has been called."""
    compute: Callable[..., Any] | None = None
    """Notes what code between the blocks computes of what stands for tensors."""
    wanted: OutputWanted | None = None
    """What was asked for after it was over, and was not there."""

    def want(self, message: str, made: frozenset[Made]) -> NoReturn:
        """Raise, and remember it: user code may catch it."""
        self.wanted = OutputWanted(message, made)
        raise self.wanted

    def check(self) -> None:
        """Raise what user code has caught."""
        if self.wanted is not None:
            raise self.wanted


class OutputWanted(SkipPipeError, is_refusal=True):
    """The driver's code has asked for a tensor that a block returned and that nothing had said would be needed."""

    def __init__(self, message: str, made: frozenset[Made]) -> None:
        super().__init__(message)
        self.made = made


class Unavailable:
    """Good for nothing but being ignored.

    Args:
        block: The name of the block that returned it.
        position: Where it stood among what the block returned.
        made: Which tensor it stands for; None for an object.
        recording: The call that it belongs to.
    """

    __slots__ = ("_block", "_made", "_position", "_recording")

    def __init__(self, block: str, position: int, made: Made | None = None, recording: Recording | None = None) -> None:
        self._block = block
        self._position = position
        self._made = made
        self._recording = recording

    def __reduce__(self) -> tuple[type[Unavailable], tuple[str, int]]:
        return Unavailable, (self._block, self._position)

    def check_wanted(self, what: str) -> None:
        """Raise :class:`OutputWanted` if it stands for a tensor of a call that is over; ``what`` needs it."""
        if self._recording is not None and self._recording.is_over:
            self._refuse(what)

    def made_in(self, recording: Recording | None) -> Made | None:
        """Return which tensor it stands for, if it is one and of that call."""
        return self._made if self._recording is recording else None

    def __repr__(self) -> str:
        return f"<a second output of {self._block}, which stays on its worker>"

    def __getattr__(self, name: str) -> Any:  # Any: it never returns
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)  # pickle, copy and numpy look for what is not there
        self._refuse(f".{name}")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        found = _first((*args, *(kwargs or {}).values()))
        assert found is not None
        found._refuse(getattr(func, "__name__", "a torch function"))

    def _refuse(self, what: str) -> NoReturn:
        message = (
            f"{what} needs the second output of {self._block} (item {self._position} of what it returns), but that "
            "stays on its worker: blocks of a pipeline exchange tensors only. Compute what you need from "
            "the stack's output, or train without the pipeline"
        )
        if self._made is None:
            raise SkipPipeError(message)
        if self._recording is None:
            raise OutputWanted(message, frozenset((self._made,)))
        self._recording.want(message, frozenset((self._made,)))


def _first(values: Any) -> Unavailable | None:
    for value in values:
        if isinstance(value, Unavailable):
            return value
        if isinstance(value, (list, tuple)) and (found := _first(value)) is not None:
            return found
    return None


def _refusing(name: str) -> Any:  # Any: a method of any signature
    def refuse(self: Unavailable, *_: Any, **__: Any) -> NoReturn:
        self._refuse(name.strip("_"))

    return refuse


_OPERATORS: Final = """
add sub mul matmul truediv floordiv mod divmod pow lshift rshift and xor or
radd rsub rmul rmatmul rtruediv rfloordiv rmod rdivmod rpow rlshift rrshift rand rxor ror
iadd isub imul imatmul itruediv ifloordiv imod ipow neg pos abs invert
lt le eq ne gt ge bool int float complex index round trunc floor ceil len iter next contains getitem setitem
delitem call array enter
"""
for _operator in _OPERATORS.split():
    setattr(Unavailable, f"__{_operator}__", _refusing(f"__{_operator}__"))
Unavailable.__hash__ = object.__hash__  # type: ignore[method-assign]
