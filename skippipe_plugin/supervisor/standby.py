"""A supervisor that stands by on another host, and takes the job over when the first one is lost with its host.

It reads in the first one's store what it will need, and says there where its own store is. The workers that joined by
hand from other hosts are told. When they have lost their driver and do not reach the first store, they say so to this
one. As soon as most of them do, the job goes on here: so two drivers never have it, whichever link is cut.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Collection
from dataclasses import replace
from typing import Final

from ..engine.errors import SkipPipeError
from ..engine.job_store import Address, JobState, JobStore

log = logging.getLogger(__name__)

_LOOK_S: Final = 0.5
_SAY_S: Final = 5.0
"""After how many seconds a wait says what it waits for."""
_PATIENCE_S: Final = 600.0
"""For how long the first supervisor may be away while most workers do not say so."""


def await_loss(first: Address, own: JobStore, fingerprint: str) -> JobState | int:
    """Wait until a job is lost with its host; return what is known of it, or its exit status if it ends by itself.

    Args:
        first: The store of the supervisor that has the job.
        own: The store with which the job will go on.
        fingerprint: Of the job's secret, as this host has it.

    Raises:
        SkipPipeError: Nobody has a job there, it has another secret, or it is lost and its workers do not come.
    """
    known, store = JobState(), _first_store(first, fingerprint)
    store.stand_by(own.address)
    log.warning("standing by for the job at %s:%d", *first)
    while True:
        try:
            while (status := store.ended()) is None:
                known = store.state()
                time.sleep(_LOOK_S)
            return status
        except RuntimeError:  # it does not answer
            again = _await_calls(first, own, known.names)
        if again is None:
            return replace(known, attempt=known.attempt + 1)
        store = again


def _first_store(first: Address, fingerprint: str) -> JobStore:
    host, port = first
    try:
        store = JobStore.reach(host, port)
    except (OSError, RuntimeError) as error:
        raise SkipPipeError(
            f"no job is run at {host}:{port} ({error}): --standby-for takes the address that the first skippipe run "
            "was started with, --host and --port"
        ) from error
    if store.fingerprint() != fingerprint:
        raise SkipPipeError(f"the job at {host}:{port} has another secret: copy its secret file to this host")
    return store


def _await_calls(first: Address, own: JobStore, names: Collection[str]) -> JobStore | None:
    """Wait until most workers have lost the first supervisor too (None), or until it is back.

    Raises:
        SkipPipeError: Neither happens.
    """
    host, port = first
    if not names:
        raise SkipPipeError(
            f"the job at {host}:{port} is lost, and no worker had joined it by hand from another host, so nothing is "
            "left of it: start it again from its last checkpoint"
        )
    before = {name: own.num_calls(name) for name in names}
    begun_s, told = time.monotonic(), False
    while time.monotonic() - begun_s < _PATIENCE_S:
        with contextlib.suppress(OSError, RuntimeError):
            return JobStore.reach(host, port)
        num_calling = sum(own.num_calls(name) > count for name, count in before.items())
        if 2 * num_calling > len(names):
            log.warning(
                "the job at %s:%d is lost; it goes on here, with %d of %d workers", *first, num_calling, len(names)
            )
            return None
        if not told and time.monotonic() - begun_s > _SAY_S:
            log.warning("%s:%d does not answer; %d of %d workers say so too", *first, num_calling, len(names))
            told = True
        time.sleep(_LOOK_S)
    raise SkipPipeError(
        f"the job at {host}:{port} does not answer, and most of its {len(names)} workers do not come to this host: it "
        "is not taken over, because it may go on there"
    )
