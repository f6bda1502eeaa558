"""``python -m skippipe_plugin.worker HOST:PORT [TICKET]``: a worker of its driver's source, which ends with the driver.

The job's secret comes from the environment variable ``SKIPPIPE_SECRET``. By hand, ``skippipe worker`` is the command.
"""

from __future__ import annotations

from .parent import end_with_parent

if __name__ == "__main__":
    end_with_parent()  # before torch is imported, below

import logging
import sys

from ..engine.errors import SkipPipeError
from ..engine.secret import SECRET_VARIABLE, job_secret
from .joining import parse_address, work
from .processes import end_now
from .service import DriverGone, Refused

log = logging.getLogger("skippipe_plugin.worker")


def main(arguments: list[str]) -> int:
    """Join, serve, return the exit status."""
    try:
        address, ticket = arguments if len(arguments) == 2 else (*arguments, "")
        host, port = parse_address(address)
        secret = job_secret(None)
    except ValueError as error:
        sys.stderr.write(f"usage: python -m skippipe_plugin.worker HOST:PORT [TICKET] ({error})\n")
        return 2
    if secret is None:
        sys.stderr.write(f"{SECRET_VARIABLE} is not set: a worker must know its job's secret\n")
        return 2
    try:
        work(host, port, secret, ticket)
    except SkipPipeError as error:
        if not isinstance(error, DriverGone) or isinstance(error, Refused):  # else the driver's own end says why
            log.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    end_now(main(sys.argv[1:]))
