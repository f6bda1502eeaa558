"""What the experts of one layer cost, forward and backward: ours, those of transformers, and one dense product.

python benchmarks/moe_layer.py                    # about ten minutes on one core
python benchmarks/moe_layer.py --quick --only reference

Every way computes the same Mixtral experts on the same tokens with the same choices of a router. `dense` is the
yardstick: as many rows times the matrices of a single expert. Milliseconds of processor time on one thread, the median
of the rounds; the ways take turns, so that other load meets all alike. Results must agree, or the script stops.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MixtralConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from skippipe_plugin.moe import Routing, Softmax, count_loads, max_violation, route
from skippipe_plugin.moe.attach import IMPLEMENTATION, transformers_experts

WAYS = ("dense", "eager", "grouped_mm", "batched_mm", IMPLEMENTATION)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Case:
    """A layer and its tokens."""

    name: str
    tokens: int = 2048
    experts: int = 16
    skew: float = 0.0
    """How much the router's logits favour the first experts over the last."""
    dim: int = 512
    inner: int = 1024
    top_k: int = 2

    @property
    def batched(self) -> bool:
        """Whether `batched_mm`, which copies the weights for every token, can be asked for."""
        return self.tokens <= 256


CASES = (
    Case("reference", tokens=4096),
    Case("skewed", skew=2.0),
    Case("many experts", tokens=4096, experts=64, dim=256, inner=512),
    Case("few tokens", tokens=128, experts=64),
)


@dataclass(frozen=True)
class Precision:
    """The type of the weights, and whether autocast computes in another."""

    name: str
    dtype: torch.dtype
    autocast: bool = False

    def context(self) -> AbstractContextManager[object]:
        return torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext()

    @property
    def tolerance(self) -> float:
        return TOLERANCE[torch.bfloat16 if self.autocast else self.dtype]


PRECISIONS = (
    Precision("float32", torch.float32),
    Precision("bfloat16", torch.bfloat16),
    Precision("bf16 autocast", torch.float32, autocast=True),
)


class Layer(nn.Module):
    """The experts of Mixtral, whose implementation can be chosen."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        sizes = {"hidden_size": case.dim, "intermediate_size": case.inner, "num_local_experts": case.experts}
        self.config = MixtralConfig(**sizes, num_experts_per_tok=case.top_k)
        self.experts = MixtralExperts(self.config)
        for weight in self.experts.parameters():
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
        # Not the experts' own: the gradient of one's slice would be a tensor of all experts' size.
        self.up = nn.Parameter(self.experts.gate_up_proj[0].detach().clone())
        self.down = nn.Parameter(self.experts.down_proj[0].detach().clone())

    def compute(self, way: str, hidden: Tensor, routing: Routing) -> Tensor:
        """Run one way; `dense` takes the place of the experts with a single one's matrices."""
        if way == "dense":
            rows = hidden.repeat(routing.experts.shape[1], 1)
            gate, value = F.linear(rows, self.up).chunk(2, dim=-1)
            return F.linear(self.experts.act_fn(gate) * value, self.down)
        self.config._experts_implementation = way
        result: Tensor = self.experts(hidden, routing.experts, routing.weights)
        return result


def setting(case: Case, precision: Precision) -> tuple[Layer, Tensor, Routing]:
    """Make the layer, its tokens and the choices of the router, the same for every way."""
    torch.manual_seed(0)
    layer = Layer(case).to(precision.dtype)
    hidden = torch.randn(case.tokens, case.dim, dtype=precision.dtype, requires_grad=True)
    logits = torch.randn(case.tokens, case.experts) + case.skew * torch.linspace(1, 0, case.experts)
    chosen = route(Softmax(), logits, case.top_k)
    return layer, hidden, Routing(chosen.weights.to(precision.dtype), chosen.experts)


def once(run: Callable[..., Tensor], *arguments: object) -> tuple[float, Tensor]:
    """Return the processor time of a forward and a backward, in milliseconds, and the result."""
    start_s = time.process_time()
    result = run(*arguments)
    result.float().sum().backward()
    return 1e3 * (time.process_time() - start_s), result.detach()


def measure(case: Case, precision: Precision, rounds: int) -> Iterator[tuple[str, float | None]]:
    """Yield the median time of each way; None where it is not run."""
    layer, hidden, routing = setting(case, precision)
    ways = [way for way in WAYS if way != "batched_mm" or case.batched]
    times: dict[str, list[float]] = {way: [] for way in ways}
    results: dict[str, Tensor] = {}
    for turn in range(rounds + 1):
        for way in ways:
            layer.zero_grad()
            with precision.context():
                took_ms, results[way] = once(layer.compute, way, hidden, routing)
            if turn:  # the first one warms up
                times[way].append(took_ms)
    for way in ways[1:]:
        torch.testing.assert_close(results[way], results["eager"], rtol=precision.tolerance, atol=precision.tolerance)
    for way in WAYS:
        yield way, median(times[way]) if way in times else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three rounds instead of seven")
    parser.add_argument("--only", nargs="+", metavar="CASE", default=[case.name for case in CASES])
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all figures as JSON")
    arguments = parser.parse_args()
    if unknown := set(arguments.only) - {case.name for case in CASES}:
        sys.exit(f"unknown cases: {', '.join(unknown)}; there are {', '.join(case.name for case in CASES)}")
    torch.set_num_threads(1)
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, transformers_experts)
    print("| case | dtype | MaxVio | dense | eager | grouped_mm | batched_mm | ours |\n|" + "---|" * 8)
    rows = []
    for case in (case for case in CASES if case.name in arguments.only):
        for precision in PRECISIONS:
            loads = count_loads(setting(case, precision)[2].experts, case.experts)
            times = dict(measure(case, precision, 3 if arguments.quick else 7))
            dense_ms = times["dense"] or float("nan")
            rows.append({**asdict(case), "precision": precision.name, "milliseconds": times})
            cells = ["-" if took is None else f"{took:.0f} ({took / dense_ms:.2f})" for took in times.values()]
            print(f"| {case.name} | {precision.name} | {max_violation(loads):.2f} | {' | '.join(cells)} |", flush=True)
    if arguments.out:
        environment = {"torch": torch.__version__, "cores": os.cpu_count(), "load": os.getloadavg()[0]}
        arguments.out.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
