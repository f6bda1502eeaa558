"""A model whose blocks are spread, as loops see it: called, saved, loaded and zeroed like any other.

The object stays the user's own. Its ``forward`` is replaced on the instance, as accelerate does for mixed precision;
what is saved and loaded is what its tensors are.
"""

from __future__ import annotations

from torch import nn

from ..driver.capture.ordinary import StandIn
from .calls import ModelCalls
from .spread import SpreadModel


class WholeModel:
    """Makes ``model`` look whole while its blocks are spread, until :meth:`remove`.

    Args:
        model: What the loop calls; a compiled model, for instance.
        root: What it is underneath, where names are those of one process.
        spread: Its blocks.
        calls: What answers its calls.
    """

    def __init__(self, model: nn.Module, root: nn.Module, spread: SpreadModel, calls: ModelCalls) -> None:
        self._model = model
        self._spread = spread
        self._had = {name: model.__dict__[name] for name in ("forward", "zero_grad") if name in model.__dict__}
        self._zero_local = model.zero_grad
        self._forward = StandIn(model, "forward", calls)
        self._handles = [
            root.register_state_dict_pre_hook(lambda *_: calls.open_step.settle("state_dict()")),  # type: ignore[no-untyped-call]
            root.register_load_state_dict_pre_hook(lambda *_: calls.open_step.settle("load_state_dict()")),  # type: ignore[no-untyped-call]
        ]
        self._zero_grad = StandIn(model, "zero_grad", self._zero)
        model.__dict__ |= {"forward": self._forward, "zero_grad": self._zero_grad}

    def remove(self) -> None:
        """Let the model be what it was."""
        for handle in self._handles:
            handle.remove()
        ours = {"forward": self._forward, "zero_grad": self._zero_grad}
        for name, function in ours.items():
            if self._model.__dict__.get(name) == function:  # whoever has replaced it since has a reason
                del self._model.__dict__[name]
                if name in self._had:
                    self._model.__dict__[name] = self._had[name]
        del self._forward, self._zero_grad  # they refer to this object, and it to the model

    def _zero(self, set_to_none: bool = True) -> None:
        with self._spread.pipeline.gradients.copies.unseen():
            self._zero_local(set_to_none)
        self._spread.pipeline.gradients.zero(set_to_none)
