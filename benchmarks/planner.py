"""The planner on a folder of cases: python benchmarks/planner.py [FOLDER] [--budget S] [--out RESULT.json]

For each case, given and planned placement, links that carry many messages at once and links that carry one: the
planned makespan, the proven lower bound, the gap between them, and the seconds of planning (of the process, so that
other work on the machine does not count). A case may name references to compare with (`reference`, by planner, with
its `event_model_s`). Cases made by `planner_cases.py` lie in benchmarks/cases.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from skippipe_plugin.schedule import plan
from skippipe_plugin.schedule.casefile import read_case, read_json


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    case: str
    placement: str
    links: str
    reference_s: float | None
    ours_s: float
    lower_bound_s: float
    gap: float
    planning_cpu_s: float

    def __str__(self) -> str:
        reference = f"{self.reference_s:9.3f}" if self.reference_s else f"{'-':>9}"
        ratio = f"{self.ours_s / self.reference_s:6.3f}" if self.reference_s else f"{'-':>6}"
        return (
            f"{self.case:<18} {self.placement:<9} {self.links:<6} {reference} {self.ours_s:9.3f} {ratio} "
            f"{self.lower_bound_s:9.3f} {self.gap:7.1%} {self.planning_cpu_s:8.2f}"
        )


HEAD = (
    f"{'case':<18} {'placement':<9} {'links':<6} {'reference':>9} {'ours':>9} {'ratio':>6} {'bound':>9} {'gap':>7} "
    f"{'cpu s':>8}"
)


def measure(path: Path, placement: str, links: str, budget_s: float, seed: int) -> Row:
    problem = read_case(path, placement_mode=placement, links=links)
    references = read_json(path).get("reference", {})
    # Reference plans are timed on links that do not contend.
    best = min((entry["event_model_s"] for entry in references.values()), default=None) if links == "free" else None
    started_s = time.process_time()
    found = plan(problem, budget_s=budget_s, seed=seed)
    spent_s = time.process_time() - started_s
    return Row(path.stem, placement, links, best, found.makespan_s, found.lower_bound_s, found.gap, spent_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent / "cases")
    parser.add_argument("--budget", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    print(HEAD)
    for path in sorted(options.folder.glob("*.json")):
        for placement in ("given", "plan"):
            for links in ("free", "shared"):
                rows.append(measure(path, placement, links, options.budget, options.seed))
                print(rows[-1], flush=True)
    if options.out:
        options.out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
