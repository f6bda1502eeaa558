"""The routers of a pipeline's experts, seen from a driver: what they did, and their selection biases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from ..engine.control.answers import RouterNews
from ..engine.control.commands import AskRouters
from ..engine.stage import Stage
from ..engine.transport import Transport
from ..moe.attach import RouterStatistics
from ..moe.board import RouterBoard, add_statistics
from ..schedule import Schedule
from ..worker.routers import obey
from ..worker.tallies import StageTallies
from .links import Links


class RouterControl:
    """Asks the routers on the workers and on this driver; the first driver commands, every driver calls alike."""

    def __init__(self, links: Links, *, leads: bool) -> None:
        self.board = RouterBoard()
        """The routers on this driver."""
        self.tallies = StageTallies()
        """What counts along with the stages on this driver."""
        self._links = links
        self._leads = leads
        self._biases: dict[str, list[float]] = {}
        """The biases that no model saves; sent with every update, so that a worker that is new has them too."""

    def own(self, model: nn.Module) -> None:
        """Take charge of the routers of ``model`` whose weights are on this driver."""
        self.board = RouterBoard([model])

    def count(
        self,
        transport: Transport,
        schedule: Schedule,
        live: Sequence[int],
        hosted: Mapping[int, Stage],
        base: Mapping[str, Sequence[int]],
    ) -> None:
        """Count along with a training step of the ``hosted`` stages, where their routers have a balancing loss."""
        if self.board.balances and hosted:
            self.tallies.open(schedule, live, hosted, rank=transport.rank, base=base, post=transport)

    def take(self) -> dict[str, RouterStatistics]:
        """Return by router what happened since the last call, over all microbatches, replicas and paths."""
        return add_statistics(news.statistics for news in self._ask(AskRouters(take=True)))

    def update_biases(self, loads: Mapping[str, Sequence[int]], rule: str, rate: float) -> dict[str, list[float]]:
        """Apply a rule of :data:`~skippipe_plugin.moe.BIAS_RULES` wherever the routers are.

        Returns:
            The biases of routers whose model has none of its own and so does not save them.
        """
        counts = {name: list(each) for name, each in loads.items()}
        answers = self._ask(AskRouters(biases=self._biases, rule=rule, rate=rate, loads=counts))
        self._biases |= {name: list(bias) for answer in answers for name, bias in answer.biases.items()}
        return dict(self._biases)

    def set_biases(self, biases: Mapping[str, Sequence[float]]) -> None:
        """Set the biases that :meth:`update_biases` returned, as when a run is resumed."""
        self._biases = {name: list(bias) for name, bias in biases.items()}
        self._ask(AskRouters(biases=self._biases))

    def resend(self) -> None:
        """Give the biases that no model saves to workers that are new, before they run a step."""
        if self._biases:
            self._ask(AskRouters(biases=self._biases))

    def _ask(self, order: AskRouters) -> list[RouterNews]:
        if self._leads:
            self._links.broadcast(order)
        return [obey(self.board, order), *self._links.gather(RouterNews).values()]
