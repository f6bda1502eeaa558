"""Into how many chunks the tokens of a layer are cut, so that one travels while another is computed: found by trying.

How long compute and exchange take depends on the machine, the links and the batch, so nothing is modelled: steps of a
run take turns with several degrees, and the fastest stays (as in Tutel, arXiv 2206.03382, section 4.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

DEGREES = (1, 2, 4)
ROUNDS = 3
WARM_UP = 2
"""Steps that are not counted: the first ones allocate memory and import what they need."""


class OverlapTuner:
    """Chooses a degree from measured steps.

    >>> tuner = OverlapTuner(degrees=(1, 2), rounds=1, warm_up=0)
    >>> for seconds in (1.0, 0.5):
    ...     tuner.note(seconds)
    >>> tuner.is_tuning, tuner.degree
    (False, 2)
    """

    def __init__(self, degrees: Sequence[int] = DEGREES, rounds: int = ROUNDS, warm_up: int = WARM_UP) -> None:
        """Try every degree in ``rounds`` steps after ``warm_up`` others."""
        self._degrees = tuple(degrees)
        self._left = warm_up
        self._rounds = rounds
        self._seconds: list[float] = []

    @property
    def is_tuning(self) -> bool:
        """Whether more steps have to be measured."""
        return len(self._seconds) < self._rounds * len(self._degrees)

    @property
    def degree(self) -> int:
        """The degree of the coming step."""
        if self.is_tuning:
            return self._degrees[len(self._seconds) % len(self._degrees)]
        return min(self._degrees, key=lambda degree: median(self._of(degree)))

    def note(self, seconds: float) -> None:
        """Take up what the step with the present degree took."""
        if self._left:
            self._left -= 1
        elif self.is_tuning:
            self._seconds.append(seconds)

    def _of(self, degree: int) -> list[float]:
        return self._seconds[self._degrees.index(degree) :: len(self._degrees)]
