"""How the ranks of a launcher get the secret that the first driver has made: by a file, never by the launcher's store.

Whoever reaches the store of torchrun or SLURM's rank 0 can read and change it, so it tells no more than a fingerprint.
The secret lies under that name in a folder of this user's, until all ranks have read it. Ranks on hosts without that
folder need the secret in their environment.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from .secret import SECRET_VARIABLE, SecretError, read_secret_file

_PATIENCE_S: Final = 5.0
"""How long a file may take to appear on another host that shares the folder."""
_LOOK_S: Final = 0.1


def fingerprint(secret: str) -> str:
    """Return what tells secrets apart and gives none away: they are random and long."""
    return hashlib.sha256(b"skippipe secret " + bytes.fromhex(secret)).hexdigest()


def leave_secret(secret: str) -> Path | None:
    """Write a secret for the other ranks; return the file, or None where no folder can be written to.

    A job leaves its secret once: the name is the secret's fingerprint.
    """
    for folder in _folders():
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            path = folder / fingerprint(secret)
            with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w", encoding="ascii") as file:
                file.write(secret)
            return path
    return None


def find_secret(name: str) -> str:
    """Return the secret with a fingerprint that another rank of this job has left.

    Raises:
        SecretError: There is none, or it is not what it should be.
    """
    if not re.fullmatch("[0-9a-f]{64}", name):
        raise SecretError(f"{name!r} is no fingerprint of a secret")
    deadline_s = time.monotonic() + _PATIENCE_S
    while not (found := [path for folder in _folders() if (path := folder / name).exists()]):
        if time.monotonic() > deadline_s:
            raise SecretError(
                f"the first driver has left its secret in none of {', '.join(map(str, _folders()))} on this host: give "
                f"all ranks the same one by {SECRET_VARIABLE}, before the launcher starts (openssl rand -hex 32)"
            )
        time.sleep(_LOOK_S)
    secret = read_secret_file(found[0])
    if fingerprint(secret) != name or found[0].stat().st_uid != os.geteuid():
        raise SecretError(f"{found[0]} is not the secret of this job, or is another user's")
    return secret


def _folders() -> list[Path]:
    return list(_candidates())


def _candidates() -> Iterator[Path]:
    """Where secrets may be left: hosts of a cluster mostly share the first, ranks of one host at least the second."""
    with contextlib.suppress(RuntimeError):  # no home
        yield Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "skippipe"
    yield Path(tempfile.gettempdir()) / f"skippipe-{os.geteuid()}"
