"""The worker's table of handlers: every command has one, and what nobody obeys is an error."""

import socket

import pytest

from skippipe_plugin.engine.channel import Channel, ChannelError
from skippipe_plugin.engine.control.answers import Ready
from skippipe_plugin.engine.control.commands import AskClock, Calls, Pass
from skippipe_plugin.engine.control.handlers import Handlers
from skippipe_plugin.engine.control.messages import TO_WORKER
from skippipe_plugin.engine.control.presence import AskProgress, Beat, Exit, Outlive, Refuse, Release
from skippipe_plugin.engine.handshake import SessionKeys
from skippipe_plugin.worker import Worker

ELSEWHERE = {AskProgress, Beat, Outlive, Refuse, Exit, Release, Pass, Calls}
"""What readers, the order of drivers and the step under way take."""


def test_every_command_has_a_handler() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as connection,
    ):
        handlers = Worker(Channel(connection, SessionKeys(bytes(32), bytes(32))))._handlers
    assert handlers.kinds | ELSEWHERE == set(TO_WORKER.kinds.values())
    assert not handlers.kinds & ELSEWHERE


def test_what_nobody_obeys_is_named() -> None:
    handlers = Handlers()
    handlers.on(AskClock, lambda _: Ready())
    assert handlers.obey(AskClock()) == Ready()
    with pytest.raises(ChannelError, match="'Pass' is not for a worker that waits for commands"):
        handlers.obey(Pass())
    with pytest.raises(AssertionError, match="two handlers for AskClock"):
        handlers.on(AskClock, lambda _: None)
