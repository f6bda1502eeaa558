"""Answers that come when nobody waits for them any more: never taken for others, and counted. Real channels."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from skippipe_plugin.driver.links import Link, Links
from skippipe_plugin.engine.channel import Channel, ChannelError, Message, connect
from skippipe_plugin.engine.errors import SkipPipeError, StageLostError
from skippipe_plugin.engine.handshake import Purpose
from skippipe_plugin.engine.listener import Listener
from skippipe_plugin.supervisor import client as client_module
from skippipe_plugin.supervisor.client import SupervisedProcesses
from skippipe_plugin.supervisor.supervisor import _answered

SECRET = bytes(32)
Behaviour = Callable[[Channel, Message], None]


@pytest.fixture
def meet() -> Iterator[Callable[[Behaviour], Link]]:
    """Gives a link to a worker that does something with each message but the last."""
    door, channels, links = Listener("127.0.0.1", 0, SECRET), list[Channel](), list[Link]()

    def serve(channel: Channel, behave: Behaviour) -> None:
        try:
            while True:
                behave(channel, channel.receive())
        except ChannelError:
            pass

    def start(behave: Behaviour) -> Link:
        channel = connect("127.0.0.1", door.port, SECRET)
        channels.append(channel)
        channel.send("hello")
        arrived = door.accept(5)
        assert arrived is not None
        links.append(Link(arrived[0]))
        threading.Thread(target=serve, args=(channel, behave), daemon=True).start()
        return links[-1]

    yield start
    for channel in channels:
        channel.close()
    for link in links:
        link.close()
    door.close()


def slowly(seconds: float) -> Behaviour:
    """Answer what was asked, some time later."""

    def answer(channel: Channel, message: Message) -> None:
        time.sleep(seconds)
        if message.kind != "exit":
            channel.send("state", {"generation": message.fields.get("generation", -1), "of": message.fields["what"]})

    return answer


def test_a_late_answer_is_not_that_to_the_next_question(meet: Callable[[Behaviour], Link]) -> None:
    board, link = Links(), meet(slowly(0.1))
    board.add(0, (), link)
    link.send("get", {"what": "first"})
    link.forget_answers()
    assert link.ask("get", {"what": "second"}, "state").fields["of"] == "second"
    assert link.num_late == 1


def test_neither_is_one_that_is_here_already(meet: Callable[[Behaviour], Link]) -> None:
    board, link = Links(), meet(slowly(0.0))
    board.add(0, (), link)
    link.send("get", {"what": "first"})
    time.sleep(0.2)
    assert link.ask("get", {"what": "second"}, "state").fields["of"] == "second"
    assert link.num_late == 1


def test_several_questions_are_under_way(meet: Callable[[Behaviour], Link]) -> None:
    board, link = Links(), meet(slowly(0.02))
    board.add(0, (), link)
    numbers = {what: link.send("get", {"what": what}) for what in "abcdef"}
    assert link.expect("state", numbers["c"]).fields["of"] == "c"
    assert link.num_late == 2
    assert [link.expect("state", numbers[what]).fields["of"] for what in "def"] == list("def")


def test_a_new_generation_takes_no_answer_of_the_last(meet: Callable[[Behaviour], Link]) -> None:
    """Though what answers knows nothing of generations."""

    def answer(channel: Channel, message: Message) -> None:
        time.sleep(0.1)
        channel.send("state", {"generation": 9, "of": message.fields.get("what")})

    board, link = Links(), meet(answer)
    board.add(0, (), link)
    link.send("get", {"what": "first"})
    board.start_generation(1)
    link.send("get", {"what": "second"})
    assert link.expect("state").fields["of"] == "second"


def test_a_late_error_does_not_end_what_comes_after_it(meet: Callable[[Behaviour], Link]) -> None:
    def answer(channel: Channel, message: Message) -> None:
        time.sleep(0.1)
        if message.fields.get("what") == "first":
            channel.send("error", {"generation": -1, "aborted": True, "traceback": ""})
        elif message.kind != "exit":
            channel.send("state", {"generation": -1, "of": message.fields["what"]})

    board, link = Links(), meet(answer)
    board.add(0, (), link)
    link.send("get", {"what": "first"})
    link.forget_answers()
    assert link.ask("get", {"what": "second"}, "state").fields["of"] == "second"
    assert not board.failed


def test_a_survivor_is_slow_and_others_die(meet: Callable[[Behaviour], Link]) -> None:
    """What was asked of all is asked anew of those that are left."""

    def dies(channel: Channel, message: Message) -> None:
        time.sleep(0.05)
        channel.close()

    links = [meet(slowly(0.2)), meet(dies), meet(slowly(0.0))]
    board = Links()
    for rank, link in enumerate(links):
        board.add(rank, (), link)
    for link in links:
        link.send("get", {"what": "first"})
    with pytest.raises(StageLostError):
        board.expect_all("state")
    left = Links()
    for rank, link in enumerate([links[0], links[2]]):
        link.forget_answers()
        left.add(rank, (), link)
    assert [link.ask("get", {"what": "second"}, "state").fields["of"] for link in left] == ["second"] * 2


@pytest.fixture
def supervised(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Behaviour], SupervisedProcesses]]:
    """Gives the driver's side of a supervisor that does something with each question."""
    door, clients = Listener("127.0.0.1", 0, SECRET, purpose=Purpose.ASK_SUPERVISOR), list[SupervisedProcesses]()
    monkeypatch.setenv("SKIPPIPE_SUPERVISOR", f"127.0.0.1:{door.port}")
    monkeypatch.setenv("SKIPPIPE_ATTEMPT", "0")
    monkeypatch.setenv("SKIPPIPE_SECRET", SECRET.hex())

    def serve(behave: Behaviour) -> None:
        arrived = door.accept(5)
        assert arrived is not None
        try:
            while True:
                behave(arrived[0], arrived[0].receive())
        except ChannelError:
            pass

    def start(behave: Behaviour) -> SupervisedProcesses:
        threading.Thread(target=serve, args=(behave,), daemon=True).start()
        clients.append(SupervisedProcesses("key"))
        return clients[-1]

    yield start
    for client in clients:
        client.stop()
    door.close()


