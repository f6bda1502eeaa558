"""The job's secret: who knows it may join. It comes from the environment or from a file, never from a command line.

Command lines can be read by everybody on a machine; the environment and a file of mode 0600 by their owner only.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Final

SECRET_VARIABLE: Final = "SKIPPIPE_SECRET"
"""The secret itself."""
SECRET_FILE_VARIABLE: Final = "SKIPPIPE_SECRET_FILE"
"""The name of the file that holds it."""
_NUM_BYTES: Final = 32
_MIN_BYTES: Final = 16


class SecretError(ValueError):
    """The secret is missing, too short, or others can read it or have written it."""


def secret_file(explicit: str | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the name of the file with the secret: the explicit one, else the environment's unless that has the secret.

    >>> secret_file("mine", {"SKIPPIPE_SECRET_FILE": "theirs"})
    'mine'
    >>> secret_file(None, {"SKIPPIPE_SECRET_FILE": "theirs", "SKIPPIPE_SECRET": "00"}) is None
    True
    """
    if explicit is not None or SECRET_VARIABLE in environment:
        return explicit
    return environment.get(SECRET_FILE_VARIABLE)


def job_secret(file: str | None, *, create: bool = False, environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the secret of a file, else that of the environment (variable, then file); None when there is none.

    Args:
        file: The name of the file; beats the environment.
        create: Whether a file that is not there is made, with a new secret.
        environment: The variables.

    Raises:
        SecretError: There is one, and it cannot be used.
    """
    name = secret_file(file, environment)
    if name is not None:
        if create:
            _create(Path(name))
        return read_secret_file(Path(name))
    if SECRET_VARIABLE in environment:
        return _checked(environment[SECRET_VARIABLE], SECRET_VARIABLE)
    return None


def read_secret_file(path: Path) -> str:
    """Return the secret in a file.

    Raises:
        SecretError: It cannot be read, is another user's or can be read by others, is a link, or holds something else.
    """
    try:
        # A link may be another user's, to a file of anybody's; a pipe would be waited for.
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(number, encoding="ascii", errors="replace") as file:
            status = os.fstat(file.fileno())
            text = file.read(4096) if stat.S_ISREG(status.st_mode) else ""
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise SecretError(f"the secret file {path} is a link; name the file itself: {path.resolve()}") from error
        raise SecretError(
            f"the secret file {path} cannot be read ({error.strerror}); copy the one that the driver's start line names"
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise SecretError(f"the secret file {path} is no ordinary file")
    if os.name == "posix" and status.st_uid != os.geteuid():
        raise SecretError(
            f"the secret file {path} belongs to another user (uid {status.st_uid}, this process has {os.geteuid()}), "
            "who knows what is in it and may run code in this job; take a file of your own"
        )
    if os.name == "posix" and status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise SecretError(
            f"the secret file {path} can be read by others (mode {stat.S_IMODE(status.st_mode):04o}), who may then run "
            f"code in this job; chmod 600 {path}, and take a new secret if others may have read it"
        )
    return _checked(text, f"the secret file {path}")


def _create(path: Path) -> None:
    try:
        number = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except FileExistsError:
        return
    except OSError as error:
        raise SecretError(f"the secret file {path} cannot be made: {error.strerror}") from error
    with os.fdopen(number, "w", encoding="ascii") as file:
        file.write(f"{secrets.token_hex(_NUM_BYTES)}\n")


def _checked(text: str, source: str) -> str:
    """Return the digits; an error must not quote them."""
    digits = text.strip()
    try:
        size = len(bytes.fromhex(digits))
    except ValueError:
        size = 0
    if size < _MIN_BYTES:
        raise SecretError(
            f"{source} holds no secret of {2 * _MIN_BYTES} or more hexadecimal digits; make one with "
            f"openssl rand -hex {_NUM_BYTES}"
        )
    return digits
