"""Faults on purpose, for tests of runs that should survive them: kill, stop, cut, reset, delay, refuse, fill the disk.

A fault is a value that says what happens to whom and when; :class:`Injector` lets it happen, by signals and by the
kernel's own means, to the workers on this host. Nothing of the run is replaced or told of it.
"""

from ..engine.phases import Moment, Phase
from .faults import At, Cut, Delay, Fault, FillDisk, Kill, RefuseStart, Reset, Stop, random_faults
from .injector import Injected, Injector

__all__ = [
    "At",
    "Cut",
    "Delay",
    "Fault",
    "FillDisk",
    "Injected",
    "Injector",
    "Kill",
    "Moment",
    "Phase",
    "RefuseStart",
    "Reset",
    "Stop",
    "random_faults",
]
