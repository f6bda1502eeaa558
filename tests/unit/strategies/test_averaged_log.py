"""What a cut step logs is what the whole batch would have logged, where microbatches are of unequal sizes."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skippipe_plugin.driver.capture.batches import split
from skippipe_plugin.driver.capture.suspend import StepThread, new_step_thread
from skippipe_plugin.engine.call import Ambient
from skippipe_plugin.model.counting import Samples, View, candidates
from skippipe_plugin.model.reductions import MISSING, find_plan, merge
from skippipe_plugin.model.trials import Results as Found
from skippipe_plugin.strategies.averaged_log import AveragedLog, noted, noted_log

SIZES = (5, 1, 2)
LABELS = torch.tensor([1, -100, 1, 1, -100, -100, 1, 1])
VALUES = torch.tensor([3.0, -1.0, 4.0, 1.0, -5.0, 9.0, 2.0, 6.5], dtype=torch.float64)
EXPECTED: dict[str, Any] = {
    "mean": 19.5 / 8,
    "number": 19.5 / 8,
    "over_labels": (3.0 + 4.0 + 1.0 + 2.0 + 6.5) / 5,
    "sum": 19.5,
    "largest": 9.0,
    "samples": 8,
}
"""By name: what one process logs, reckoned by hand."""


class Results:
    """Notes what reaches Lightning."""

    def __init__(self) -> None:
        self.logged: dict[str, tuple[Any, dict[str, Any]]] = {}

    def log(self, fx: str, name: str, value: Any, **options: Any) -> None:
        assert fx == "training_step"
        assert name not in self.logged, "logged twice"
        self.logged[name] = value, options


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trainer = SimpleNamespace(_results=Results())

    @property
    def logged(self) -> dict[str, tuple[Any, dict[str, Any]]]:
        return self.trainer._results.logged  # type: ignore[no-any-return]

    def log(self, name: str, value: Any, prog_bar: bool = False, **options: Any) -> None:
        self.trainer._results.log("training_step", name, value, prog_bar=prog_bar, **options)


def step(module: Any, batch: dict[str, Tensor]) -> None:
    x = batch["x"]
    module.log("mean", x.mean(), on_epoch=True, batch_size=len(x))
    module.log("number", x.mean().item())
    module.log("over_labels", x[batch["y"] != -100].mean() if (batch["y"] != -100).any() else x.sum() * float("nan"))
    module.log("sum", x.sum(), True, reduce_fx="sum")
    module.log("largest", x.max(), reduce_fx="max")
    module.log("samples", len(x), reduce_fx="sum")


def run_in(thread: StepThread, function: Any) -> None:
    thread.start(function, Ambient.current(("cpu",)))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)], ids=["in order", "in another order"])
def test_microbatches_count_by_their_samples(order: tuple[int, ...]) -> None:
    batch, module = {"x": VALUES, "y": LABELS}, Module()
    view = View(batch, split(batch, list(SIZES)), list(SIZES))
    log = AveragedLog(module, len(SIZES))  # type: ignore[arg-type]
    with log.installed():
        for index in order:
            thread = new_step_thread()
            run_in(thread, log.within(index, lambda piece=view.pieces[index]: step(module, piece)))
            thread.close()
    assert not module.logged, "logged before the step was over"

    def merged(key: Any, parts: list[Any]) -> Any:
        weightings = [Samples(), *(each for each in candidates(view, ()) if not view.is_plain(each))]
        return merge(find_plan(whole_results(module, batch)[key], parts, view, weightings), parts, view)

    log.replay(merged)
    found = {name: float(value) for name, (value, _) in module.logged.items()}
    assert found == pytest.approx(EXPECTED, rel=1e-12)
    assert list(found) == list(EXPECTED)
    assert module.logged["mean"][1] == {"prog_bar": False, "on_epoch": True, "batch_size": 8}
    assert module.logged["sum"][1] == {"prog_bar": True, "reduce_fx": "sum"}


def whole_results(module: Module, batch: dict[str, Tensor]) -> Found:
    with noted_log(module), noted() as logged:  # type: ignore[arg-type]
        step(module, batch)
        return logged()


def test_a_name_that_some_microbatches_do_not_log_is_merged_from_the_others() -> None:
    module, seen = Module(), []
    log = AveragedLog(module, 3)  # type: ignore[arg-type]
    with log.installed():
        for index in (0, 2):
            thread = new_step_thread()
            run_in(thread, log.within(index, lambda index=index: module.log("some", float(index))))
            thread.close()

    def merged(key: Any, parts: list[Any]) -> Any:
        seen.append((key, parts))
        return 7.0

    log.replay(merged)
    assert seen == [(("log", "some", 0), [0.0, MISSING, 2.0])]
    assert module.logged == {"some": (7.0, {"prog_bar": False})}
