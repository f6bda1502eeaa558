"""Connections that are made where the system gives numbers of files anew."""

import socket

from skippipe_plugin.engine.own_files import open_files, sockets_among
from skippipe_plugin.engine.silence import silence_ends_after


def test_a_connection_under_the_number_of_one_that_was_closed_meanwhile_breaks_too() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        old = socket.create_connection(server.getsockname())
        number = old.fileno()
        with silence_ends_after(15):
            old.close()
            new = socket.create_connection(server.getsockname())
        assert new.fileno() == number, "the system gives the lowest number that is free"
        with new:
            assert new.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert new.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 15000


def test_what_was_there_before_is_left_alone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as old:
        with silence_ends_after(15):
            pass
        assert not old.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert server.fileno() in {number for number, _ in sockets_among(open_files())}
