"""How evenly experts are loaded, and at what loss: biases, auxiliary loss, and nothing, on the same text.

python benchmarks/moe_balance.py --quick                                     # under two minutes
python benchmarks/moe_balance.py --out balance.json --plot balance.png       # about eight minutes on one core

The byte-level mixture of experts of `examples/byte_moe.py` learns Python's language reference, in one process. The
text's bytes are skewed, and so are the routers. MaxVio is that of the whole validation sample, as in the paper
(arXiv 2408.15664), the mean over layers; chance alone leaves it at `floor`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from skippipe_plugin.moe import BIAS_RULES, Attached, MoEConfig, RouterStatistics, attach, max_violation

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from byte_lm import ByteDataset, default_text
from byte_moe import ByteMoE


@dataclass(frozen=True)
class Method:
    """A way to balance: a rule for the biases with its rate, an auxiliary loss, or neither."""

    name: str
    rule: str = ""
    rate: float = 0.0
    auxiliary_loss: float = 0.0


METHODS = (
    Method("nothing"),
    Method("auxiliary loss 0.01", auxiliary_loss=0.01),
    Method("bias, sign 0.001", "sign", 1e-3),
    Method("bias, sign 0.01", "sign", 1e-2),
    Method("bias, proportional 0.01", "proportional", 1e-2),
    Method("bias, quantile", "quantile"),
)


@dataclass(frozen=True)
class Setting:
    """What all methods share."""

    steps: int
    every: int
    seeds: int
    batch: int = 32
    width: int = 64
    layers: int = 4
    experts: int = 16
    top_k: int = 2
    lr: float = 5e-3


def batches(windows: Tensor, setting: Setting, seed: int) -> Iterator[Tensor]:
    """Draw windows of the text, the same for every method."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(windows), generator=generator).split(setting.batch)
        yield from (windows[indices] for indices in order[:-1])


@torch.no_grad()
def validate(model: ByteMoE, hooks: Attached, sample: list[Tensor]) -> tuple[float, float]:
    """Return the loss and MaxVio of the sample."""
    take(hooks)
    loss = sum(float(model.loss(batch)) for batch in sample) / len(sample)
    violations = [max_violation(each.loads) for each in take(hooks).values()]
    return loss, sum(violations) / len(violations)


def take(hooks: Attached) -> dict[str, RouterStatistics]:
    return {name: hook.take() for name, hook in hooks.hooks.items()}


def update(hooks: Attached, method: Method) -> None:
    """Move every bias by the loads of the step."""
    for name, statistics in take(hooks).items():
        router, hook = hooks.routers[name], hooks.hooks[name]
        if statistics.quantiles is not None:
            hook.set_bias(router, statistics.quantiles / statistics.num_tokens)
        elif method.rule:
            bias = hook.bias(router)
            assert bias is not None
            hook.set_bias(router, BIAS_RULES[method.rule](bias, statistics.loads, method.rate))


