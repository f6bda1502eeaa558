"""The offset between two clocks, whatever the network does with the question."""

import random

import pytest

from skippipe_plugin.driver.clocks import clock_offset_s


class Network:
    """A clock of ours, another one, and a question whose two ways take their time."""

    def __init__(self, ahead_s: float, shortest_s: float, jitter_s: float) -> None:
        self.now, self.ahead_s = 5.0, ahead_s
        self.shortest_s, self.jitter_s = shortest_s, jitter_s
        self.random = random.Random(0)

    def clock(self) -> float:
        return self.now

    def ask(self) -> float:
        self.travel()
        reading = self.now + self.ahead_s
        self.travel()
        return reading

    def travel(self) -> None:
        self.now += self.shortest_s + self.random.random() * self.jitter_s


@pytest.mark.parametrize("ahead_s", [1000.0, -3.0, 0.5])
def test_the_offset_is_found_within_half_of_the_fastest_round_trip(ahead_s: float) -> None:
    network = Network(ahead_s, shortest_s=0.05, jitter_s=0.2)
    found = clock_offset_s(network.ask, clock=network.clock, rounds=20)
    assert found == pytest.approx(ahead_s, abs=0.1)


def test_a_steady_network_hides_nothing() -> None:
    network = Network(7.0, shortest_s=0.1, jitter_s=0.0)
    assert clock_offset_s(network.ask, clock=network.clock) == pytest.approx(7.0)


def test_a_shared_clock_stays_shared() -> None:
    network = Network(0.0, shortest_s=0.001, jitter_s=0.1)
    assert clock_offset_s(network.ask, clock=network.clock) == 0.0
