"""What a user sets, checked as soon as it is set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from ..checked import COUNT, NUM_PROCESSES, SHARE, checked
from ..driver.backward import GradientScale
from ..driver.doors import RECOVERY
from ..driver.recovery.policy import RecoveryPolicy
from ..job.network import NetworkConfig
from ..moe import MoEConfig
from ..schedule import Schedule
from .config import PathConfig
from .shape import PipelineShape
from .skipping import SkipRatio, check_ratio, skips
from .weight import MicrobatchWeight

ScheduleName = Literal["auto", "gpipe", "1f1b"]
CutWhere = Literal["auto", "batch", "stack"]
"""What microbatches are cut from: the batch, so that the user's step runs once for each; or what enters the block stack
when the step runs once, on the whole batch."""


@checked(skip_ratio=SHARE, num_microbatches=COUNT, replicas=NUM_PROCESSES, drivers=NUM_PROCESSES)
@dataclass(frozen=True, kw_only=True)
class PipelineSettings:
    """How a model is spread and stepped; :class:`skippipe_plugin.strategies.SkipPipeStrategy` says what each means.

    Raises:
        ValueError: A setting cannot be, or contradicts another one.
    """

    skip_ratio: SkipRatio = 0.0
    schedule: ScheduleName | Schedule = "auto"
    num_microbatches: int | None = None
    microbatches: CutWhere = "auto"
    microbatch_weight: MicrobatchWeight | None = None
    replicas: int = 1
    drivers: int = 1
    blocks: str | Sequence[str] | None = None
    driver_stage: bool = False
    gradient_scale: GradientScale = "batch"
    paths: PathConfig = field(default_factory=PathConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    moe: MoEConfig | None = None
    verbose: bool = True

    def __post_init__(self) -> None:
        _ = self.shape
        check_ratio(self.skip_ratio)
        if skips(self.skip_ratio) and isinstance(self.schedule, Schedule):
            raise ValueError("skip_ratio and a schedule of your own both choose the paths; give one of them")
        if self.moe is not None and self.driver_stage and self.drivers > 1:
            raise ValueError("moe with driver_stage=True takes one driver: each would count its own experts only")

    def fit_recovery(self, policy: RecoveryPolicy) -> RecoveryPolicy:
        """Return how lost workers are replaced with these settings: steps that skip anyway do not wait for a stage.

        Raises:
            ValueError: They cannot be replaced in that way.
        """
        if policy.swap_ends and skips(self.skip_ratio):
            raise ValueError("swap_ends=True exchanges stages on full paths; use skip_ratio=0 or swap_ends=False")
        size = self.moe.expert_parallel if self.moe is not None else 1
        if size > 1 and policy.swap_ends:
            raise ValueError(
                "swap_ends=True sends replicas different ways, and with expert_parallel they work together"
            )
        if 1 < size == self.replicas:
            raise ValueError(
                f"with expert_parallel={size} and replicas={size} each expert has one holder, so what a lost worker "
                f"held exists nowhere else; use replicas={2 * size}, or leave {RECOVERY} "
                "out and resume from a checkpoint"
            )
        return replace(policy, while_missing="skip") if skips(self.skip_ratio) else policy

    @cached_property
    def shape(self) -> PipelineShape:
        """The settings that decide the layout."""
        return PipelineShape(
            schedule=self.schedule,
            num_microbatches=self.num_microbatches,
            replicas=self.replicas,
            drivers=self.drivers,
            driver_stage=self.driver_stage,
            expert_parallel=self.moe.expert_parallel if self.moe is not None else 1,
        )
