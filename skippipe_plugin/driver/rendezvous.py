"""Where the processes of a job find each other."""

from __future__ import annotations

from dataclasses import dataclass

from ..engine.pairs import LinkBackend


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where the processes of a job find each other."""

    host: str
    """The address this driver's groups and control channels are bound to."""
    store_host: str
    store_port: int
    """Of the job's store, where it has one."""
    other_drivers: tuple[tuple[str, int], ...] = ()
    """The control addresses of the drivers after the first."""
    backend: LinkBackend = "gloo"
    """What carries hidden states and gradients."""
