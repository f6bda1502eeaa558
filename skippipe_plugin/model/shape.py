"""From the user's settings to stages, ranks and schedules."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..driver.layout import Layout, device_counts
from ..driver.pipeline import EVALUATION, TRAINING
from ..schedule import Path, Schedule, Visit, expand, forward_only, full_schedule, gpipe, validate


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineShape:
    """The settings that decide how a pipeline is laid out; see :class:`SkipPipeStrategy` for their meaning."""

    schedule: str | Schedule
    num_microbatches: int | None
    replicas: int
    drivers: int
    driver_stage: bool
    expert_parallel: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.schedule, Schedule):
            _check_own(self.schedule, self.num_microbatches)
            _check_coupled(self.schedule, self.expert_parallel)
        elif self.replicas % self.expert_parallel:
            raise ValueError(
                f"expert_parallel={self.expert_parallel} does not fit replicas={self.replicas}: experts are spread "
                f"over the replicas of a stage; use replicas={self.expert_parallel} or a multiple of it"
            )
        elif (self.num_microbatches or 0) % self.expert_parallel:
            raise ValueError(
                f"num_microbatches={self.num_microbatches} does not divide by expert_parallel={self.expert_parallel}: "
                "the replicas of a stage work on that many at a time; use a multiple"
            )

    def num_stages(self, num_processes: int) -> int:
        """Return how many block stages the processes make; ValueError when they do not fit."""
        if not isinstance(self.schedule, Schedule):
            return device_counts(
                num_processes, replicas=self.replicas, drivers=self.drivers, driver_stage=self.driver_stage
            )
        if (self.schedule.num_ranks, len(self.schedule.drivers)) != (num_processes, self.drivers):
            raise ValueError(
                f"the schedule is for {self.schedule.num_ranks} ranks with {len(self.schedule.drivers)} drivers, not "
                f"for devices={num_processes} and drivers={self.drivers}; use devices={self.schedule.num_ranks} "
                f"(so many processes) and drivers={len(self.schedule.drivers)}"
            )
        return self.schedule.num_stages

    def layout(self, stage_blocks: tuple[range, ...]) -> Layout:
        """Place the stages on the ranks."""
        if isinstance(self.schedule, Schedule):
            return Layout(self.drivers, stage_blocks, self.schedule.placement, self.expert_parallel)
        placement = self._named(len(stage_blocks), 1, backward=True).placement
        return Layout(self.drivers, stage_blocks, placement, self.expert_parallel)

    def schedules(self, num_stages: int) -> dict[str, Schedule]:
        """Return the schedules of training and of evaluation, proved to run."""
        if isinstance(self.schedule, Schedule):
            training, evaluation = self.schedule, _whole(self.schedule)
        else:
            count = self.num_microbatches or 4 * num_stages
            training = self._named(num_stages, count, backward=True)
            evaluation = self._named(num_stages, count, backward=False)
        validate(training)
        validate(evaluation)
        return {TRAINING: training, EVALUATION: evaluation}

    def _named(self, num_stages: int, num_microbatches: int, *, backward: bool) -> Schedule:
        assert isinstance(self.schedule, str)
        size = self.expert_parallel
        bundled = full_schedule(
            "1f1b" if self.schedule == "auto" else self.schedule,
            num_stages=num_stages,
            num_microbatches=-(-num_microbatches // size),
            replicas=self.replicas // size,
            drivers=self.drivers,
            driver_stage=self.driver_stage,
            backward=backward,
        )
        return expand(bundled, size)


def _check_own(schedule: Schedule, num_microbatches: int | None) -> None:
    """Refuse a schedule that the user passed and that cannot train, or that contradicts another setting."""
    if num_microbatches not in (None, schedule.num_microbatches):
        raise ValueError(
            f"the schedule has {schedule.num_microbatches} microbatches, num_microbatches={num_microbatches}; leave "
            "num_microbatches out, or plan for that number"
        )
    if not schedule.backward:
        raise ValueError("the schedule has no backward actions, so it cannot train; pass one with backward=True")
    validate(schedule)
    for stage, ranks in enumerate(schedule.placement):
        if not ranks:
            raise ValueError(
                f"no rank of the schedule holds stage {stage}, which has blocks; plan with every stage placed"
            )


def _check_coupled(schedule: Schedule, expert_parallel: int) -> None:
    """Refuse a schedule of the user's whose coupled ranks are not those that share experts."""
    sets = Layout(len(schedule.drivers), (), schedule.placement, expert_parallel).expert_sets
    if expert_parallel > 1:
        for stage, ranks in enumerate(schedule.placement):
            if stage and ranks[0] >= len(schedule.drivers) and len(ranks) % expert_parallel:
                raise ValueError(
                    f"expert_parallel={expert_parallel} does not divide the {len(ranks)} ranks that hold stage {stage}"
                )
    wanted = {ranks for _, groups in sets for ranks in groups}
    if wanted != set(schedule.coupled):
        raise ValueError(
            f"the schedule couples the ranks {schedule.coupled}, and expert_parallel={expert_parallel} needs "
            f"{tuple(sorted(wanted))}; make it with skippipe_plugin.schedule.expand"
        )


def _whole(schedule: Schedule) -> Schedule:
    """Return the evaluation that belongs to ``schedule``: every stage in order, whatever training leaves out."""
    stages = tuple(range(1, schedule.num_stages + 1))
    if all(path.stages == stages for path in schedule.paths):
        return forward_only(schedule)
    paths = tuple(
        Path(path.driver, tuple(Visit(stage, _replica(schedule, stage, path.driver, index)) for stage in stages))
        for index, path in enumerate(schedule.paths)
    )
    return replace(gpipe(schedule.placement, paths, backward=False), coupled=schedule.coupled)


def _replica(schedule: Schedule, stage: int, driver: int, microbatch: int) -> int:
    """Choose a rank for a stage: the driver's own, else the replicas in turn."""
    ranks = schedule.placement[stage]
    return driver if driver in ranks else ranks[microbatch % len(ranks)]
