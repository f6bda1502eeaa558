"""What a driver reads out of its part of a schedule."""

import pytest

from skippipe_plugin.engine.program import compile_program, embedded_in_order, most_in_flight
from skippipe_plugin.schedule import full_schedule


@pytest.mark.parametrize(("name", "drivers", "kept"), [("gpipe", 1, 32), ("1f1b", 1, 6), ("1f1b", 2, 6)])
def test_a_driver_keeps_as_many_embeddings_as_its_schedule_has_under_way(name: str, drivers: int, kept: int) -> None:
    schedule = full_schedule(name, num_stages=3, num_microbatches=32, drivers=drivers, replicas=drivers)
    for driver in range(drivers):
        program = compile_program(schedule, driver)
        assert embedded_in_order(program) == list(range(32 * driver, 32 * driver + 32))
        assert most_in_flight(program) == kept  # 1F1B: twice its share of three stages


def test_a_worker_embeds_nothing() -> None:
    program = compile_program(full_schedule("1f1b", num_stages=2, num_microbatches=4), 1)
    assert embedded_in_order(program) == []
    assert most_in_flight(program) == 0
