"""What spreading the experts of a layer over processes costs: the share of the exchanges, by degree of overlap.

python benchmarks/moe_parallel.py                  # about two minutes
python benchmarks/moe_parallel.py --quick

Each process has its own tokens and its share of the experts. The first row of a group is one process with as many
tokens and all experts; the others have the same work each, so what they take more is the price of spreading. `waiting`
is the time in which a process does nothing but wait for rows, forward and backward, for slower processes too.
Wall-clock milliseconds of a forward and a backward, the median of the rounds. With more processes than cores it is the
machine's load that is measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor

from skippipe_plugin.engine.c10d import TCPStore
from skippipe_plugin.engine.exchange import GroupExchange
from skippipe_plugin.engine.transport import PendingTensor, Transport
from skippipe_plugin.moe import MoELayer
from skippipe_plugin.moe.parallel import SHARD, Company, Shard
from skippipe_plugin.moe.routing import Routing
from skippipe_plugin.moe.shards import even_placement, find_sites, take_shard

LONGEST_S = 300.0
"""For how long a process may be silent; one that failed never answers."""


@dataclass(frozen=True)
class Case:
    """A layer on some processes."""

    ranks: int
    degree: int
    skew: float
    dtype: str = "float32"
    tokens: int = 2048
    """Of each process."""
    experts: int = 16
    dim: int = 512
    inner: int = 1024
    top_k: int = 2


class Timed:
    """An exchange whose waiting is timed."""

    def __init__(self, exchange: GroupExchange) -> None:
        self.size, self.position = exchange.size, exchange.position
        self.waited_s = 0.0
        self.num_bytes = 0
        self._exchange = exchange

    def all_to_all(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> TimedArrival:
        self.num_bytes += rows.numel() * rows.element_size()
        return TimedArrival(self, self._exchange.all_to_all(rows, send, receive))

    def sum(self, tensor: Tensor) -> None:
        self._exchange.sum(tensor)


class TimedArrival:
    """Rows on their way."""

    def __init__(self, exchange: Timed, pending: PendingTensor) -> None:
        self._exchange, self._pending = exchange, pending

    def wait(self) -> Tensor:
        start_s = time.perf_counter()
        rows = self._pending.wait()
        self._exchange.waited_s += time.perf_counter() - start_s
        return rows


def layer_of(case: Case) -> MoELayer:
    """Make the layer, the same everywhere, with a router that likes the first experts as much as the case says."""
    torch.manual_seed(0)
    favour = case.skew * torch.linspace(1, 0, case.experts)

    def choose(logits: Tensor, top_k: int, bias: Tensor | None) -> Routing:
        weights, experts = (logits + favour).softmax(-1).topk(top_k)
        return Routing(weights, experts)

    layer = MoELayer(case.dim, case.inner, case.experts, top_k=case.top_k, router=choose)
    return layer.to(getattr(torch, case.dtype))


def spread(layer: MoELayer, exchange: Timed, degree: int) -> Company:
    (site,) = find_sites(layer)
    placement = even_placement(site.num_experts, exchange.size)
    company = Company(exchange, [layer.experts])
    company.degree = degree
    for name in site.tensors:
        parameter = layer.get_parameter(name)
        parameter.data = take_shard(parameter, placement, exchange.position).clone()
    setattr(layer.experts, SHARD, Shard(company, 0, placement))
    return company


def measure(rank: int, case: Case, port: int, rounds: int, results: Any) -> None:
    torch.set_num_threads(1)
    layer = layer_of(case)
    company = exchange = None
    if case.ranks > 1:
        store = TCPStore("127.0.0.1", port, is_master=False)
        transport = Transport(store, rank=rank, members=range(case.ranks), generation=0, host="127.0.0.1")
        transport.form()
        transport.form_subgroup("experts", range(case.ranks))
        exchange = Timed(GroupExchange(transport, "experts", range(case.ranks)))
        company = spread(layer, exchange, case.degree)
        company.enter([True] * case.ranks)
    torch.manual_seed(1 + rank)
    hidden = torch.randn(case.tokens, case.dim, dtype=getattr(torch, case.dtype), requires_grad=True)
    times, shares = [], []
    for _ in range(2 + rounds):
        if exchange is not None:
            exchange.waited_s = exchange.num_bytes = 0
            exchange.sum(torch.zeros(1))  # begin together
        start_s = time.perf_counter()
        layer(hidden).sum().backward()
        times.append(time.perf_counter() - start_s)
        shares.append(exchange.waited_s / times[-1] if exchange is not None else 0.0)
    sent = exchange.num_bytes if exchange is not None else 0
    results.put((median(times[2:]), median(shares[2:]), sent))


def run(case: Case, rounds: int) -> dict[str, Any]:
    """Return the medians of the slowest process, the mean share of waiting, and the bytes a process sends."""
    context = mp.get_context("spawn")
    results = context.Queue()
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = [
        context.Process(target=measure, args=(rank, case, store.port, rounds, results), daemon=True)
        for rank in range(case.ranks)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=LONGEST_S) for _ in processes]
    for process in processes:
        process.join()
    seconds, shares, sent = zip(*found, strict=True)
    return {**asdict(case), "seconds": max(seconds), "waiting": sum(shares) / len(shares), "megabytes": max(sent) / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, float32 and even loads only")
    parser.add_argument("--ranks", type=int, nargs="*", default=[2], help="numbers of processes")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all figures as JSON")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    rounds = 3 if arguments.quick else 9
    skews, dtypes = ((0.0,), ("float32",)) if arguments.quick else ((0.0, 2.0), ("float32", "bfloat16"))
    print(f"{os.cpu_count()} cores; 16 experts, top 2, 2048 tokens per process\n")
    print("| processes | overlap | routing | dtype | ms | over alone | waiting | sent by each, MB |")
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    for dtype, skew in itertools.product(dtypes, skews):
        alone = run(Case(1, 1, skew, dtype), rounds)
        cases = [Case(ranks, degree, skew, dtype) for ranks in arguments.ranks for degree in (1, 2, 4)]
        for row in [alone, *(run(case, rounds) for case in cases)]:
            rows.append(row)
            over = row["seconds"] / alone["seconds"]
            cells = [row["ranks"], row["degree"], "skewed" if skew else "even", dtype, f"{1e3 * row['seconds']:.0f}"]
            cells += [f"{over:.2f}", f"{row['waiting']:.0%}", f"{row['megabytes']:.0f}"]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
