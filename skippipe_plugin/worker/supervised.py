"""``python -m skippipe_plugin.worker.supervised STORE KEY``: a worker that outlives its driver.

``skippipe run`` starts it. It finds the driver's address in the store under KEY; when that driver is gone it keeps what
it holds and waits for the next one, as long as the supervisor lives.
"""

from __future__ import annotations

from .parent import end_with_parent, end_with_stdin

if __name__ == "__main__":
    end_with_parent()  # before torch is imported, below
    end_with_stdin()

import logging
import os
import signal
import sys

from ..engine.channel import ChannelError
from ..engine.errors import SkipPipeError
from ..engine.job_store import JobStore
from .joining import dial, parse_address
from .processes import end_now
from .service import DriverGone, Worker

log = logging.getLogger("skippipe_plugin.worker")


def main(arguments: list[str]) -> int:
    """Serve one driver after the other, return the exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in python -m skippipe_plugin.worker
    (host, port), key = parse_address(arguments[0]), arguments[1]
    secret = bytes.fromhex(os.environ["SKIPPIPE_SECRET"])
    store = JobStore.reach(host, port)
    worker = Worker(dial(store, key, secret), outlives=True)
    signal.signal(signal.SIGTERM, lambda *_: worker.leave() or os._exit(128 + signal.SIGTERM))
    try:
        while not _serve(worker):
            worker.rejoin(dial(store, key, secret))
    except SkipPipeError as error:
        log.error("%s", error)
        return 1
    return 0


def _serve(worker: Worker) -> bool:
    """Serve one driver; return whether it told the worker to end."""
    try:
        while worker.serve() is not None:
            pass
    except (DriverGone, ChannelError):
        return False
    return True


if __name__ == "__main__":
    end_now(main(sys.argv[1:]))
