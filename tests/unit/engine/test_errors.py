"""Whatever a worker's exception pickles as, the driver raises an exception."""

import pickle

import pytest

from skippipe_plugin.engine.errors import SkipPipeError, unpack_exception


class Masked(Exception):
    """Comes out of a pickle as something else."""

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return str, ("not an exception",)


@pytest.mark.parametrize(
    ("packed", "text", "expected"),
    [
        (pickle.dumps(ValueError("it is odd")), "Traceback\nValueError: it is odd", "it is odd"),
        (pickle.dumps(Masked()), "Traceback\nMasked: it hides", "Masked: it hides"),
        (b"no pickle", "Traceback\nLocal: only there", "Local: only there"),
        (b"", "Traceback\nLocal: only there", "Local: only there"),
        (b"", " ", "it failed without a word"),
    ],
)
def test_an_exception_is_raised(packed: bytes, text: str, expected: str) -> None:
    error = unpack_exception(packed, text, "worker rank 1")
    assert isinstance(error, SkipPipeError | ValueError)
    assert str(error) == expected
    assert error.__notes__ == ["This exception was raised on worker rank 1; its traceback there stands above."]
