"""What a script changes beside the blocks: their classes, torch's functions and registries, switches of the process."""

import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from skippipe_plugin.engine.errors import SkipPipeError
from tests.e2e.modules import loader
from tests.e2e.support import assert_same_run, train

DATA = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))


class Script(nn.Module):
    factor = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.factor * torch.tanh(self.linear(hidden))


class Model(LightningModule):
    def __init__(self, block: Callable[[], nn.Module], change: Callable[[], object] = lambda: None) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 1)
        self.blocks = nn.ModuleList([block() for _ in range(4)])
        self.change = change

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        hidden = self.embed(batch)
        for block in self.blocks:
            hidden = block(hidden)
        return F.mse_loss(self.head(hidden), batch.sum(1, keepdim=True))

    def on_train_batch_start(self, batch: Tensor, index: int) -> None:
        if index == 1:
            self.change()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(make: Callable[[], LightningModule], devices: int = 3, **options: Any) -> Any:
    pipe = {"num_microbatches": 4, "verbose": False} if devices > 1 else None
    return train(make, loader(DATA), devices, pipe, max_steps=3, **options)


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A library with a block."""
    name = f"their_model_{tmp_path.name.replace('-', '_')}"
    code = """
        import torch
        from torch import nn
        class Base(nn.Module):
            slope = 1.0
            def act(self, x): return torch.tanh(x) * self.slope
        class Their(Base):
            def __init__(self): super().__init__(); self.linear = nn.Linear(8, 8)
            def forward(self, h): return h + self.act(self.linear(h))
    """
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(code))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield __import__(name)
    del sys.modules[name]


PATCHES: dict[str, Callable[[Any], Any]] = {
    "Their.forward": lambda their: setattr(their.Their, "forward", lambda self, h: h + F.relu(self.linear(h))),
    "Base.act": lambda their: setattr(their.Base, "act", lambda self, x: torch.sin(x)),
    "Base.slope": lambda their: setattr(their.Base, "slope", 0.5),
    "Their.extra": lambda their: setattr(their.Their, "extra", 3),
}


@pytest.mark.parametrize("name", PATCHES)
def test_a_class_that_the_script_has_patched_is_refused(theirs: Any, name: str) -> None:
    PATCHES[name](theirs)
    with pytest.raises(SkipPipeError, match=rf"{name} was patched or registered by the script"):
        fit(lambda: Model(theirs.Their))


def test_a_subclass_in_its_place_is_exact_as_the_refusal_says(theirs: Any) -> None:
    class Mine(theirs.Their):  # type: ignore[misc, name-defined]
        def forward(self, h: Tensor) -> Tensor:
            return h + F.relu(self.linear(h))

    assert_same_run(fit(lambda: Model(Mine)), fit(lambda: Model(Mine), 1))


def test_a_function_of_torch_that_is_replaced_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "gelu", lambda x: x)
    with pytest.raises(SkipPipeError, match=r"torch\.nn\.functional\.gelu was patched"):
        fit(lambda: Model(Script))


def test_a_class_of_torch_that_is_patched_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: F.linear(x, self.weight * 2, self.bias))
    with pytest.raises(SkipPipeError, match=r"Linear\.forward was patched"):
        fit(lambda: Model(Script))


def alias() -> None:
    nn.Linear.init_weights = nn.Linear.reset_parameters  # type: ignore[attr-defined]


@pytest.mark.parametrize("when", ["before", "during"])
def test_what_is_added_to_a_class_and_read_by_nobody_changes_nothing(monkeypatch: pytest.MonkeyPatch, when) -> None:
    """Lightning's demos do so when they are imported, to ``nn.MultiheadAttention``."""
    monkeypatch.setattr(nn.Linear, "init_weights", None, raising=False)  # so that it is put back
    del nn.Linear.init_weights
    during = alias if when == "during" else lambda: None
    if when == "before":
        alias()
    assert_same_run(fit(lambda: Model(Script, during)), fit(lambda: Model(Script, during), 1))


