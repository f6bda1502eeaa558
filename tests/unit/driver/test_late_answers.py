"""Answers that come when nobody waits for them any more: never taken for others, and counted. Real channels."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from skippipe_plugin.driver.links import Link, Links
from skippipe_plugin.engine.channel import Channel, ChannelError, connect
from skippipe_plugin.engine.control.answers import Failed, State
from skippipe_plugin.engine.control.codec import Received
from skippipe_plugin.engine.control.commands import Get
from skippipe_plugin.engine.control.handlers import Handlers
from skippipe_plugin.engine.control.line import Line, to_driver
from skippipe_plugin.engine.control.presence import Exit
from skippipe_plugin.engine.errors import SkipPipeError, StageLostError
from skippipe_plugin.engine.handshake import Purpose
from skippipe_plugin.engine.listener import Listener
from skippipe_plugin.supervisor import client as client_module
from skippipe_plugin.supervisor.client import SupervisedProcesses
from skippipe_plugin.supervisor.messages import (
    TO_SUPERVISED,
    TO_SUPERVISOR,
    AskWorkers,
    Begin,
    ForgetEnded,
    Obeyed,
    StoreAt,
    Workers,
)
from skippipe_plugin.supervisor.supervisor import RunOptions, Supervisor, answer_to

SECRET = bytes(32)
WorkerBehaviour = Callable[[Line, Received], None]


@pytest.fixture
def meet() -> Iterator[Callable[[WorkerBehaviour], Link]]:
    """Gives a link to a worker that does something with each message but the last."""
    door, channels, links = Listener("127.0.0.1", 0, SECRET), list[Channel](), list[Link]()

    def serve(line: Line, behave: WorkerBehaviour) -> None:
        try:
            while True:
                behave(line, line.receive())
        except ChannelError:
            pass

    def start(behave: WorkerBehaviour) -> Link:
        channel = connect("127.0.0.1", door.port, SECRET)
        channels.append(channel)
        channel.send("Hello")
        arrived = door.accept(5)
        assert arrived is not None
        links.append(Link(arrived[0]))
        threading.Thread(target=serve, args=(to_driver(channel), behave), daemon=True).start()
        return links[-1]

    yield start
    for channel in channels:
        channel.close()
    for link in links:
        link.close()
    door.close()


def state(of: object) -> State:
    """What answers the question for blocks."""
    assert isinstance(of, Get)
    return State([], list(of.blocks or ()), [], [], [])


def question(number: int) -> Get:
    return Get("weights", [number])


def slowly(seconds: float) -> WorkerBehaviour:
    """Answer what was asked, some time later."""

    def answer(line: Line, received: Received) -> None:
        time.sleep(seconds)
        if not isinstance(received.body, Exit):
            line.send(state(received.body))

    return answer


def test_a_late_answer_is_not_that_to_the_next_question(meet: Callable[[WorkerBehaviour], Link]) -> None:
    board, link = Links(), meet(slowly(0.1))
    board.add(0, (), link)
    link.send(question(1))
    link.forget_answers()
    assert link.ask(question(2), State).estimates == [2]
    assert link.num_late == 1


def test_neither_is_one_that_is_here_already(meet: Callable[[WorkerBehaviour], Link]) -> None:
    board, link = Links(), meet(slowly(0.0))
    board.add(0, (), link)
    link.send(question(1))
    time.sleep(0.2)
    assert link.ask(question(2), State).estimates == [2]
    assert link.num_late == 1


def test_several_questions_are_under_way(meet: Callable[[WorkerBehaviour], Link]) -> None:
    board, link = Links(), meet(slowly(0.02))
    board.add(0, (), link)
    numbers = {which: link.send(question(which)) for which in range(6)}
    assert link.expect(State, numbers[2]).estimates == [2]
    assert link.num_late == 2
    assert [link.expect(State, numbers[which]).estimates for which in (3, 4, 5)] == [[3], [4], [5]]


def test_a_new_generation_takes_no_answer_of_the_last(meet: Callable[[WorkerBehaviour], Link]) -> None:
    """Though what answers knows nothing of generations."""

    def answer(line: Line, received: Received) -> None:
        time.sleep(0.1)
        if not isinstance(received.body, Exit):
            line.send(state(received.body), generation=9)

    board, link = Links(), meet(answer)
    board.add(0, (), link)
    link.send(question(1))
    board.start_generation(1)
    link.send(question(2))
    assert link.expect(State).estimates == [2]


def test_a_late_error_does_not_end_what_comes_after_it(meet: Callable[[WorkerBehaviour], Link]) -> None:
    def answer(line: Line, received: Received) -> None:
        time.sleep(0.1)
        if received.body == question(1):
            line.send(Failed(True, ""))
        elif not isinstance(received.body, Exit):
            line.send(state(received.body))

    board, link = Links(), meet(answer)
    board.add(0, (), link)
    link.send(question(1))
    link.forget_answers()
    assert link.ask(question(2), State).estimates == [2]
    assert not board.failed


def test_a_survivor_is_slow_and_others_die(meet: Callable[[WorkerBehaviour], Link]) -> None:
    """What was asked of all is asked anew of those that are left."""

    def dies(line: Line, _: Received) -> None:
        time.sleep(0.05)
        line.channel.close()

    links = [meet(slowly(0.2)), meet(dies), meet(slowly(0.0))]
    board = Links()
    for rank, link in enumerate(links):
        board.add(rank, (), link)
    for link in links:
        link.send(question(1))
    with pytest.raises(StageLostError):
        board.expect_all(State)
    left = Links()
    for rank, link in enumerate([links[0], links[2]]):
        link.forget_answers()
        left.add(rank, (), link)
    assert [link.ask(question(2), State).estimates for link in left] == [[2]] * 2


def test_what_is_no_message_is_a_loss_that_says_so(meet: Callable[[WorkerBehaviour], Link]) -> None:
    """A field that is not what it should be never reaches who waits for it."""

    def nonsense(line: Line, _: Received) -> None:
        line.channel.send("State", {"values": [[], [], [], [["weight", "large", "float32", []]]]}, [b""])

    board, link = Links(), meet(nonsense)
    board.add(0, (), link)
    told = r"is gone: what it sent is no message: the message 'State' has 'tensors' that is no Sequence.*'large'"
    with pytest.raises(StageLostError, match=told):
        link.ask(question(1), State)


@pytest.fixture
def supervised(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[WorkerBehaviour], SupervisedProcesses]]:
    """Gives the driver's side of a supervisor that does something with each question."""
    door, clients = Listener("127.0.0.1", 0, SECRET, purpose=Purpose.ASK_SUPERVISOR), list[SupervisedProcesses]()
    monkeypatch.setenv("SKIPPIPE_SUPERVISOR", f"127.0.0.1:{door.port}")
    monkeypatch.setenv("SKIPPIPE_ATTEMPT", "0")
    monkeypatch.setenv("SKIPPIPE_SECRET", SECRET.hex())

    def serve(behave: WorkerBehaviour) -> None:
        arrived = door.accept(5)
        assert arrived is not None
        line = Line(arrived[0], TO_SUPERVISED, TO_SUPERVISOR)
        try:
            while True:
                behave(line, line.receive())
        except ChannelError:
            pass

    def start(behave: WorkerBehaviour) -> SupervisedProcesses:
        threading.Thread(target=serve, args=(behave,), daemon=True).start()
        clients.append(SupervisedProcesses("key"))
        return clients[-1]

    yield start
    for client in clients:
        client.stop()
    door.close()


