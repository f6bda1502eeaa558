"""Every message between a driver and a worker, and who may say it."""

from __future__ import annotations

from typing import Final

from .answers import (
    ClockReads,
    Done,
    ExpertNews,
    Failed,
    LinkCosts,
    NormPowers,
    PartsCompared,
    Probed,
    Ready,
    RouterNews,
    SideGradients,
    State,
    Tapped,
    Unscaled,
    Warmed,
)
from .codec import Vocabulary
from .commands import (
    Abort,
    Arrange,
    AskClock,
    AskNorm,
    AskRouters,
    BuildOptimizer,
    Calls,
    Clip,
    CompareParts,
    Configure,
    Get,
    Load,
    MeasureLinks,
    Merge,
    MoveExperts,
    Overwrite,
    Pass,
    Probe,
    Pulled,
    PutOptimizerState,
    Share,
    Step,
    StepOptimizer,
    SwitchOptimizer,
    Unscale,
    UseSchedule,
    Warm,
)
from .keeping import (
    AskRecord,
    AskRecords,
    AskSummary,
    Drop,
    EndRun,
    FinishStep,
    GetRetained,
    Kept,
    LetGo,
    NoteEstimates,
    OneRecord,
    Prepare,
    Records,
    Retain,
    Settle,
    Store,
    Stored,
    Summary,
)
from .presence import (
    AskProgress,
    Beat,
    Exit,
    Hello,
    Leave,
    Outlive,
    Progress,
    Refuse,
    Release,
)

TO_WORKER: Final = Vocabulary(
    "worker",
    [
        *(Configure, UseSchedule, MeasureLinks, Abort, AskClock),
        *(Load, Warm, Arrange, Get, Overwrite, Share, Probe, CompareParts),
        *(Step, Calls, Pulled, Merge, AskNorm, Clip, Unscale, Pass),
        *(BuildOptimizer, PutOptimizerState, StepOptimizer, SwitchOptimizer, AskRouters, MoveExperts),
        *(Prepare, Store, Settle, AskRecords, LetGo, NoteEstimates, Drop, EndRun),
        *(AskSummary, AskRecord, GetRetained, FinishStep, Retain, Outlive),
        *(Release, Exit, Refuse, Beat, AskProgress),
    ],
)
"""What a driver sends."""
TO_DRIVER: Final = Vocabulary(
    "driver",
    [
        *(Hello, Leave, Ready, Warmed, LinkCosts, ClockReads, Tapped, SideGradients, Done, NormPowers, Unscaled, State),
        *(Probed, PartsCompared),
        *(RouterNews, ExpertNews, Kept, Stored, Records, Summary, OneRecord, Failed, Beat, Progress),
    ],
)
"""What a worker sends."""