def test_a_question_to_the_supervisor_that_was_given_up(supervised: Callable[[Behaviour], SupervisedProcesses]) -> None:
    """As by Ctrl-C: later answers are not one behind."""

    def answer(channel: Channel, message: Message) -> None:
        time.sleep(0.1)
        channel.send("done", {"running": [len(message.fields)]})

    processes = supervised(answer)
    real: Any = processes._answers

    class Interrupted:
        def get(self, **_: Any) -> Any:
            raise KeyboardInterrupt

    processes._answers = Interrupted()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        processes._ask("kill", pid=5)
    processes._answers = real
    assert processes.running() == [0]


def test_a_supervisor_that_cannot_says_why(supervised: Callable[[Behaviour], SupervisedProcesses]) -> None:
    """And answers the next question: its thread does not die of an exception."""

    def refuse(**_: Any) -> dict[str, Any]:
        raise OSError(24, "Too many open files")

    desk = {"start": refuse, "status": lambda: {"running": [3]}}
    processes = supervised(lambda channel, message: channel.send(*_answered(desk, message)) and None)
    with pytest.raises(SkipPipeError, match=r"the supervisor could not do 'start': .*Too many open files"):
        processes._ask("start", count=1)
    assert processes.running() == [3]
    with pytest.raises(SkipPipeError, match="could not do 'dance': KeyError"):
        processes._ask("dance")


def test_a_supervisor_that_is_silent_is_not_waited_for_for_ever(
    supervised: Callable[[Behaviour], SupervisedProcesses],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(client_module, "_SAY_S", 0.5)
    monkeypatch.setattr(client_module, "_ANSWER_S", 1.5)
    processes = supervised(lambda *_: None)
    with pytest.raises(SkipPipeError, match=r"the supervisor did not answer 'status' within 1\.5 s"):
        processes.running()
    assert "waiting for the supervisor's answer to 'status'" in caplog.text
