"""Models as people have them (tests/zoo), each trained in one process and as a pipeline: what runs how, and how alike.

    python benchmarks/zoo.py                      # two workers, and four that skip a third; about two minutes
    python benchmarks/zoo.py --grid --out zoo.json  # 1, 2 and 4 workers, gpipe and 1f1b, with and without skipping
    python benchmarks/zoo.py --only whisper dpo

"step" says whether the step runs once for each microbatch ("cut"), or once, on the whole batch, of which what enters
the blocks is cut ("once"). "bytes" are those of one microbatch on all links between the driver and two workers: its
hidden states and their gradients, and what goes to the blocks beside them and comes back. "difference" is the largest
in any loss (relative) or weight (absolute), "skipping" the same with a third of the stages skipped, beside one process
that follows the same paths.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from measure import table

from skippipe_plugin.driver.capture.writer import CallWriter
from skippipe_plugin.engine.channel import Channel, Message
from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.partition import PartitionError, find_blocks, other_stacks

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.e2e.support import Run
from tests.zoo.entries import ZOO, Entry
from tests.zoo.running import BATCH, NUM_MICROBATCHES, run, run_skipping

QUICK, SKIPPING = [(2, "1f1b")], [(4, "1f1b")]
GRID = [(workers, schedule) for workers in (1, 2, 4) for schedule in ("gpipe", "1f1b")]
STEPS = 3
_WITH_TENSORS = ("Step", "Calls", "SideGradients", "Tapped", "Pulled")
"""Messages with what goes to blocks beside the hidden states, what single blocks return, and the gradients of both."""


@dataclass(frozen=True)
class Row:
    """What came of one model."""

    model: str
    stack: str = ""
    other_stacks: int = 0
    calls: float = 0.0
    """Of the stack in a step."""
    step: str = ""
    hidden_bytes: int = 0
    beside_bytes: int = 0
    """Of a microbatch."""
    difference: float = 0.0
    skipping: float | None = 0.0
    """None where no stage can be skipped."""
    refused: str = ""

    def cells(self) -> list[str]:
        """Write it down for a person."""
        stack = f"{self.stack} (+{self.other_stacks})" if self.other_stacks else self.stack
        if self.refused:
            return [self.model, stack, "", "", "", "", "refused"]
        size = f"{self.hidden_bytes + self.beside_bytes:,}"
        return [
            self.model,
            stack,
            f"{self.calls:g}",
            self.step,
            f"{size} ({self.beside_bytes:,} beside)" if self.beside_bytes else size,
            f"{self.difference:.0e}",
            "-" if self.skipping is None else f"{self.skipping:.0e}",
        ]


class Bytes(Callback):
    """Counts what all training steps but the first, which also tells the form, send between driver and workers."""

    def __init__(self) -> None:
        self.hidden = self.beside = 0

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, index: int) -> None:
        if index == 1:
            self.hidden = self.beside = 0

    @contextlib.contextmanager
    def counted(self) -> Iterator[Bytes]:
        """Count what the driver announces for all links, and what it sends and gets itself."""
        prepare, put, get = CallWriter.prepare, Channel.send, Channel.receive

        def counting_prepare(writer: CallWriter, *args: Any) -> Any:
            prepared = prepare(writer, *args)
            ways = [way for hop in prepared.call.spec.hops for way in (hop.there, hop.back)]
            self.hidden += sum(spec.num_bytes for way in ways for spec in way if spec is not None)
            return prepared

        def counting_put(channel: Channel, kind: str, fields: Any = None, blobs: Any = (), **options: Any) -> int:
            self._note(kind, blobs)
            return put(channel, kind, fields, blobs, **options)

        def counting_get(channel: Channel) -> Message:
            message = get(channel)
            self._note(message.kind, message.blobs)
            return message

        with (
            patch.object(CallWriter, "prepare", counting_prepare),
            patch.object(Channel, "send", counting_put),
            patch.object(Channel, "receive", counting_get),
        ):
            yield self

    def _note(self, kind: str, blobs: Any) -> None:
        if kind in _WITH_TENSORS:
            self.beside += sum(memoryview(blob).nbytes for blob in blobs)


class Calls(Callback):
    """Counts the calls of the stack in one process."""

    def __init__(self, blocks: str | Sequence[str] | None) -> None:
        self._blocks, self.num = blocks, 0

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        find_blocks(module, self._blocks).blocks[0].register_forward_pre_hook(self._note)

    def _note(self, *_: Any) -> None:
        self.num += 1


class Said(logging.Handler):
    """Keeps what the plugin says of how steps run."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += record.getMessage()


def difference(found: Run, expected: Run) -> float:
    """Return the largest difference of a loss, relative, or of a weight."""
    losses = [abs(a - b) / max(abs(b), 1e-12) for a, b in zip(found.losses, expected.losses, strict=True)]
    weights = [float((found.weights[name] - value).abs().max()) for name, value in expected.weights.items()]
    return max(losses + weights)


def examine(name: str, entry: Entry, layouts: list[tuple[int, str]]) -> Row:
    """Train one model in all ways."""
    module = entry.make()
    try:
        stack = find_blocks(module, entry.blocks)
        row = Row(name, stack.container_name, len(other_stacks(module, stack.blocks)))
        calls, said = Calls(entry.blocks), Said()
        run(entry, 0, calls, samples=STEPS * BATCH)
        logger = logging.getLogger("skippipe_plugin")
        logger.addHandler(said)
        with Bytes().counted() as sent:
            run(entry, 2, sent, samples=STEPS * BATCH)
        logger.removeHandler(said)
        alone = run(entry, 0)
        found = [difference(run(entry, workers, schedule=schedule), alone) for workers, schedule in layouts]
        skipped = [
            difference(*run_skipping(entry, workers, schedule=schedule))
            for workers, schedule in (SKIPPING if layouts is QUICK else layouts)
            if entry.can_skip(workers)
        ]
    except (SkipPipeError, PartitionError) as error:
        return Row(
            name,
            " + ".join([entry.blocks] if isinstance(entry.blocks, str) else entry.blocks or ()),
            refused=str(error),
        )
    microbatches = (STEPS - 1) * NUM_MICROBATCHES
    return Row(
        **{
            **asdict(row),
            "calls": calls.num / STEPS,
            "step": "cut" if module.automatic_optimization and "runs once" not in said.text else "once",
            "hidden_bytes": sent.hidden // microbatches,
            "beside_bytes": sent.beside // microbatches,
            "difference": max(found),
            "skipping": max(skipped, default=None),
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="models, by the names that the table gives them")
    parser.add_argument("--grid", action="store_true", help="1, 2 and 4 workers, gpipe and 1f1b")
    parser.add_argument("--out", help="write the rows to this JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for quiet in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(quiet).setLevel(logging.ERROR)
    chosen = {name: entry for name, entry in ZOO.items() if not arguments.only or name in arguments.only}
    if not chosen:
        sys.exit(f"--only {arguments.only} names no model")
    rows = [examine(name, entry, GRID if arguments.grid else QUICK) for name, entry in chosen.items()]
    header = ["model", "stack (and others)", "calls", "step", "bytes", "difference", "skipping"]
    print(table(header, [row.cells() for row in rows]))
    for row in rows:
        if row.refused:
            print(f"\n{row.model}: {row.refused}")
    if arguments.out:
        Path(arguments.out).write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
