"""How losses are met: the settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...checked import NUM_SPARES, SECONDS, Range, checked
from ...recovery import RebuildRule

WhileMissing = Literal["wait", "skip"]


@checked(spares=NUM_SPARES, lr_factor=Range(0, 1000, includes_least=False), heartbeat_s=SECONDS)
@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryPolicy:
    """How losses are met; :class:`skippipe_plugin.callbacks.StageRecovery` says what each setting means.

    Raises:
        ValueError: A setting cannot be.
    """

    spares: int = 1
    rule: RebuildRule = "norm"
    lr_factor: float = 1.1
    while_missing: WhileMissing = "wait"
    swap_ends: bool = False
    heartbeat_s: float = 10.0
    elastic: bool = False
