"""Lightning's own checkpoint of a running fit, without the tensors that are kept elsewhere, and what it leaves out.

What it leaves out: the random states (see :mod:`.replay`), the counts of torchmetrics, and what was logged in the epoch
so far.
"""

from __future__ import annotations

import enum
import io
import pickle
from collections.abc import Collection, Mapping
from types import MethodType
from typing import Any

import cloudpickle
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch import Trainer
from torchmetrics import Metric

from ..driver.capture.remote import is_remote, unread
from ..driver.capture.rewind import metric_states, set_metric_states
from ..driver.recovery.recall import Recalled
from ..engine.wire import tensor_key


class Held(enum.Enum):
    """Stands in a snapshot's ``state_dict`` for a tensor that another record has."""

    BY_WORKERS = 0
    BY_DRIVER = 1


def snapshot(trainer: Trainer, parameters: Collection[str], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what ``trainer.save_checkpoint`` would write, with :class:`Held` in the place of most tensors.

    Args:
        trainer: In a fit, between two batches or after the last one.
        parameters: The names of the parameters and buffers that live on the driver.
        groups: The optimizer's, as in its ``state_dict``.
    """
    strategy = trainer.strategy
    strategy.__dict__["lightning_module_state_dict"] = trainer.lightning_module.state_dict
    strategy.__dict__["optimizer_state"] = lambda _: {"state": {}, "param_groups": groups}
    try:
        with unread(trainer.lightning_module):
            checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    finally:
        del strategy.__dict__["lightning_module_state_dict"], strategy.__dict__["optimizer_state"]
    checkpoint["state_dict"] = {name: _held(name, v, parameters) for name, v in checkpoint["state_dict"].items()}
    return checkpoint


def _held(name: str, value: Any, parameters: Collection[str]) -> Any:
    if is_remote(value):
        return Held.BY_WORKERS
    return Held.BY_DRIVER if name in parameters else value


def whole_checkpoint(recalled: Recalled) -> dict[str, Any]:
    """Put the checkpoint of one process together from what was found."""
    checkpoint: dict[str, Any] = recalled.progress["checkpoint"]
    names: Mapping[int, str] = recalled.base["blocks"]
    remote = {}
    for key, tensor in recalled.weights.items():
        block, name = tensor_key(key)
        remote[f"{names[block]}.{name}"] = tensor
    local = {**recalled.base["others"], **recalled.progress["changed"], **recalled.tensors["parameters"]}
    where = {Held.BY_WORKERS: remote, Held.BY_DRIVER: local}
    checkpoint["state_dict"] = {
        name: where[value][name].detach() if isinstance(value, Held) else value
        for name, value in checkpoint["state_dict"].items()
    }
    numbers = recalled.tensors["numbers"]
    state = {
        **recalled.tensors["optimizer"],
        **{numbers[key]: dict(value) for key, value in recalled.optimizer.items()},
    }
    for optimizer in checkpoint["optimizer_states"]:
        optimizer["state"] = dict(sorted(state.items()))
    return checkpoint


# ------------------------------------------------------------- what is logged


def logged(trainer: Trainer) -> dict[str, Any]:
    """Return metrics, and what was logged in the epoch so far."""
    connector = trainer._logger_connector
    module = trainer.lightning_module
    buffer = io.BytesIO()
    results = trainer.fit_loop.epoch_loop._results
    batch, results.batch = results.batch, None
    _ResultPickler(buffer, trainer).dump(results)
    results.batch = batch
    return {
        "results": buffer.getvalue(),
        "callback": dict(connector._callback_metrics),
        "logged": dict(connector._logged_metrics),
        "metrics": metric_states(module),
        "should_stop": trainer.should_stop,
        "position": (connector._first_loop_iter, connector._current_fx),  # the first batch's logs begin the means anew
    }


def set_logged(trainer: Trainer, state: Mapping[str, Any]) -> None:
    """Bring back what :func:`logged` returned."""
    connector = trainer._logger_connector
    set_metric_states(trainer.lightning_module, state["metrics"])
    results = _ResultUnpickler(io.BytesIO(state["results"]), trainer).load()
    results.batch = trainer.fit_loop.epoch_loop._results.batch
    trainer.fit_loop.epoch_loop._results = results
    device = trainer.strategy.root_device  # where Lightning has them; they come to the host on their way
    connector._callback_metrics.update(move_data_to_device(state["callback"], device))
    connector._logged_metrics.update(move_data_to_device(state["logged"], device))
    connector._first_loop_iter, connector._current_fx = state["position"]
    trainer.should_stop = state["should_stop"]


class _ResultPickler(cloudpickle.Pickler):  # type: ignore[misc, unused-ignore]
    """Refers to the module's own metrics, and to the strategy, by name."""

    def __init__(self, file: io.BytesIO, trainer: Trainer) -> None:
        super().__init__(file)
        self._reduce = trainer.strategy.reduce
        self._metrics = {id(m): name for name, m in trainer.lightning_module.named_modules() if isinstance(m, Metric)}

    def persistent_id(self, obj: object) -> object:
        if isinstance(obj, Metric) and id(obj) in self._metrics:
            return self._metrics[id(obj)]
        return ("reduce",) if isinstance(obj, MethodType) and obj == self._reduce else None


class _ResultUnpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, trainer: Trainer) -> None:
        super().__init__(file)
        self._trainer = trainer

    def persistent_load(self, pid: Any) -> Any:  # Any: what persistent_id returned, and what it stands for
        return (
            self._trainer.strategy.reduce if pid == ("reduce",) else self._trainer.lightning_module.get_submodule(pid)
        )