def test_what_is_added_to_a_class_and_read_by_the_blocks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Linear, "extra_repr", lambda self: "mine")  # read by nobody's forward, but by Module
    with pytest.raises(SkipPipeError, match=r"Linear\.extra_repr was patched"):
        fit(lambda: Model(Script))


@pytest.mark.parametrize(("name", "value"), [("factor", 0.5), ("forward", lambda self, hidden: hidden * 2)])
def test_a_class_that_changes_during_the_run_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: Any) -> None:
    with pytest.raises(SkipPipeError, match=rf"Script\.{name} was changed on the class"):
        fit(lambda: Model(Script, lambda: monkeypatch.setattr(Script, name, value)))


class Patching(Model):
    """Changes the class that its blocks say they have, in the second batch."""

    def on_train_batch_start(self, batch: Tensor, index: int) -> None:
        if index == 1:
            type(self.blocks[0]).forward = lambda _, hidden: hidden * 2


def test_the_class_that_blocks_say_they_have_is_looked_at_too() -> None:
    with pytest.raises(SkipPipeError, match=r"Script\.forward was changed on the class.*accelerator\.prepare or"):
        fit(lambda: Patching(Script))


# ----------------------------------------------------------- switches


class Anomalous(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        zeros = (self.linear(hidden) * 0.0).abs()
        return hidden + zeros.sqrt() * 0.0


def test_anomalies_are_found_inside_of_the_blocks() -> None:
    for devices in (1, 3):
        with pytest.raises(RuntimeError, match=r"returned nan values in its 0th output"):
            fit(lambda: Model(Anomalous), devices, detect_anomaly=True)


class Looking(nn.Module):
    """Computes what a switch says."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        fast = 2.0 if torch.backends.mha.get_fastpath_enabled() else 1.0
        exact = 1.5 if torch.are_deterministic_algorithms_enabled() else 1.0
        precise = 1.25 if torch.get_float32_matmul_precision() == "high" else 1.0
        return hidden + torch.tanh(self.linear(hidden)) * fast * exact * precise


def test_switches_of_the_process_reach_the_blocks() -> None:
    def switch(*, back: bool) -> None:
        torch.backends.mha.set_fastpath_enabled(back)
        torch.use_deterministic_algorithms(not back)
        torch.set_float32_matmul_precision("highest" if back else "high")

    runs = []
    for devices in (1, 3):
        try:
            runs.append(fit(lambda: Model(Looking, lambda: switch(back=False)), devices))
        finally:
            switch(back=True)
    assert_same_run(runs[1], runs[0])
    assert runs[0].losses != fit(lambda: Model(Looking), 1).losses


class LookingAtKernels(nn.Module):
    """Computes what the switches of kernels say, and with numbers that are no normal ones."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        rough = 2.0 if torch.backends.cuda.matmul.fp32_precision == "tf32" else 1.0
        timed = 1.5 if torch.backends.cudnn.benchmark else 1.0
        first = 1.25 if torch._C._get_sdp_priority_order()[0] == int(SDPBackend.MATH) else 1.0
        scaled = torch.tanh(self.linear(hidden)) * (rough * timed * first)
        return hidden + scaled + scaled.detach() * 1e-40 * 1e30 * 1e10


def test_switches_of_kernels_reach_the_blocks() -> None:
    order = torch._C._get_sdp_priority_order()

    def switch(*, back: bool) -> None:
        torch.backends.cuda.matmul.fp32_precision = "none" if back else "tf32"
        torch.backends.cudnn.benchmark = not back
        torch.set_flush_denormal(not back)
        torch._C._set_sdp_priority_order(order if back else sorted(order))

    runs = []
    for devices in (1, 3):
        try:
            runs.append(fit(lambda: Model(LookingAtKernels, lambda: switch(back=False)), devices))
        finally:
            switch(back=True)
    assert_same_run(runs[1], runs[0])
    assert runs[0].losses != fit(lambda: Model(LookingAtKernels), 1).losses
