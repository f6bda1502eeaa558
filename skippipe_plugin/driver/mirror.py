"""What the driver itself holds, copied to two workers, so that another driver can go on where this one died.

Three records: ``base`` (what is not trained), ``tensors`` (the parameters that are, with their optimizer state, as of
the last optimizer step) and ``progress`` (everything else, as of the last whole batch). An optimizer step is
committed in three rounds: every worker says that its gradients are complete; the driver, which has stepped, stores
``tensors``; then the workers are told to step. So after a death either nobody has stepped, or all survivors can.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..engine.control.codec import Control
from ..engine.control.commands import StepOptimizer
from ..engine.control.keeping import Kept, Prepare, Settle, Store, Stored
from ..engine.control.values import Record, Stand, StepOrder
from ..engine.handover import pack_object
from .capture.remote import is_remote
from .links import Link, Links

_A = TypeVar("_A", bound=Control)
_SAMPLES: Final = 1024


class LocalState(Protocol):
    """The optimizer's state for what lives on the driver; :class:`skippipe_plugin.driver.optimizer.RemoteOptimizer`."""

    def local_state_dict(self) -> dict[str, Any]:
        """Return its ``state_dict`` without the state of remote parameters."""

    def numbers(self) -> Mapping[Any, int]:
        """Return the numbers that remote parameters have in the whole ``state_dict``."""


class DriverState:
    """Parameters and buffers that live on the driver, and the optimizer's state for them.

    Args:
        model: The whole model.
        optimizer: The driver's optimizer, extended to the workers.
    """

    def __init__(self, model: nn.Module, optimizer: LocalState) -> None:
        self._model = model
        self._optimizer = optimizer
        self._prints: dict[str, Any] = {}

    def names(self) -> set[str]:
        """Name the parameters and buffers that live here, shared ones under each of their names."""
        return {name for name, _ in self._local()}

    def trained(self) -> dict[str, Any]:
        """Return the parameters that are trained, and the optimizer's state."""
        parameters = {name: tensor for name, tensor in self._local() if tensor.requires_grad}
        state = self._optimizer.local_state_dict()["state"]
        return {"parameters": parameters, "optimizer": state, "numbers": self._optimizer.numbers()}

    def others(self) -> Mapping[str, Tensor]:
        """Return the other parameters, and the buffers."""
        return {name: tensor for name, tensor in self._local() if not tensor.requires_grad}

    def remember_others(self) -> None:
        """Let :meth:`changed` compare with what :meth:`others` are now."""
        self._prints = {name: _fingerprint(tensor) for name, tensor in self.others().items()}

    def changed(self) -> Mapping[str, Tensor]:
        """Return which :meth:`others` have changed since they were remembered: steps count, user code may average."""
        prints = self._prints
        return {name: tensor for name, tensor in self.others().items() if prints.get(name) != _fingerprint(tensor)}

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite some of what is not trained."""
        with torch.no_grad():
            for name, tensor in self._local():
                value = tensors.get(name)
                if value is not None and value.shape == tensor.shape:
                    tensor.copy_(value)

    def _local(self) -> list[tuple[str, Tensor]]:
        parameters = self._model.named_parameters(remove_duplicate=False)
        named = [*parameters, *self._model.named_buffers(remove_duplicate=False)]
        return [(name, tensor) for name, tensor in named if not (tensor.is_meta or is_remote(tensor))]


def _fingerprint(tensor: Tensor) -> tuple[Any, ...]:
    """Tell whether a tensor has changed; a sample sees what was written past autograd's count of versions."""
    flat = tensor.detach().reshape(-1)
    sample = flat[:: max(1, flat.numel() // _SAMPLES)]
    return tensor.data_ptr(), tensor._version, sample.to(torch.float64).cpu().numpy().tobytes()


class DriverMirror:
    """Stores the records of one fit on two workers; see :meth:`skippipe_plugin.driver.links.Links.keepers`.

    Args:
        links: To all workers.
        state: What the driver holds.
        outcome: Returns what the batch has led to beside an optimizer step. It is kept until the batch is over, which
            then need not run again.
        fit: The number of the fit in the process, from 1.
        step: The number of optimizer steps that are committed.
    """

    def __init__(self, links: Links, state: DriverState, outcome: Callable[[], Any], fit: int, step: int) -> None:
        self.state = state
        self._outcome = outcome
        self._links = links
        self._fit = fit
        self._step = step
        self._base: Mapping[str, Any] = {}

    @property
    def stand(self) -> Stand:
        """The last optimizer step that is committed."""
        return Stand(self._fit, self._step)

    @property
    def started(self) -> bool:
        """Whether the workers have everything."""
        return bool(self._base)

    def start(self, base: Mapping[str, Any], progress: Mapping[str, Any], pending: Any = None) -> None:
        """Store everything, and let the workers forget what they have retained for this driver.

        Args:
            base: What never changes.
            progress: See :meth:`note`.
            pending: The outcome of the last optimizer step's batch, if that is not over.
        """
        self._base = base
        self.state.remember_others()
        self._store("base", {"others": self.state.others(), **base})
        self._store("tensors", {**self.state.trained(), "outcome": pending})
        noted = self._step if pending is None else self._step - 1
        self._store("progress", {"changed": {}, **progress}, step=noted)
        self._ask_all(Settle(self.stand))

    def note(self, progress: Mapping[str, Any]) -> None:
        """Store what the next driver has to know at the end of a batch; it survives when :meth:`commit` returns."""
        self._store("progress", {"changed": self.state.changed(), **progress}, quiet=True)

    def commit(self, order: StepOrder, hyperparameters: bytes) -> None:
        """Let every worker step its optimizer, such that all or none of them do, also when this driver dies."""
        self._step += 1
        order = replace(order, step=self._step)
        self._ask_all(Prepare(self.stand))
        record = {**self.state.trained(), "outcome": self._outcome(), "hyperparameters": hyperparameters}
        self._store("tensors", record, order=order)
        self._links.broadcast(StepOptimizer(order, hyperparameters))

    def finish(self, result: Any) -> None:
        """Store what the fit ends with, on one worker, for as long as that one lives."""
        holders = self._links.keepers()
        self._store(f"result{self._fit}", result, holders=holders[self._fit % len(holders) :][:1], lasting=True)

    def _store(
        self,
        name: str,
        value: Any,  # Any: whatever can be pickled
        *,
        holders: list[Link] | None = None,
        step: int | None = None,
        lasting: bool = False,
        quiet: bool = False,
        order: StepOrder | None = None,
    ) -> None:
        entries, blobs = pack_object(value)
        record = Record(name, self._fit, self._step if step is None else step, lasting, entries, order)
        holders = self._links.keepers() if holders is None else holders
        sent = [(link, self._send(link, Store(record, quiet, blobs))) for link in holders]
        if quiet:
            return
        answers = [(link, self._answer(link, Stored, to)) for link, to in sent]
        lacking = [link for link, stored in answers if stored is not None and "base" not in stored.records]
        # Workers that took over lack it; changes still count from the start for them, as for the others.
        if lacking and name == "tensors":
            self._store("base", {"others": self.state.others(), **self._base}, holders=lacking)

    def _ask_all(self, question: Control) -> None:
        for link, number in [(link, self._send(link, question)) for link in self._links]:
            self._answer(link, Kept, number)

    def _send(self, link: Link, body: Control) -> int:
        """Send a message, and return its number."""
        return link.tell(body) if self._links.recovering else link.send(body)

    def _answer(self, link: Link, kind: type[_A], to: int) -> _A | None:
        return link.expect_or_lose(kind, to) if self._links.recovering else link.expect(kind, to)
