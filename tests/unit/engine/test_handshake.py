"""The proofs of the handshake against their definition, and ends that play back what they have heard."""

import functools
import hmac
import socket
import struct
import threading
from collections.abc import Callable

import pytest

from skippipe_plugin.engine.handshake import (
    MAGIC,
    PROTOCOL_VERSION,
    ChannelError,
    Purpose,
    SessionKeys,
    authenticate_guest,
    authenticate_host,
)

SECRET = b"the job's secret"
NONCE = bytes(range(32))
GREETING_BYTES, PROOF_BYTES = 38, 32


def greeting(nonce: bytes) -> bytes:
    return struct.pack("!4sH32s", MAGIC, PROTOCOL_VERSION, nonce)


def proof(role: bytes, first: bytes, second: bytes, purpose: bytes = b"JOIN_DRIVER") -> bytes:
    return hmac.digest(SECRET, role + b" of " + purpose + first + second, "sha256")


def read(connection: socket.socket, size: int) -> bytes:
    return connection.recv(size, socket.MSG_WAITALL)


def meet(
    authenticate: Callable[[socket.socket, bytes, float], SessionKeys], other_end: Callable[[socket.socket], None]
) -> SessionKeys | ChannelError:
    """Let one end prove itself to ``other_end``; return what comes of it."""
    here, there = socket.socketpair()
    outcome: list[SessionKeys | ChannelError] = []

    def run() -> None:
        try:
            outcome.append(authenticate(here, SECRET, 5.0))
        except ChannelError as error:
            outcome.append(error)
        finally:
            here.close()

    thread = threading.Thread(target=run)
    thread.start()
    with there:
        there.settimeout(5)
        other_end(there)
    thread.join()
    return outcome[0]


def test_the_workers_proofs_and_keys_are_as_defined() -> None:
    seen = []

    def driver(there: socket.socket) -> None:
        there.sendall(greeting(NONCE))
        theirs = read(there, GREETING_BYTES)[6:]
        seen.append(theirs)
        assert read(there, PROOF_BYTES) == proof(b"guest", NONCE, theirs)
        there.sendall(proof(b"host", theirs, NONCE))

    keys = meet(authenticate_host, driver)
    (theirs,) = seen
    assert keys == SessionKeys(proof(b"from guest", NONCE, theirs), proof(b"from host", NONCE, theirs))


def test_the_drivers_proofs_and_keys_are_as_defined() -> None:
    seen = []

    def worker(there: socket.socket) -> None:
        theirs = read(there, GREETING_BYTES)[6:]
        seen.append(theirs)
        there.sendall(greeting(NONCE) + proof(b"guest", theirs, NONCE))
        assert read(there, PROOF_BYTES) == proof(b"host", NONCE, theirs)

    keys = meet(authenticate_guest, worker)
    (theirs,) = seen
    assert keys == SessionKeys(proof(b"from host", theirs, NONCE), proof(b"from guest", theirs, NONCE))


def test_a_proof_reflected_to_the_worker_is_refused() -> None:
    """Who knows no secret sends the worker's own proof back, in the place of the driver's."""

    def mirror(there: socket.socket) -> None:
        there.sendall(greeting(NONCE))
        read(there, GREETING_BYTES)
        there.sendall(read(there, PROOF_BYTES))

    outcome = meet(authenticate_host, mirror)
    assert isinstance(outcome, ChannelError)
    assert "does not know this job's secret" in str(outcome)


def test_the_proof_of_another_worker_is_refused() -> None:
    """The mirror takes a second worker for its oracle, which it greets with the first one's nonce."""

    def two_workers(there: socket.socket) -> None:
        there.sendall(greeting(NONCE))
        first = read(there, GREETING_BYTES)[6:]
        read(there, PROOF_BYTES)
        answers = []

        def oracle(other: socket.socket) -> None:
            other.sendall(greeting(first))
            read(other, GREETING_BYTES)
            answers.append(read(other, PROOF_BYTES))

        meet(authenticate_host, oracle)
        there.sendall(answers[0])

    assert isinstance(meet(authenticate_host, two_workers), ChannelError)


@pytest.mark.parametrize("reflects_nonce", [False, True])
def test_a_proof_reflected_to_the_driver_is_refused(reflects_nonce: bool) -> None:
    """Who knows no secret has another driver of the job as oracle: what it proves is of no use with the first."""

    def stranger(there: socket.socket) -> None:
        theirs = read(there, GREETING_BYTES)[6:]
        there.sendall(greeting(theirs if reflects_nonce else NONCE) + proof(b"host", theirs, NONCE))

    outcome = meet(authenticate_guest, stranger)
    assert isinstance(outcome, ChannelError)
    assert "does not know this job's secret" in str(outcome)


@pytest.mark.parametrize("asked", Purpose)
@pytest.mark.parametrize("meant", Purpose)
def test_a_door_lets_in_those_only_who_came_for_it(asked: Purpose, meant: Purpose) -> None:
    def guest(there: socket.socket) -> None:
        theirs = read(there, GREETING_BYTES)[6:]
        there.sendall(greeting(NONCE) + proof(b"guest", theirs, NONCE, meant.name.encode()))
        read(there, PROOF_BYTES)

    outcome = meet(functools.partial(authenticate_guest, purpose=asked), guest)
    assert isinstance(outcome, SessionKeys) == (asked is meant)
    if asked is not meant:
        assert str(outcome).startswith(
            f"it is a {meant.guest} that came for the {meant.host}, but this is the {asked.host}'s door"
        )


@pytest.mark.parametrize("purpose", Purpose)
def test_a_guest_stays_only_where_he_came_for(purpose: Purpose) -> None:
    """A door that would take him for another purpose cannot prove that it is his."""

    def host(there: socket.socket) -> None:
        there.sendall(greeting(NONCE))
        theirs = read(there, GREETING_BYTES)[6:]
        read(there, PROOF_BYTES)
        there.sendall(proof(b"host", theirs, NONCE))

    outcome = meet(functools.partial(authenticate_host, purpose=purpose), host)
    assert isinstance(outcome, SessionKeys) == (purpose is Purpose.JOIN_DRIVER)


def test_a_proof_of_an_earlier_connection_is_refused() -> None:
    heard: list[bytes] = []

    def driver(there: socket.socket) -> None:
        there.sendall(greeting(NONCE))
        theirs = read(there, GREETING_BYTES)[6:]
        read(there, PROOF_BYTES)
        heard.append(proof(b"host", theirs, NONCE))
        there.sendall(heard[0])

    def replay(there: socket.socket) -> None:
        there.sendall(greeting(NONCE))
        read(there, GREETING_BYTES + PROOF_BYTES)
        there.sendall(heard[0])

    assert isinstance(meet(authenticate_host, driver), SessionKeys)
    assert isinstance(meet(authenticate_host, replay), ChannelError)
