"""Write the planning cases of this folder: python benchmarks/planner_cases.py [FOLDER]

A few cities with round-number links between them, and three pipelines over them. Deterministic.
"""

import json
import random
import sys
from pathlib import Path

MESSAGE_BYTES, OVERHEAD_S = 2**25, 0.1
CITIES = ("Paris", "Frankfurt", "Virginia", "Oregon", "Tokyo", "Sydney")
ONE_WAY_MS = (
    (0.5, 5, 40, 70, 110, 140),
    (5, 0.5, 45, 75, 115, 145),
    (40, 45, 0.5, 30, 80, 100),
    (70, 75, 30, 0.5, 50, 70),
    (110, 115, 80, 50, 0.5, 55),
    (140, 145, 100, 70, 55, 0.5),
)
MBIT_PER_S = (
    (8000, 2000, 300, 200, 100, 80),
    (2000, 8000, 280, 180, 100, 80),
    (300, 280, 8000, 500, 150, 120),
    (200, 180, 500, 8000, 250, 170),
    (100, 100, 150, 250, 8000, 200),
    (80, 80, 120, 170, 200, 8000),
)


def message_s(a: int, b: int) -> float:
    return round(ONE_WAY_MS[a][b] / 1e3 + MESSAGE_BYTES * 8 / (MBIT_PER_S[a][b] * 1e6) + OVERHEAD_S, 6)


def case(cities: list[int], sizes: list[int], *, path_length: int, seed: int, unequal: bool, per_home: int) -> dict:
    chance = random.Random(seed)
    nodes = list(range(sum(sizes)))
    chance.shuffle(nodes)
    partitions = [[nodes.pop() for _ in range(size)] for size in sizes]
    where = [cities[node % len(cities)] for node in range(sum(sizes))]
    numbers = range(len(where))
    return {
        "nodes": len(where),
        "locations": [CITIES[city] for city in where],
        "partitions": partitions,
        "cost_s": [[0.0 if a == b else message_s(where[a], where[b]) for b in numbers] for a in numbers],
        "wm_s": [round(0.3 * (chance.choice((1, 1.5, 2)) if unequal else 1), 3) for _ in where],
        "loss_factor": 0.25,
        "backward_factor": 1.5,
        "gap_s": 0.02,
        "memory": [3 if unequal else 4 for _ in where],
        "path_length": path_length,
        "microbatches_per_home": per_home,
        "max_jump_from_frontier": 4,
        "swap_limits": {"total_distance": 2, "furthest": 1, "count": 2},
    }


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "cases")
    folder.mkdir(exist_ok=True)
    cases = {
        "two_cities": case([0, 2], [1, 1, 1, 1, 1, 1], path_length=4, seed=1, unequal=False, per_home=10),
        "four_cities": case([0, 1, 2, 3], [4, 3, 3, 3, 3], path_length=4, seed=2, unequal=False, per_home=6),
        "world_unequal": case(list(range(6)), [3, 3, 3, 3, 3, 3], path_length=5, seed=3, unequal=True, per_home=5),
    }
    for name, data in cases.items():
        (folder / f"{name}.json").write_text(json.dumps(data) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