def test_a_question_to_the_supervisor_that_was_given_up(
    supervised: Callable[[WorkerBehaviour], SupervisedProcesses],
) -> None:
    """As by Ctrl-C: later answers are not one behind."""

    def answer(line: Line, message: Received) -> None:
        time.sleep(0.1)
        line.send(Workers([3], []) if isinstance(message.body, AskWorkers) else Obeyed())

    processes = supervised(answer)
    real: Any = processes._answers

    class Interrupted:
        def get(self, **_: Any) -> Any:
            raise KeyboardInterrupt

    processes._answers = Interrupted()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        processes.kill("5")
    processes._answers = real
    assert processes.running() == ["3"]


def test_a_supervisor_that_cannot_says_why(supervised: Callable[[WorkerBehaviour], SupervisedProcesses]) -> None:
    """And answers the next question: its thread does not die of an exception."""

    def refuse(_: ForgetEnded) -> None:
        raise OSError(24, "Too many open files")

    handlers = Handlers("a supervisor")
    handlers.on(ForgetEnded, refuse)
    handlers.on(AskWorkers, lambda _: Workers([3], [(4, -9)]))
    processes = supervised(lambda line, message: line.send(answer_to(message.body, handlers)) and None)
    with pytest.raises(SkipPipeError, match=r"the supervisor could not do 'ForgetEnded': .*Too many open files"):
        processes.reap()
    assert processes.running() == ["3"]
    assert processes.ended_early(()) == {"4": "exit status -9"}
    with pytest.raises(SkipPipeError, match=r"could not do 'KillWorker': .*is not for a supervisor"):
        processes.kill("3")


def test_a_supervisor_that_answers_another_question(
    supervised: Callable[[WorkerBehaviour], SupervisedProcesses],
) -> None:
    processes = supervised(lambda line, _: line.send(StoreAt("127.0.0.1", 5)) and None)
    with pytest.raises(SkipPipeError, match="the supervisor answered 'AskWorkers' with 'StoreAt'"):
        processes.running()


def test_the_supervisor_obeys_every_message() -> None:
    supervisor = Supervisor(RunOptions())
    try:
        assert supervisor._handlers.kinds | {Begin} == set(TO_SUPERVISOR.kinds.values())
    finally:
        supervisor.close()


def test_a_supervisor_that_is_silent_is_not_waited_for_for_ever(
    supervised: Callable[[WorkerBehaviour], SupervisedProcesses],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(client_module, "_SAY_S", 0.5)
    monkeypatch.setattr(client_module, "_ANSWER_S", 1.5)
    processes = supervised(lambda *_: None)
    with pytest.raises(SkipPipeError, match=r"the supervisor did not answer 'AskWorkers' within 1\.5 s"):
        processes.running()
    assert "waiting for the supervisor's answer to 'AskWorkers'" in caplog.text
