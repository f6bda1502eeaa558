"""How evenly experts are loaded, and at what loss: biases, auxiliary loss, and nothing, on the same text.

python benchmarks/moe_balance.py --quick                                     # under two minutes
python benchmarks/moe_balance.py --out balance.json --plot balance.png       # about eight minutes on one core
python benchmarks/moe_balance.py --long --plot long.png                      # about seven minutes on one core

The byte-level mixture of experts of `examples/byte_moe.py` learns Python's language reference, in one process. The
text's bytes are skewed, and so are the routers. Two measures of the paper (arXiv 2408.15664, section 4.1), both means
over layers: MaxVio of the loads of the whole validation sample (MaxVio_global), which chance alone leaves at `floor`,
and the mean MaxVio of single training batches (MaxVio_batch), which it leaves at `batch floor`.

`--long` has the paper's learning rate, rate of the bias and coefficient of the auxiliary loss, and more steps.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from skippipe_plugin.moe import BIAS_RULES, Attached, MoEConfig, RouterStatistics, attach, max_violation

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from byte_lm import ByteDataset, default_text
from byte_moe import ByteMoE

CONTEXT = 64
SAMPLE = 12
"""Batches of 64 windows of the validation sample."""


@dataclass(frozen=True)
class Method:
    """A way to balance: a rule for the biases with its rate, an auxiliary loss, or neither."""

    name: str
    rule: str = ""
    rate: float = 0.0
    auxiliary_loss: float = 0.0


SHORT = (
    Method("nothing"),
    Method("auxiliary loss 0.01", auxiliary_loss=0.01),
    Method("bias, sign 0.001", "sign", 1e-3),
    Method("bias, sign 0.01", "sign", 1e-2),
    Method("bias, proportional 0.01", "proportional", 1e-2),
    Method("bias, quantile", "quantile"),
)
LONG = (
    Method("auxiliary loss 0.001", auxiliary_loss=1e-3),
    Method("auxiliary loss 0.01", auxiliary_loss=1e-2),
    Method("bias, sign 0.001", "sign", 1e-3),
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
    return loss, mean(violations)


def take(hooks: Attached) -> dict[str, RouterStatistics]:
    return {name: hook.take() for name, hook in hooks.hooks.items()}


def update(hooks: Attached, method: Method) -> float:
    """Move every bias by the loads of the step; return their MaxVio."""
    taken = take(hooks)
    for name, statistics in taken.items():
        router, hook = hooks.routers[name], hooks.hooks[name]
        if statistics.quantiles is not None:
            hook.set_bias(router, statistics.quantiles / statistics.num_tokens)
        elif method.rule:
            bias = hook.bias(router)
            assert bias is not None
            hook.set_bias(router, BIAS_RULES[method.rule](bias, statistics.loads, method.rate))
    return mean([max_violation(each.loads) for each in taken.values()])


def train(method: Method, setting: Setting, seed: int, text: bytes) -> list[dict[str, float]]:
    """Train from the same start on the same batches; return the curve."""
    torch.manual_seed(seed)
    model = ByteMoE(setting.width, setting.layers, CONTEXT, num_experts=setting.experts, top_k=setting.top_k)
    hooks = attach(model, MoEConfig(auxiliary_loss=method.auxiliary_loss, quantiles=method.rule == "quantile"))
    data = ByteDataset(text, CONTEXT)
    windows = torch.stack([data[index] for index in range(len(data))])
    held_out = torch.arange(len(windows)) % 10 == 0  # all over the text: balance is asked for on the same mixture
    sample = list(windows[held_out].split(64)[:SAMPLE])
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.lr, betas=(0.9, 0.95))
    curve, batch_violations = [], list[float]()
    for step, batch in zip(range(setting.steps + 1), batches(windows[~held_out], setting, seed), strict=False):
        if step % setting.every == 0:
            loss, violation = validate(model, hooks, sample)
            batch_violation = mean(batch_violations[-setting.every :]) if batch_violations else float("nan")
            curve.append({"step": step, "loss": loss, "max_violation": violation, "batch_violation": batch_violation})
        for group in optimizer.param_groups:
            group["lr"] = setting.lr * min(1.0, (step + 1) / 50, 2 * (1 - step / (setting.steps + 1)))
        optimizer.zero_grad()
        model.loss(batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        batch_violations.append(update(hooks, method))
    return curve


def floor(setting: Setting, windows: int) -> float:
    """Return the MaxVio that perfectly even chances leave on a sample of that many windows."""
    visits = windows * CONTEXT * setting.top_k
    draws = torch.distributions.Multinomial(visits, torch.ones(setting.experts)).sample((200,))
    return float(torch.tensor([max_violation(draw) for draw in draws]).mean())


def summary(curves: list[list[dict[str, float]]]) -> dict[str, float | None]:
    """Return means over seeds: the first step with MaxVio_global below 0.1, both at the end, and the last loss."""
    violations = [mean([point["max_violation"] for point in points]) for points in zip(*curves, strict=True)]
    reached = [point["step"] for point, value in zip(curves[0], violations, strict=True) if value < 0.1]
    return {
        "first_below": reached[0] if reached else None,
        "max_violation": violations[-1],
        "batch_violation": mean([curve[-1]["batch_violation"] for curve in curves]),
        "loss": mean([curve[-1]["loss"] for curve in curves]),
        "spread": max(curve[-1]["loss"] for curve in curves) - min(curve[-1]["loss"] for curve in curves),
    }


def plot(results: dict[str, list[list[dict[str, float]]]], path: str) -> None:
    """Draw MaxVio and loss over the steps; thin lines are single seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, key, label in zip(
        figure.subplots(1, 2),
        ("max_violation", "loss"),
        ("MaxVio_global", "validation loss"),
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
    parser.add_argument("--long", action="store_true", help="the paper's rates, more steps, one seed")
    parser.add_argument("--only", nargs="*", help="methods, by the names that the table gives them")
    parser.add_argument("--out", help="write all curves to this JSON file")
    parser.add_argument("--plot", help="draw the curves to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    setting = Setting(steps=300, every=25, seeds=2)
    if arguments.long:
        setting = Setting(steps=1500, every=50, seeds=1, layers=2, lr=1e-3)
    if arguments.quick:
        setting = replace(setting, steps=120, every=20, seeds=1)
    methods = [
        method for method in (LONG if arguments.long else SHORT) if not arguments.only or method.name in arguments.only
    ]
    if not methods:
        sys.exit(f"--only {arguments.only} names no method")
    text = default_text()
    results = {}
    print(f"{setting.experts} experts, top {setting.top_k}, {setting.layers} layers, {setting.steps} steps, ", end="")
    print(f"learning rate {setting.lr}, {setting.seeds} seeds; floor {floor(setting, SAMPLE * 64):.3f}, ", end="")
    print(f"batch floor {floor(setting, setting.batch):.3f}\n")
    print("| method | first step with MaxVio_global < 0.1 | MaxVio_global | MaxVio_batch | validation loss | spread |")
    print("|---|---|---|---|---|---|")
    for method in methods:
        results[method.name] = [train(method, setting, seed, text) for seed in range(setting.seeds)]
        row = summary(results[method.name])
        first = "-" if row["first_below"] is None else f"{row['first_below']:.0f}"
        cells = [
            method.name,
            first,
            *(f"{row[key]:.4f}" for key in ("max_violation", "batch_violation", "loss", "spread")),
        ]
        print(f"| {' | '.join(cells)} |", flush=True)
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(results) + "\n")
    if arguments.plot:
        plot(results, arguments.plot)


if __name__ == "__main__":
    main()
