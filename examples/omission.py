"""Leave stages out of a trained model: does training with skipped stages make it bear that better?

SkipPipe (arXiv 2502.19913) reports that a model trained with partial paths loses only 7% in perplexity when half of
its stages are left out. This trains the byte-level model of `byte_lm.py` on the same batches with and without skipping,
leaves stages out, and draws the validation loss against the share of stages kept.

python examples/omission.py                   # trains three models of six stages, about five minutes on two cores
python examples/omission.py --skip-ratio 0.25 --steps 1200
"""

import argparse
import math
import random
from itertools import combinations, cycle
from statistics import mean, median

import torch
from byte_lm import ByteData, ByteLM
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor

from skippipe_plugin.omit import NamedStack, find_stack, stage_blocks, without_blocks
from skippipe_plugin.strategies import SkipPipeStrategy

LOOKS = (("#8c510a", "s"), ("#01665e", "o"), ("#5e3c99", "^"))
Losses = dict[int, list[float]]
"""By number of stages kept: the loss of each choice of stages."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=6, help="one worker process for each")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=96, help="a multiple of 32")
    parser.add_argument("--skip-ratio", type=float, nargs="+", default=[0.33, 0.5], help="a model for each")
    parser.add_argument("--steps", type=int, default=800, help="optimizer steps of each model")
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--num-microbatches", type=int, default=12, help="each has its own path")
    parser.add_argument("--choices", type=int, default=10, help="choices of stages for each number left out, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="omission.png", help="the picture, .png or .svg")
    return parser.parse_args()


def trained(arguments: argparse.Namespace, skip_ratio: float) -> ByteLM:
    """Train as any user would; only the skip ratio differs between the models."""
    seed_everything(arguments.seed, verbose=False)
    model = ByteLM(width=arguments.width, num_layers=arguments.layers)
    trainer = Trainer(
        accelerator="cpu",
        devices=1 + arguments.stages,
        strategy=SkipPipeStrategy(skip_ratio=skip_ratio, num_microbatches=arguments.num_microbatches),
        max_steps=arguments.steps,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(model, ByteData(context=model.context, batch_size=arguments.batch_size))
    return model.eval()


def choices_of(num_stages: int, limit: int, seed: int) -> dict[int, list[tuple[int, ...]]]:
    """Choose, for each number of stages kept, which ones; all models leave out the same."""
    chance = random.Random(seed)
    every = {kept: list(combinations(range(num_stages), kept)) for kept in range(1, num_stages + 1)}
    return {kept: chance.sample(choices, min(limit, len(choices))) for kept, choices in every.items()}


@torch.no_grad()
def losses_without(model: ByteLM, num_stages: int, choices: dict[int, list[tuple[int, ...]]]) -> Losses:
    """Return the validation losses of smaller, ordinary models: those that `skippipe export` writes."""
    data = ByteData(context=model.context, batch_size=128)
    data.setup("validate")
    batches = list(data.val_dataloader())
    stack = find_stack(model.state_dict())
    stages = stage_blocks(stack, num_stages)
    return {
        kept: [loss_of(model, stack, [b for stage in choice for b in stages[stage]], batches) for choice in picked]
        for kept, picked in choices.items()
    }


def loss_of(model: ByteLM, stack: NamedStack, blocks: list[int], batches: list[Tensor]) -> float:
    skipped = set(range(len(stack))) - set(blocks)
    state = without_blocks(model.state_dict(), stack, skipped) if skipped else model.state_dict()
    smaller = ByteLM(**{**model.hparams, "num_layers": len(blocks)}).eval()
    smaller.load_state_dict(state)
    return mean(smaller.loss(batch).item() for batch in batches)


def table(runs: dict[str, Losses], num_stages: int) -> str:
    """Format mean and median of the losses of each model, and what its perplexity is to that with all stages."""
    lines = ["".join([" " * 22, *(f"{name:>36}" for name in runs)])]
    lines += [
        "".join([f"{'stages kept':>13} {'choices':>8}", *(f"{'mean':>12} {'median':>12} {'':>10}" for _ in runs)])
    ]
    for kept in range(num_stages, 0, -1):
        line = f"{f'{kept} of {num_stages}':>13} {len(next(iter(runs.values()))[kept]):>8}"
        for losses in runs.values():
            whole = losses[num_stages][0]
            for loss in (mean(losses[kept]), median(losses[kept])):
                line += f"{loss:>8.3f} {f'(x{math.exp(loss - whole):.2f})':>9}"
        lines.append(line)
    return "\n".join(lines)


def alone(losses: Losses, choices: dict[int, list[tuple[int, ...]]], num_stages: int) -> str:
    """List the losses with a single stage left out."""
    found = {
        (set(range(num_stages)) - set(choice)).pop(): loss
        for choice, loss in zip(choices[num_stages - 1], losses[num_stages - 1], strict=True)
    }
    return ", ".join(f"{stage + 1}: {loss:.3f}" for stage, loss in sorted(found.items()))


def draw(runs: dict[str, Losses], num_stages: int, path: str) -> None:
    """Draw the median over the choices as a line, each choice as a dot."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(7.6, 4.4), layout="constrained")
    axes = figure.add_subplot()
    for index, ((name, losses), (color, marker)) in enumerate(zip(runs.items(), cycle(LOOKS))):
        shift = 0.012 * (index - (len(runs) - 1) / 2)
        shares = [kept / num_stages - shift for kept in losses]
        axes.plot(shares, [median(losses[kept]) for kept in losses], color=color, marker=marker, label=name)
        for share, values in zip(shares, losses.values(), strict=True):
            axes.scatter([share] * len(values), values, color=color, marker=marker, s=12, alpha=0.4, linewidths=0)
    axes.invert_xaxis()
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xticks([kept / num_stages for kept in range(1, num_stages + 1)])
    axes.set_xlabel("share of the stages kept, in their order (small: each choice, line: the median choice)")
    axes.set_ylabel("validation loss (nats per byte)")
    axes.grid(axis="y", color="#dddddd")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, loc="upper left")
    figure.savefig(path, dpi=90)


def main() -> None:
    arguments = parse_arguments()
    choices = choices_of(arguments.stages, arguments.choices, arguments.seed)
    runs: dict[str, Losses] = {}
    for ratio in (0.0, *arguments.skip_ratio):
        name = f"trained skipping {ratio:.0%}" if ratio else "trained exactly"
        runs[name] = losses_without(trained(arguments, ratio), arguments.stages, choices)
    print("\nvalidation loss (nats per byte; in brackets: the perplexity, as a multiple of that with all stages)\n")
    print(table(runs, arguments.stages))
    print("\nwith one stage left out, by stage")
    for name, losses in runs.items():
        print(f"  {name}: {alone(losses, choices, arguments.stages)}")
    draw(runs, arguments.stages, arguments.output)
    print(f"\npicture: {arguments.output}")


if __name__ == "__main__":
    main()
