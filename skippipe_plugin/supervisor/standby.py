"""A supervisor that stands by on another host, and takes the job over when the first one is lost with its host.

It reads in the first one's store what it will need, and says there where its own store is. The workers that joined by
hand from other hosts are told. When they have lost their driver and do not reach the first store, they say so to this
one, and of which workers they know: some may have joined since this one last looked. As soon as most of them do, the
job goes on here: so two drivers never have it, whichever link is cut.
"""

from __future__ import annotations

import contextlib
import logging
import time
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
_UNKNOWN_S: Final = 30.0
"""For how long it may be away while no worker is known of."""


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
            found = _await_calls(first, own, known)
        if isinstance(found, JobState):
            return replace(found, attempt=found.attempt + 1)
        store = found


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


def _await_calls(first: Address, own: JobStore, known: JobState) -> JobStore | JobState:
    """Wait until most workers have lost the first supervisor too, or until it is back.

    Returns:
        The store of the first one that is back, or else what is known now that workers have told what they know.

    Raises:
        SkipPipeError: Neither happens.
    """
    host, port = first
    before = own.calls()
    begun_s, told = time.monotonic(), False
    while (waited_s := time.monotonic() - begun_s) < (_PATIENCE_S if known.names else _UNKNOWN_S):
        with contextlib.suppress(OSError, RuntimeError):
            return JobStore.reach(host, port)
        calling = [name for name, count in own.calls().items() if count > before.get(name, 0)]
        known = known.learn(map(own.told_by, calling))
        num_calling, num = len(known.names.intersection(calling)), len(known.names)
        if 2 * num_calling > num:
            log.warning("the job at %s:%d is lost; it goes on here, with %d of %d workers", *first, num_calling, num)
            return known
        if not told and waited_s > _SAY_S:
            log.warning("%s:%d does not answer; %d of %d workers say so too", *first, num_calling, num)
            told = True
        time.sleep(_LOOK_S)
    if not known.names:
        raise SkipPipeError(
            f"the job at {host}:{port} is lost, and no worker had joined it by hand from another host, so nothing is "
            "left of it: start it again from its last checkpoint"
        )
    raise SkipPipeError(
        f"the job at {host}:{port} does not answer, and most of its {len(known.names)} workers do not come to this "
        "host: it is not taken over, because it may go on there"
    )
