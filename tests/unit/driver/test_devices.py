"""Workers compute on what their host has, and each on its own."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from skippipe_plugin.driver.devices import Devices
from skippipe_plugin.engine.device import Place
from skippipe_plugin.engine.errors import SkipPipeError

HERE = Place("here 1", kind="cuda", num_devices=4)
THERE = Place("there 2", kind="cuda", num_devices=2)


def cuda(*indices: int) -> tuple[torch.device, ...]:
    return tuple(torch.device("cuda", index) for index in indices)


def all_of(devices: Devices, *places: Place) -> list[str]:
    taken: list[tuple[Place, str]] = []
    for place in places:
        taken.append((place, devices.assign(taken, place)))
    return [device for _, device in taken]


def test_workers_beside_the_driver_have_what_it_leaves() -> None:
    assert all_of(Devices(*cuda(1), HERE), HERE, HERE, HERE) == ["cuda:0", "cuda:2", "cuda:3"]


def test_those_of_the_trainer_come_in_its_order() -> None:
    assert all_of(Devices(*cuda(3), HERE, cuda(3, 2, 0)), HERE, HERE, HERE) == ["cuda:2", "cuda:0", "cuda:1"]


def test_further_drivers_have_theirs() -> None:
    assert all_of(Devices(*cuda(0), HERE, cuda(0, 1, 2, 3), drivers=2), HERE, HERE) == ["cuda:2", "cuda:3"]


def test_another_host_counts_its_own() -> None:
    assert all_of(Devices(*cuda(0), HERE, cuda(0, 1)), THERE, HERE, THERE) == ["cuda:0", "cuda:1", "cuda:1"]


def test_who_sees_one_device_of_a_host_has_that() -> None:
    alone = [Place("there 2", f"CUDA_VISIBLE_DEVICES={index}", "cuda", 1) for index in (4, 5)]
    assert all_of(Devices(*cuda(0), HERE), *alone) == ["cuda:0", "cuda:0"]


def test_a_lost_workers_device_is_free_again() -> None:
    devices = Devices(*cuda(0), HERE, cuda(0, 1, 2))
    assert devices.assign([(HERE, "cuda:2")], HERE) == "cuda:1"


def test_what_was_chosen_by_hand_counts() -> None:
    by_hand = Place("there 2", kind="cuda", num_devices=2, device="cuda:0")
    assert all_of(Devices(*cuda(0), HERE), by_hand, THERE) == ["cuda:0", "cuda:1"]


def test_several_share_one_when_asked() -> None:
    one = Place("here 1", kind="cuda", num_devices=1)
    assert all_of(Devices(*cuda(0), one, per_device=3), one, one) == ["cuda:0", "cuda:0"]
    assert all_of(Devices(*cuda(0), one, cuda(0, 0, 0), per_device=3), one, one) == ["cuda:0", "cuda:0"]
    with pytest.raises(SkipPipeError, match=r"its 1 of cuda are taken.*workers_per_device=2"):
        all_of(Devices(*cuda(0), one), one)


def test_cpus_need_no_choice() -> None:
    assert all_of(Devices(torch.device("cpu"), HERE, per_device=1), HERE, THERE, THERE) == ["cpu"] * 3


def test_never_a_cpu_in_place_of_an_accelerator() -> None:
    with pytest.raises(SkipPipeError, match="at nowhere has no accelerator, and a worker never computes on the CPU"):
        all_of(Devices(*cuda(0), HERE), Place("nowhere 3"))
    with pytest.raises(SkipPipeError, match="has only xpu"):
        all_of(Devices(*cuda(0), HERE), Place("nowhere 3", kind="xpu", num_devices=2))


def test_what_was_chosen_by_hand_must_be_there() -> None:
    devices = Devices(*cuda(0), HERE)
    with pytest.raises(SkipPipeError, match="was started for cuda:2, but it sees 2 of cuda"):
        all_of(devices, Place("there 2", kind="cuda", num_devices=2, device="cuda:2"))
    with pytest.raises(SkipPipeError, match="was started for cpu, but the driver computes on cuda:0"):
        all_of(devices, Place("there 2", kind="cuda", num_devices=2, device="cpu"))


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), min_size=1, max_size=12),
    st.integers(1, 3),
)
def test_no_device_has_more_than_its_share(hosts: list[tuple[int, int]], per_device: int) -> None:
    sizes = dict(hosts)
    places = [Place(f"host{host}", kind="cuda", num_devices=sizes[host]) for host, _ in hosts]
    devices, taken = Devices(*cuda(0), places[0], per_device=per_device), list[tuple[Place, str]]()
    for place in places:
        room = per_device * place.num_devices - sum(other == place for other, _ in taken) - (place == places[0])
        if room < 1:
            with pytest.raises(SkipPipeError, match="finds no device"):
                devices.assign(taken, place)
        else:
            taken.append((place, devices.assign(taken, place)))
    shares = Counter([(places[0], "cuda:0"), *taken])
    assert max(shares.values()) <= per_device
    assert all(int(device.removeprefix("cuda:")) < place.num_devices for place, device in shares)
