"""Which stages in which order a microbatch may visit, and how often each stage is visited.

The convergence constraints of SkipPipe (arXiv 2502.19913) on sequences of stages alone: no ranks, no costs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from skippipe_plugin.checked import COUNT, COUNT_OR_NONE, SHARE, Range, checked

_GOLDEN = (5**0.5 - 1) / 2


@checked(
    skip_ratio=SHARE,
    path_length=Range(2, 1_000_000),
    max_jump=COUNT,
    max_swaps=COUNT_OR_NONE,
    max_back=COUNT_OR_NONE,
    max_total_back=COUNT_OR_NONE,
    required=COUNT_OR_NONE,
)
@dataclass(frozen=True, kw_only=True, slots=True)
class PathConstraints:
    """What every path must keep. The defaults are those of the paper.

    >>> PathConstraints(skip_ratio=0.25).num_visits(8)
    6

    Raises:
        ValueError: A value is out of range, or two of them contradict each other.
    """

    skip_ratio: float | None = None
    """Share of the stages that each path leaves out; it visits ``round((1 - skip_ratio) * S)``."""
    path_length: int | None = None
    """Number of visits of each path plus one for its driver, in place of ``skip_ratio``; neither: no skipping."""
    max_jump: int = 4
    """How many stages a visit may lie beyond the furthest one so far (the driver is 0): 1 forbids skipping."""
    max_swaps: int | None = None
    """Most visits of a path that step back behind the furthest one so far. None: 2, or 0 when nothing is skipped."""
    max_back: int = 1
    """Furthest single step back, in stages: 1 swaps neighbours only."""
    max_total_back: int | None = None
    """Most stages that all steps back of a path add up to. None: ``max_swaps * max_back``."""
    required: tuple[int, ...] = ()
    """Stages that are never skipped nor swapped, such as those that change the hidden shape."""

    def __post_init__(self) -> None:
        if self.skip_ratio is not None and self.path_length is not None:
            raise ValueError(
                f"skip_ratio={self.skip_ratio} and path_length={self.path_length} both set the length of the paths; "
                "give one of them"
            )
        if self.max_swaps and not self.max_back:
            raise ValueError(f"max_swaps={self.max_swaps} contradicts max_back=0; set both to 0 to forbid swaps")

    @classmethod
    def unrestricted(cls, *, skip_ratio: float | None = None, path_length: int | None = None) -> "PathConstraints":
        """Allow any distinct stages in any order, rotations included; not what the paper found to converge."""
        far = 10**6
        return cls(skip_ratio=skip_ratio, path_length=path_length, max_jump=far, max_swaps=far, max_back=far)

    def num_visits(self, num_stages: int, num_available: int | None = None) -> int:
        """Return how many stages each path visits, of ``num_stages`` of which ``num_available`` are not holes.

        Raises:
            ValueError: No stage is left, or there are not as many.
        """
        if self.path_length is not None:
            visits, what = self.path_length - 1, f"path_length={self.path_length}"
        else:
            visits = round((1 - (self.skip_ratio or 0)) * num_stages)
            what = f"skip_ratio={self.skip_ratio or 0}"
        if visits < 1:
            raise ValueError(f"{what} leaves no stage of {num_stages}; lower the ratio or cut more stages")
        available = num_stages if num_available is None else num_available
        if visits > available:
            raise ValueError(
                f"stages too few: {what} makes paths of {visits} stages, but only {available} of {num_stages} "
                "are held by a rank; skip more, or place the missing stages"
            )
        return visits

    def swaps(self, num_visits: int, num_stages: int) -> int:
        """Return the number of swaps that a path of so many visits may have."""
        if self.max_swaps is not None:
            return self.max_swaps
        return 2 if num_visits < num_stages and self.max_back else 0

    def why_illegal(self, stages: Sequence[int], num_stages: int) -> str | None:
        """Return the constraint that a path over the stages violates, or None."""
        if missing := set(self.required) - set(stages):
            return f"skips stage {min(missing)}, which is required"
        return self.why_no_start(stages, self.swaps(len(stages), num_stages))

    def why_no_start(self, stages: Sequence[int], max_swaps: int) -> str | None:
        """Return the constraint that any path which starts with the stages violates, or None."""
        frontier = swaps = back = 0
        seen: set[int] = set()
        for stage in stages:
            if stage in seen:
                return f"visits stage {stage} twice"
            seen.add(stage)
            if stage - frontier > self.max_jump:
                return f"jumps from stage {frontier} to {stage}, over max_jump={self.max_jump}"
            if stage < frontier:
                swaps, back = swaps + 1, back + frontier - stage
                if frontier - stage > self.max_back:
                    return f"steps back from stage {frontier} to {stage}, over max_back={self.max_back}"
                if any(stage <= required <= frontier for required in self.required):
                    return f"swaps stages {stage} to {frontier}, among which one is required to keep its place"
            frontier = max(frontier, stage)
        if swaps > max_swaps:
            return f"swaps {swaps} times, over max_swaps={max_swaps}"
        if self.max_total_back is not None and back > self.max_total_back:
            return f"steps back over {back} stages, over max_total_back={self.max_total_back}"
        return None

    def sequences(self, available: Sequence[int], num_visits: int, num_stages: int) -> Iterator[tuple[int, ...]]:
        """Yield every legal sequence of that many of the available stages."""
        max_swaps = self.swaps(num_visits, num_stages)

        def extend(prefix: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
            lowest = max(prefix, default=0) - self.max_back
            if sum(stage >= lowest and stage not in prefix for stage in available) < num_visits - len(prefix):
                return  # what is left is too far back
            for stages in ((*prefix, stage) for stage in available):
                if self.why_no_start(stages, max_swaps) is None:
                    if len(stages) < num_visits:
                        yield from extend(stages)
                    elif self.why_illegal(stages, num_stages) is None:
                        yield stages

        return extend(())


def visit_targets(
    num_paths: int,
    num_visits: int,
    available: Sequence[int],
    required: Sequence[int],
    history: Sequence[int] = (),
    turn: int | None = None,
) -> tuple[dict[int, int], frozenset[int]]:
    """Return how many paths visit each stage: equally many (+-1), the odd ones where fewest visits were so far.

    Args:
        num_paths: Number of microbatches.
        num_visits: Visits of each.
        available: The stages that may be visited.
        required: Those that all paths visit.
        history: By stage, from stage 1 on: the visits of earlier plans; empty for none.
        turn: The plan's number, which rotates ties; None leaves ties to the search.

    Returns:
        The visits of each stage, and the stages among which the odd visits may move.
    """
    free = [stage for stage in available if stage not in required]
    base, odd = divmod(num_paths * (num_visits - len(required)), len(free)) if free else (0, 0)
    targets = dict.fromkeys(required, num_paths) | dict.fromkeys(free, base)
    seen = dict(enumerate(history, start=1))
    shift = (turn or 0) * odd
    order = sorted(range(len(free)), key=lambda i: (seen.get(free[i], 0), (i - shift) % len(free)))
    for i in order[:odd]:
        targets[free[i]] += 1
    if turn is not None or not odd:
        return targets, frozenset()
    last = seen.get(free[order[odd - 1]], 0)
    return targets, frozenset(stage for stage in free if seen.get(stage, 0) == last)


def deal_stages(
    targets: dict[int, int], num_paths: int, num_visits: int, constraints: PathConstraints
) -> list[list[int]]:
    """Return ascending stages for each path, such that each stage is in as many paths as ``targets`` says.

    Swaps do not matter here: a set of stages can be visited legally in some order if it can be in ascending order.

    Raises:
        ValueError: There are no such paths, because ``max_jump`` is too short.
    """
    paths = _deal_greedily(dict(targets), num_paths, num_visits, constraints.max_jump)
    return paths if paths is not None else _deal_exactly(targets, num_paths, num_visits, constraints)


def _deal_greedily(need: dict[int, int], num_paths: int, num_visits: int, max_jump: int) -> list[list[int]] | None:
    stages = sorted(need)
    paths: list[list[int]] = []
    for left in range(num_paths, 0, -1):
        # Those still needed by all remaining paths must be taken now; else those needed most, ties far apart.
        worth = {
            stage: 1000 * need[stage] + (10**9 if need[stage] == left else 0) + round(997 * (stage * _GOLDEN % 1))
            for stage in stages
            if need[stage] > 0
        }
        path = _best_path(worth, num_visits, max_jump)
        if path is None or any(need[stage] == left and stage not in path for stage in stages):
            return None
        for stage in path:
            need[stage] -= 1
        paths.append(path)
    return paths


def _best_path(worth: dict[int, int], num_visits: int, max_jump: int) -> list[int] | None:
    """Return the ascending path of that many stages that is worth most and jumps no further than it may."""
    best: dict[int, tuple[int, list[int]]] = {0: (0, [])}
    for _ in range(num_visits):
        longer: dict[int, tuple[int, list[int]]] = {}
        for stage, value in worth.items():
            for last, (so_far, path) in best.items():
                if last < stage <= last + max_jump and (stage not in longer or longer[stage][0] < so_far + value):
                    longer[stage] = (so_far + value, [*path, stage])
        best = longer
    return max(best.values(), key=lambda entry: entry[0])[1] if best else None


def _deal_exactly(
    targets: dict[int, int], num_paths: int, num_visits: int, constraints: PathConstraints
) -> list[list[int]]:
    """Deal as a flow of ``num_paths`` through (position, stage), the flow through each stage given."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    stages = sorted(targets)
    steps = [
        (at, before, stage)
        for at in range(num_visits)
        for before in ([0] if at == 0 else stages)
        for stage in stages
        if before < stage <= before + constraints.max_jump
    ]
    rows, sums = [], []
    for stage in stages:
        rows.append([float(step[2] == stage) for step in steps])
        sums.append(targets[stage])
        for at in range(1, num_visits):
            rows.append([float(s[:2] == (at, stage)) - float((s[0], s[2]) == (at - 1, stage)) for s in steps])
            sums.append(0)
    flow = None
    if steps:
        conserved = LinearConstraint(np.array(rows), sums, sums)
        flow = milp(
            np.zeros(len(steps)), constraints=conserved, integrality=np.ones(len(steps)), bounds=Bounds(0, num_paths)
        ).x
    if flow is None:
        raise ValueError(
            f"max_jump={constraints.max_jump} is too short: no {num_paths} paths of {num_visits} stages visit "
            f"each of the {len(stages)} stages equally often; allow longer jumps or skip less"
        )
    left = {step: round(float(amount)) for step, amount in zip(steps, flow, strict=True)}
    return list(_follow(left, num_paths, num_visits))


def _follow(left: dict[tuple[int, int, int], int], num_paths: int, num_visits: int) -> Iterator[list[int]]:
    for _ in range(num_paths):
        path, last = [], 0
        for at in range(num_visits):
            step = next(s for s, amount in left.items() if amount > 0 and s[:2] == (at, last))
            left[step] -= 1
            last = step[2]
            path.append(last)
        yield path
