"""Two drivers train on workers of this host while the first one lets a fault happen: ``faulty.py NAME OUTPUT``.

Each driver writes how it ended to ``OUTPUT-RANK``.
"""

import functools
import sys
from pathlib import Path
from typing import Any, Final

from lightning.pytorch import Trainer, seed_everything

from skippipe_plugin.engine.transport import Transport
from skippipe_plugin.model import spread
from skippipe_plugin.strategies import SkipPipeStrategy
from skippipe_plugin.testing import At, Cut, Fault, Injector, Kill, Phase, Reset, Stop
from tests.processes.script import Model, loader

MOMENT: Final = At(Phase.TRAINING, step=2, action="0F1")
FAULTS: Final[dict[str, list[Fault]]] = {
    "cut": [Cut(MOMENT, (2, 3), connections="data")],
    "cut from the driver": [Cut(MOMENT, (0, 2), connections="data")],
    "commands cut": [Cut(MOMENT, (0, 2), connections="control")],
    "reset": [Reset(MOMENT, (2, 3))],
    "stopped": [Stop(MOMENT, 3)],
    "killed": [Kill(MOMENT, 3)],
    "lost": [],
    "nothing": [],
}
NTH: Final = 9
"""Which of the first driver's messages is lost."""


class Forgetful:
    """Forgets one message, as gloo may where a connection breaks."""

    def __init__(self) -> None:
        self.count, self.usual = 0, Transport._post

    def __call__(self, transport: Transport, destination: int, tag: int, data: Any) -> None:
        self.count += 1
        if self.count != NTH:
            self.usual(transport, destination, tag, data)
        else:
            transport._traffic.send(destination, tag)

    def __get__(self, transport: Any, _: Any = None) -> Any:
        return functools.partial(self, transport)


def main() -> None:
    name, output = sys.argv[1:]
    spread._SILENT_S = 6.0  # type: ignore[misc]
    seed_everything(1, verbose=False)
    strategy = SkipPipeStrategy(num_microbatches=4, drivers=2, verbose=False)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", devices=4, strategy=strategy, max_steps=5, **quiet)  # type: ignore[arg-type]
    leads = trainer.global_rank == 0
    if leads and name == "lost":
        Transport._post = Forgetful()  # type: ignore[method-assign, assignment]
    said = "done"
    with Injector(*(FAULTS[name] if leads else ())) as injector:
        try:
            trainer.fit(Model(), loader(96))
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
            raise
        finally:
            assert not leads or not injector.pending
            Path(f"{output}-{trainer.global_rank}").write_text(said)


if __name__ == "__main__":
    main()
