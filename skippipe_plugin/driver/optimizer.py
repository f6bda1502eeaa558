"""The remote part of the driver's optimizer: built from its groups, stepped with it, saved and loaded with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cloudpickle
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..engine import gradients
from ..engine.optimizer import OptimizerPlan, ParameterKey, local_hyperparameters
from ..engine.wire import decode_optimizer_state, encode_optimizer_state
from .pipeline import Pipeline


class RemoteOptimizer:
    """Extends ``optimizer`` to the workers: they step their parameters whenever it steps."""

    def __init__(self, pipeline: Pipeline, optimizer: Optimizer) -> None:
        self._pipeline = pipeline
        self._optimizer = optimizer
        self._keys = pipeline.remote.parameters()
        self._clip_scale: float | None = None
        self._clip_value: float | None = None
        self._num_groups = 0
        for parameter in [parameter for parameter in optimizer.state if parameter.is_meta]:
            del optimizer.state[parameter]  # what an optimizer's constructor may have made for them
        self._describe()
        self._handles = [
            optimizer.register_step_post_hook(lambda *_: self._after_step()),
            optimizer.register_state_dict_post_hook(lambda _, state_dict: self._completed(state_dict)),
            optimizer.register_load_state_dict_pre_hook(lambda _, state_dict: self._take(state_dict)),
        ]
        self._zero_grad = optimizer.zero_grad
        optimizer.zero_grad = self._zero  # type: ignore[method-assign]

    def detach(self) -> None:
        """Make the optimizer an ordinary one again, with the state of all parameters: it may be saved after the run."""
        for handle in self._handles:
            handle.remove()
        self._optimizer.__dict__.pop("zero_grad", None)
        remote = {} if self._pipeline.beyond_help else self._fetch()
        state = self._optimizer.state
        for parameter in (parameter for group in self._optimizer.param_groups for parameter in group["params"]):
            own = remote.get(self._keys[id(parameter)]) if id(parameter) in self._keys else state.pop(parameter, None)
            if own is not None:
                state[parameter] = own  # in the order in which one process would have made them

    # ------------------------------------------------------------ clipping

    def clip_norm(self, max_norm: float, norm_type: float = 2.0, local: Sequence[Tensor] | None = None) -> float:
        """Clip the gradients of all parameters, local and remote, by their common norm; return that norm.

        Args:
            max_norm: What the norm is clipped to.
            norm_type: Which norm.
            local: The parameters on this driver that count; None: those of the optimizer.
        """
        local = self._local() if local is None else local
        norm = self._pipeline.gradients.norm(local, norm_type)
        scale = min(1.0, max_norm / (norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_
        gradients.clip(local, scale=scale, value=None)
        self._clip_scale = scale * (1.0 if self._clip_scale is None else self._clip_scale)
        return norm

    def clip_value(self, value: float) -> None:
        """Clip every gradient element to +-``value``."""
        gradients.clip(self._local(), scale=None, value=value)
        self._clip_value = value

    def forget_clipping(self) -> None:
        """Forget how to clip a step that is not taken."""
        self._clip_scale = self._clip_value = None

    def _local(self) -> list[nn.Parameter]:
        members = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        return [parameter for parameter in members if not parameter.is_meta]

    # ---------------------------------------------------------- checkpoint

    def state_dict(self) -> dict[str, Any]:
        """Return the ordinary ``state_dict`` of the whole optimizer, as one process would have it."""
        return self._optimizer.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over an ordinary ``state_dict``, local entries here and remote ones on the workers."""
        self._optimizer.load_state_dict(dict(state_dict))

    def local_state_dict(self) -> dict[str, Any]:
        """Return the ordinary ``state_dict``, but without the state of remote parameters, which nobody is asked for."""
        members = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        state, number_of = self._optimizer.state, {id(parameter): number for number, parameter in enumerate(members)}
        groups = [
            {**group, "params": [number_of[id(parameter)] for parameter in group["params"]]}
            for group in self._optimizer.param_groups
        ]
        local = {number: dict(state[p]) for number, p in enumerate(members) if p in state}
        return {"state": local, "param_groups": groups}

    def _completed(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return the optimizer's own ``state_dict`` with the state of remote parameters."""
        state, remote = dict(state_dict["state"]), self._fetch()
        state |= {number: remote[key] for key, number in self.numbers().items() if key in remote}
        return {**state_dict, "state": dict(sorted(state.items()))}

    def _take(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Hand the state of remote parameters over to the workers; return what is left to load here."""
        numbers = self.numbers()
        remote = {key: state_dict["state"][n] for key, n in numbers.items() if n in state_dict["state"]}
        taken = set(numbers.values())
        self._describe()
        if self._pipeline.leads:
            for link in self._pipeline.links:
                blocks = set(self._pipeline.layout.hosted(link.rank))
                own = {key: state for key, state in remote.items() if key[0] in blocks}
                fields, blobs = encode_optimizer_state(self._pipeline.shards.part_of_state(own, link.rank))
                link.send("put", {"what": "optimizer", **fields}, blobs)
        self._pipeline.links.expect_all("ready")
        local = {number: state for number, state in state_dict["state"].items() if number not in taken}
        return {**state_dict, "state": local}

    def _fetch(self) -> dict[ParameterKey, dict[str, Any]]:
        return self._pipeline.surviving(self._fetch_once)

    def _fetch_once(self) -> dict[ParameterKey, dict[str, Any]]:
        parts: dict[int, dict[ParameterKey, dict[str, Any]]] = {}
        self._pipeline.heal()
        for link in self._pipeline.remote.first_holders():
            message = link.ask("get", {"what": "optimizer"}, "state")
            parts[link.rank] = decode_optimizer_state(message.fields, message.blobs)
        return self._pipeline.shards.join_states(parts)

    def numbers(self) -> dict[ParameterKey, int]:
        """Map remote parameters to their numbers in the optimizer's ``state_dict``."""
        members = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        return {
            self._keys[id(parameter)]: number for number, parameter in enumerate(members) if id(parameter) in self._keys
        }

    # ---------------------------------------------------------------- step

    def _describe(self) -> None:
        """Let the workers build their parts; their state starts empty."""
        groups = self._optimizer.param_groups
        self._num_groups = len(groups)
        keys = tuple(tuple(self._keys[id(p)] for p in group["params"] if id(p) in self._keys) for group in groups)
        plan = OptimizerPlan(type(self._optimizer), dict(self._optimizer.defaults), keys)
        if self._pipeline.leads:
            self._pipeline.optimizer_plan = cloudpickle.dumps(plan)
            self._pipeline.links.broadcast("optimizer", {}, [self._pipeline.optimizer_plan])

    def _zero(self, set_to_none: bool = True) -> None:
        self._zero_grad(set_to_none)
        self._pipeline.gradients.zero()

    def _after_step(self) -> None:
        scale, value = self._clip_scale, self._clip_value
        self._clip_scale = self._clip_value = None
        if len(self._optimizer.param_groups) != self._num_groups:
            self._grow()
        hyperparameters = [local_hyperparameters(group) for group in self._optimizer.param_groups]
        self._pipeline.gradients.step_optimizers(hyperparameters, scale, value)

    def _grow(self) -> None:
        """A group was added (unfreezing does that): rebuild the remote optimizers and give them their state back."""
        self.load_state_dict(self.state_dict())


def to_device(optimizer: Optimizer, device: torch.device) -> None:
    """Move the optimizer's own state, which has none for remote parameters."""
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor) and not value.is_meta:
                state[name] = value.to(device)