def train(method: Method, setting: Setting, seed: int, text: bytes) -> list[dict[str, float]]:
    """Train from the same start on the same batches; return the curve."""
    torch.manual_seed(seed)
    model = ByteMoE(setting.width, setting.layers, num_experts=setting.experts, top_k=setting.top_k)
    hooks = attach(model, MoEConfig(auxiliary_loss=method.auxiliary_loss, quantiles=method.rule == "quantile"))
    data = ByteDataset(text, model.context)
    windows = torch.stack([data[index] for index in range(len(data))])
    held_out = torch.arange(len(windows)) % 10 == 0  # all over the text: balance is asked for on the same mixture
    sample = list(windows[held_out].split(64)[:12])
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.lr, betas=(0.9, 0.95))
    curve = []
    for step, batch in zip(range(setting.steps + 1), batches(windows[~held_out], setting, seed), strict=False):
        if step % setting.every == 0:
            loss, violation = validate(model, hooks, sample)
            curve.append({"step": step, "loss": loss, "max_violation": violation})
        for group in optimizer.param_groups:
            group["lr"] = setting.lr * min(1.0, (step + 1) / 50, 2 * (1 - step / (setting.steps + 1)))
        optimizer.zero_grad()
        model.loss(batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        update(hooks, method)
    return curve


def floor(setting: Setting, visits: int) -> float:
    """Return the MaxVio that perfectly even chances leave on a sample of that many visits."""
    draws = torch.distributions.Multinomial(visits, torch.ones(setting.experts)).sample((200,))
    return float(torch.tensor([max_violation(draw) for draw in draws]).mean())


def summary(curves: list[list[dict[str, float]]]) -> dict[str, float | None]:
    """Return means over seeds: the first step with MaxVio below 0.1, its last value, and the last loss."""
    mean = [sum(point["max_violation"] for point in points) / len(points) for points in zip(*curves, strict=True)]
    reached = [point["step"] for point, value in zip(curves[0], mean, strict=True) if value < 0.1]
    return {
        "first_below": reached[0] if reached else None,
        "max_violation": mean[-1],
        "loss": sum(curve[-1]["loss"] for curve in curves) / len(curves),
        "spread": max(curve[-1]["loss"] for curve in curves) - min(curve[-1]["loss"] for curve in curves),
    }


def plot(results: dict[str, list[list[dict[str, float]]]], path: str) -> None:
    """Draw MaxVio and loss over the steps; thin lines are single seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, key, label in zip(
        figure.subplots(1, 2),
        ("max_violation", "loss"),
        ("MaxVio of the validation sample", "validation loss"),
        strict=True,
    ):
        for number, (name, curves) in enumerate(results.items()):
            steps = [point["step"] for point in curves[0]]
            values = torch.tensor([[point[key] for point in curve] for curve in curves])
            axes.plot(steps, values.T, color=f"C{number}", linewidth=0.5, alpha=0.5)
            axes.plot(steps, values.mean(0), color=f"C{number}", label=name)
        axes.set_xlabel("optimizer step")
        axes.set_title(label, fontsize=10)
        axes.set_yscale("log")
    figure.axes[0].axhline(0.1, color="black", linewidth=0.8, linestyle="--")
    figure.axes[1].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps, one seed")
    parser.add_argument("--only", nargs="*", help=f"methods: {', '.join(repr(method.name) for method in METHODS)}")
    parser.add_argument("--out", help="write all curves to this JSON file")
    parser.add_argument("--plot", help="draw the curves to this file")
    parser.add_argument("--steps", type=int, help="optimizer steps, for one seed; the last half of them anneals")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    setting = Setting(steps=120, every=20, seeds=1) if arguments.quick else Setting(steps=300, every=25, seeds=2)
    if arguments.steps:
        setting = Setting(steps=arguments.steps, every=max(1, arguments.steps // 40), seeds=1)
    text = default_text()
    results = {}
    print(f"{setting.experts} experts, top {setting.top_k}, {setting.layers} layers, {setting.steps} steps, ", end="")
    print(f"{setting.seeds} seeds; floor {floor(setting, 12 * 64 * 64 * setting.top_k):.3f}\n")
    print("| method | first step with MaxVio < 0.1 | MaxVio at the end | validation loss | spread of seeds |")
    print("|---|---|---|---|---|")
    for method in (method for method in METHODS if not arguments.only or method.name in arguments.only):
        results[method.name] = [train(method, setting, seed, text) for seed in range(setting.seeds)]
        row = summary(results[method.name])
        first = "-" if row["first_below"] is None else f"{row['first_below']:.0f}"
        cells = [method.name, first, *(f"{row[key]:.4f}" for key in ("max_violation", "loss", "spread"))]
        print(f"| {' | '.join(cells)} |", flush=True)
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(results) + "\n")
    if arguments.plot:
        plot(results, arguments.plot)


if __name__ == "__main__":
    main()
