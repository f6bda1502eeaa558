"""What is told of a loss."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from skippipe_plugin.driver.links import Link, Links
from skippipe_plugin.driver.recovery import stage_keeper
from skippipe_plugin.driver.recovery.policy import RecoveryPolicy
from skippipe_plugin.driver.recovery.report import RecoveryEvent
from skippipe_plugin.driver.recovery.stage_keeper import StageKeeper

LAYOUT = SimpleNamespace(
    placement=((0,), (1, 2)), expert_parallel=1, stages_of=lambda _: [1], hosted=lambda _: [0], position=lambda _: 0
)


class Nobody:
    """No replacement is ready."""

    def idle(self) -> Sequence[Link]:
        return ()

    resting = idle

    def prepare(self, count: int) -> None: ...

    def fence(self, link: Link) -> None: ...

    def take(self, count: int) -> list[Link]:
        raise AssertionError

    def take_back(self, links: Sequence[Link]) -> None: ...


def test_only_training_steps_count_as_steps_around() -> None:
    """Where a replica is left, reads of weights and evaluations go around a lost worker, too."""
    gradients = SimpleNamespace(keep_norms=False, accumulation=SimpleNamespace(lacks=lambda _: False))
    sender = SimpleNamespace(sample=lambda: (None, []))
    pipeline: Any = SimpleNamespace(
        links=Links(), gradients=gradients, layout=LAYOUT, sender=sender, go_around=lambda _: None
    )
    told: list[RecoveryEvent] = []
    keeper = StageKeeper(pipeline, RecoveryPolicy(), Nobody(), told.append)
    try:
        keeper._missing[2] = stage_keeper._Missing("it was killed")
        for whole in (False, True, True, False, True):
            assert keeper.attempt(lambda: 5, lambda: None, whole=whole) == 5
        keeper._tell(2, stage_keeper._Rebuilt("replica"))
    finally:
        keeper.close()
    assert [event.steps_around for event in told] == [2]
