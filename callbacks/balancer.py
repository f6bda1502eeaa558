"""LoadBalancer: keeps the paths right while workers and links change.

It decides when to measure and where decisions are told. The costs (`schedule.rolling`) and the decision
(`schedule.balance`) are the plan layer's, running by other paths is the strategy's.
"""

from __future__ import annotations

import logging
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from ..checked import COUNT, PART, checked
from ..schedule import CostModel, Timeline
from ..schedule.balance import Balancer, Decision, SwitchRule
from ..schedule.fit import ran_whole
from ..schedule.rolling import RollingCosts
from ..strategies import SkipPipeStrategy
from .common import log_now, strategy_of
from .experts import ExpertBalance, ExpertConfig, ExpertMethod

log = logging.getLogger(__name__)


@checked(every_n_steps=COUNT, min_gain=PART, min_steps=COUNT, window=COUNT, memory=COUNT)
class LoadBalancer(Callback):
    """Plan the paths of a pipeline anew while it trains, when measured costs say that it pays; balance experts.

    Every n-th step is measured, and rolling medians are kept of each rank's forward and backward and of each link.
    The running schedule and a new plan (other replicas, with a skip ratio also other paths) are simulated on these
    costs; when the plan saves ``min_gain``, and saves it on the costs of the next measured step too, it takes over.
    Each change is one line of the logger ``skippipe_plugin``, at level INFO. The Trainer's loggers get
    ``balance/present_s``, the simulated step, ``balance/planned_s``, that of a plan where one was looked at, and
    ``balance/changes``, the number of changes so far.

    With nothing skipped results stay exact. A worker that no path visits any more is not measured either; it is tried
    again when ``memory`` more steps have been measured.

    Args:
        stages: Whether to balance stages, over replicas and paths. Replicas that share experts keep working together:
            their microbatches move together, to the next group of replicas.
        every_n_steps: Which optimizer steps are measured: the n-th, the 2n-th, and so on. The others cost nothing; a
            measured one costs a few clock readings, and a plan, where one is made, a few tenths of a second.
        min_gain: The share of the step that a new plan must save.
        min_steps: How many steps a schedule runs at least.
        window: Over how many measured steps medians are taken.
        memory: For how many measured steps it is remembered what is not used any more.
        experts: How experts are balanced: ``"bias"`` moves each router's selection bias after every optimizer step
            (loss-free balancing), ``"loss"`` adds an auxiliary loss on the statistics of the whole step, where the
            routers live; a tuple does both. The Trainer's loggers get ``moe/max_violation`` (MaxVio, the mean over
            routers), ``moe/worst_max_violation``, and by router ``max_violation``, ``entropy`` and ``empty_share``.
            ``"placement"`` moves experts between the replicas that share them (expert parallelism), with their
            optimizer state, when that pays; it logs ``moe/rank_imbalance`` and ``moe/moved_experts``.
        expert_config: The rule and its rate, and the coefficient of the loss.

    Example:
        >>> from skippipe_plugin.callbacks import LoadBalancer
        >>> LoadBalancer(min_gain=1.5)
        Traceback (most recent call last):
        ...
        skippipe_plugin.checked.SettingError: min_gain=1.5 is out of range; it is a finite number above 0 and below 1
    """

    def __init__(
        self,
        stages: bool = True,
        every_n_steps: int = 10,
        min_gain: float = 0.05,
        min_steps: int = 20,
        window: int = 5,
        memory: int = 40,
        experts: ExpertMethod | tuple[ExpertMethod, ...] | None = None,
        expert_config: ExpertConfig | None = None,
    ) -> None:
        super().__init__()
        if not stages and experts is None:
            raise ValueError("stages=False and experts=None leave nothing to balance; leave the callback out")
        self.every_n_steps = every_n_steps
        self.rule = SwitchRule(min_gain=min_gain, min_steps=min_steps)
        self.window = window
        self.memory = memory
        self.changes = 0
        """How often the schedule was replaced."""
        self._balancer = Balancer(self.rule)
        self._costs: RollingCosts | None = None
        self._placement: tuple[tuple[int, ...], ...] = ()
        self._last_step = -1
        self._before: Timeline | None = None
        self._sampling = False
        self._stages = stages
        if expert_config is not None and experts is None:
            raise ValueError("expert_config has no effect without experts='bias', 'loss' or both")
        methods = (experts,) if isinstance(experts, str) else experts
        self.experts = None if methods is None else ExpertBalance(methods, expert_config, every_n_steps)
        """What balances the experts; ``experts.shares`` are the loads of the steps, for :func:`draw_loads`."""
        self._stepped = -1

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        strategy = strategy_of(trainer, self)
        if self.experts is not None:
            self.experts.prepare(strategy)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {} if self.experts is None else {"experts": self.experts.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.experts is not None and "experts" in state_dict:
            self.experts.load_state_dict(state_dict["experts"])

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stepped = trainer.global_step
        if self.experts is not None:
            self.experts.start(strategy_of(trainer, self))
        if self._stages and strategy_of(trainer, self).planner is None:
            raise ValueError(
                "LoadBalancer chooses paths, and the strategy was given a schedule of your own; leave one of them out"
            )
        self._balancer, self._costs, self.changes, self._last_step = Balancer(self.rule), None, 0, -1

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step + 1
        # The first step still warms up.
        self._sampling = self._stages and step > 1 and step % self.every_n_steps == 0 and step != self._last_step
        if self._sampling:
            strategy = strategy_of(trainer, self)
            self._last_step, self._before = step, strategy.timeline
            strategy.measure_step()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.experts is not None and trainer.global_step > self._stepped:
            self._stepped = trainer.global_step
            log_now(trainer, pl_module, self.experts.step(strategy_of(trainer, self), self._stepped))
        if not self._sampling:
            return
        strategy = strategy_of(trainer, self)
        if not strategy.broadcast(self._was_measured(strategy)):
            return  # a short batch, or one that did not call the blocks: later steps will tell
        placement = strategy.training_schedule.placement if strategy.training_schedule is not None else ()
        if self._costs is None or placement != self._placement:  # the first time, or after workers joined or left
            self._balancer, self._placement = Balancer(self.rule), placement
            self._costs = RollingCosts(strategy.measure_costs(), window=self.window, memory=self.memory)
        # The first driver alone knows the timeline, so it decides for all.
        decided = self._decide(strategy, self._costs) if trainer.is_global_zero else None
        costs, decision = strategy.broadcast(decided)
        strategy.take_up(costs, decision.schedule)
        self.changes += decision.schedule is not None
        self._tell(trainer, pl_module, decision)

    def _was_measured(self, strategy: SkipPipeStrategy) -> bool:
        timeline, schedule = strategy.timeline, strategy.training_schedule
        if timeline is None or timeline is self._before or schedule is None:
            return False
        return ran_whole(timeline, schedule)

    def _decide(self, strategy: SkipPipeStrategy, rolling: RollingCosts) -> tuple[CostModel, Decision]:
        planner, schedule, timeline = strategy.planner, strategy.training_schedule, strategy.timeline
        assert planner is not None
        assert schedule is not None
        assert timeline is not None
        rolling.add(timeline, schedule)
        costs = rolling.model()
        problem, latest = planner.problem(planner.ratio, costs), rolling.model(latest=True)
        return costs, self._balancer.decide(
            schedule, self._last_step, costs, latest, problem, lambda: planner.plan(costs)
        )

    def _tell(self, trainer: Trainer, pl_module: LightningModule, decision: Decision) -> None:
        if trainer.is_global_zero:
            level = logging.DEBUG if decision.schedule is None else logging.INFO
            verb = "keeps" if decision.schedule is None else "changes"
            log.log(level, "step %d: LoadBalancer %s the paths: %s", self._last_step, verb, decision.reason)
        metrics = {"balance/present_s": decision.present_s, "balance/changes": float(self.changes)}
        if decision.planned_s is not None:
            metrics["balance/planned_s"] = decision.planned_s
        log_now(trainer, pl_module, metrics)
