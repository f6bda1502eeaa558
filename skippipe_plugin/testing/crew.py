"""The workers of this process's jobs that are on this host, as the injector finds them."""

from __future__ import annotations

import os

from ..driver.links import Link
from ..job.job import DriverJob, driver_jobs


def busy() -> dict[int, int]:
    """Return the process ids of the workers that pipelines use, by rank."""
    found: dict[int, int] = {}
    for job in driver_jobs():
        resting = set(map(id, job.resting()))
        found |= {link.rank: pid for link, pid in _here(job) if id(link) not in resting and link.rank > 0}
    return found


def spares() -> list[int]:
    """Return the process ids of the workers that nobody uses."""
    return [link.pid for job in driver_jobs() for link in job.resting() if link.pid is not None]


def starting() -> set[int]:
    """Return the process ids of the workers that have not joined yet."""
    return {pid for job in driver_jobs() for pid in job.starting()}


def control_ports() -> set[int]:
    """Return the ports to which commands go, the store's included."""
    pools = [job.pool for job in driver_jobs()]
    return {pool.address[1] for pool in pools} | {pool.store.port for pool in pools if pool.store is not None}


def pid_of(rank: int) -> int | None:
    """Return the process id of a rank; 0 is this driver."""
    return os.getpid() if rank == 0 else busy().get(rank)


def _here(job: DriverJob) -> list[tuple[Link, int]]:
    return [(link, link.pid) for link in list(job.pool.links) if link.pid is not None and not link.gone]
