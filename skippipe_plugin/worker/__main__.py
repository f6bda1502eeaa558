"""``python -m skippipe_plugin.worker HOST:PORT``: a worker process that joins a driver and serves until it ends.

The job's secret comes from the environment variable ``SKIPPIPE_SECRET``, never from the command line.
"""

from __future__ import annotations

import logging
import os
import signal
import sys

from ..engine.channel import connect
from ..engine.errors import SkipPipeError
from ..engine.versions import own_versions
from .service import DriverGone, Worker

log = logging.getLogger("skippipe_plugin.worker")


def main(arguments: list[str]) -> int:
    """Join, serve, return the exit status."""
    if len(arguments) != 1 or ":" not in arguments[0]:
        sys.stderr.write("usage: python -m skippipe_plugin.worker HOST:PORT\n")
        return 2
    secret = os.environ.get("SKIPPIPE_SECRET")
    if secret is None:
        sys.stderr.write("SKIPPIPE_SECRET is not set: a worker must know its job's secret\n")
        return 2
    # Ctrl-C in a terminal reaches the whole process group; it is for the driver, which then ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    host, port = arguments[0].rsplit(":", 1)
    try:
        channel = connect(host, int(port), bytes.fromhex(secret))
        channel.send("hello", {"pid": os.getpid(), "versions": own_versions()})
        worker = Worker(channel)
        signal.signal(signal.SIGTERM, lambda *_: worker.leave() or os._exit(128 + signal.SIGTERM))
        while worker.serve() is not None:
            pass
    except DriverGone:
        return 1
    except SkipPipeError as error:
        log.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
