"""The remote part of the driver's optimizer: built from its groups, stepped with it, saved and loaded with it."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, Literal

import cloudpickle
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map_only

from ..engine import gradients, phases
from ..engine.apart import (
    STEP_APART,
    check_steps_apart,
    check_steps_rows_apart,
    counts_without_gradients,
    minds_early_gradients,
)
from ..engine.control.answers import Ready, State
from ..engine.control.commands import BuildOptimizer, Get, Pass, PutOptimizerState, SwitchOptimizer
from ..engine.errors import SkipPipeError
from ..engine.optimizer import OptimizerPlan, ParameterKey, Settings, settings_of
from ..engine.wire import decode_optimizer_state, encode_optimizer_state, tensor_name
from .capture.remote import is_remote
from .optimizer_attributes import check_attributes, check_step_is_of_class, own_code, own_values
from .optimizer_state import Retired, WatchedState
from .own_step import OwnStep
from .pipeline import Pipeline

_Mode = Literal["train", "eval"]
_MODES: Final[tuple[_Mode, ...]] = ("train", "eval")
"""Methods of optimizers that have two sets of weights, as schedule-free ones do."""


def _nothing() -> None: ...


class RemoteOptimizer:
    """Extends ``optimizer`` to the workers: they step their parameters whenever it steps.

    Args:
        pipeline: Has the workers.
        optimizer: Of parameters here and there.
        begun: Called when a step begins, and when its gradients are unscaled.
        ended: Called when all parts have stepped.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        optimizer: Optimizer,
        *,
        begun: Callable[[], None] = _nothing,
        ended: Callable[[], None] = _nothing,
    ) -> None:
        self._pipeline = pipeline
        self._optimizer = optimizer
        self._begun, self._ended = begun, ended
        self._keys = pipeline.remote.parameters()
        self._members: list[list[int]] = []
        self._before: Settings | None = None
        """The settings before the driver's own step, which may change them."""
        self._had_merged: int | None = None
        """How often gradients had been added before the step, if there were any for it."""
        self._attributes = own_values(optimizer)
        self._check()
        self._step = OwnStep(optimizer, self)
        for parameter in [parameter for parameter in optimizer.state if is_remote(parameter)]:
            del optimizer.state[parameter]  # what an optimizer's constructor may have made for them
        self._left: dict[ParameterKey, dict[str, Any]] | None = None
        """What user code has left of the workers' state, which they are to have before anything uses it."""
        self._state = self._watch()
        self._describe()
        self._handles = [
            optimizer.register_state_dict_pre_hook(lambda _: self._open_state()),
            optimizer.register_state_dict_post_hook(lambda _, state_dict: self._completed(state_dict)),
            optimizer.register_load_state_dict_pre_hook(lambda _, state_dict: self._take(state_dict)),
            optimizer.register_load_state_dict_post_hook(lambda _: self._loaded()),
        ]
        self._zero_grad = optimizer.zero_grad
        optimizer.zero_grad = self._zero  # type: ignore[method-assign]
        for method in _MODES:
            if callable(getattr(optimizer, method, None)):
                optimizer.__dict__[method] = functools.partial(self._switch, method, getattr(optimizer, method))

    def detach(self) -> None:
        """Make the optimizer an ordinary one again, with the state of all parameters: it may be saved after the run."""
        self._let_go()
        if not self._pipeline.beyond_help:
            self._follow_state()
        self._state.is_open = True
        state = self._optimizer.state = defaultdict(dict, self._state)
        remote = {} if self._pipeline.beyond_help else self._fetch()
        for parameter in (parameter for group in self._optimizer.param_groups for parameter in group["params"]):
            own = remote.get(self._keys[id(parameter)]) if id(parameter) in self._keys else state.pop(parameter, None)
            if own is not None:
                state[parameter] = own  # in the order in which one process would have made them
        del self._step, self._state  # they refer to this object, and all of them to the user's

    def retire(self) -> None:
        """Leave the workers to another optimizer; what they held of this one's state is gone, as it says if asked."""
        self._let_go()
        names = {id(parameter): name for name, parameter in self._named_remote().items()}
        with self._state.opened():
            self._optimizer.state = WatchedState(dict(self._state), lambda key: names.get(id(key)), Retired())
        self._optimizer.register_state_dict_pre_hook(lambda _: Retired.refuse())
        del self._step, self._state

    def _let_go(self) -> None:
        self._step.detach()
        for handle in self._handles:
            handle.remove()
        for name in ("zero_grad", *_MODES):
            self._optimizer.__dict__.pop(name, None)

    def estimate_state_bytes(self, num_bytes: int) -> int:
        """Return about how much state the workers keep for parameters of ``num_bytes``.

        As much for each byte as the driver's own parameters have, or twice as much where it steps none, as for Adam.
        """
        with self._state.opened():
            states = {parameter: tree_leaves(state) for parameter, state in self._optimizer.state.items() if state}
        own = sum(parameter.nbytes for parameter in states)
        if not own:
            return 0 if self._local() else 2 * num_bytes
        kept = sum(each.nbytes for leaves in states.values() for each in leaves if isinstance(each, Tensor))
        return int(num_bytes * kept / own)

    def replaced_by(self, optimizer: Optimizer) -> RemoteOptimizer:
        """Make the optimizer an ordinary one, and extend another, with what state it has, in its place."""
        if optimizer is self.optimizer:
            return self
        self.detach()
        state = optimizer.state_dict()
        other = RemoteOptimizer(self._pipeline, optimizer, begun=self._begun, ended=self._ended)
        if any(_has_values(state["state"].get(number)) for number in other.numbers().values()):
            other.load_state_dict(state)
        return other

    @property
    def optimizer(self) -> Optimizer:
        """What is extended."""
        return self._optimizer

    # ------------------------------------------------------------ clipping

    def clip_norm(self, max_norm: float, norm_type: float = 2.0, local: Sequence[Tensor] | None = None) -> float:
        """Clip the gradients of all parameters, local and remote, by their common norm; return that norm.

        Args:
            max_norm: What the norm is clipped to.
            norm_type: Which norm.
            local: The parameters on this driver that count; None: those of the optimizer.
        """
        self._pipeline.make_room("the clipping of gradients")  # a backward need not have reached the call that waits
        if self._membership() != self._members:  # the norm is of what the optimizer steps from now on
            self._regroup()
            self._pipeline.gradients.forget_norm()
        norm = self._pipeline.gradients.norm(
            self._local() if local is None else local, norm_type, stepped=local is None
        )
        local = self._local() if local is None else local
        ratio = max_norm / (norm + 1e-6)
        scale = 1.0 if ratio > 1.0 else ratio  # as torch.nn.utils.clip_grad_norm_: what is no number is none afterwards
        gradients.clip(local, scale=scale, value=None)
        self._pipeline.gradients.clip_later(scale=scale)
        return norm

    def clip_value(self, value: float) -> None:
        """Clip every gradient element to +-``value``."""
        gradients.clip(self._local(), scale=None, value=value)
        self._pipeline.gradients.clip_later(value=value)

    @property
    def unscales(self) -> bool:
        """Whether a loss scaler unscales the gradients before each step."""
        return self._pipeline.gradients.unscales

    @unscales.setter
    def unscales(self, unscales: bool) -> None:
        self._pipeline.gradients.unscales = unscales

    def unscale(self, inverse: float) -> Callable[[], bool | None]:
        """Multiply the gradients on the workers by ``inverse``; see :meth:`GradientControl.unscale`."""
        self._begun()
        if self._membership() != self._members:
            self._regroup()
        return self._pipeline.gradients.unscale(inverse)

    def unseen(self) -> AbstractContextManager[None]:
        """Let the body find no gradients but those of this driver's own parameters."""
        return self._pipeline.gradients.copies.unseen()

    def forget_clipping(self) -> None:
        """Forget how to clip a step that is not taken."""
        self._pipeline.gradients.pending_clip = None, None

    def _local(self) -> list[nn.Parameter]:
        members = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        return [parameter for parameter in members if not is_remote(parameter)]

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
        with self._state.opened():
            state = self._optimizer.state
            local = {number: dict(state[p]) for number, p in enumerate(members) if p in state}
        return {"state": local, "param_groups": self.numbered_groups()}

    def numbered_groups(self) -> list[dict[str, Any]]:
        """Return the parameter groups as a ``state_dict`` has them; after :meth:`detach`, too."""
        groups = self._optimizer.param_groups
        members = [parameter for group in groups for parameter in group["params"]]
        number_of = {id(parameter): number for number, parameter in enumerate(members)}
        return [{**group, "params": [number_of[id(each)] for each in group["params"]]} for group in groups]

    def _completed(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return the optimizer's own ``state_dict`` with the state of remote parameters."""
        self._state.is_open = False
        state, remote = dict(state_dict["state"]), self._fetch()
        state |= {number: remote[key] for key, number in self.numbers().items() if key in remote}
        return {**state_dict, "state": dict(sorted(state.items()))}

    def _take(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Hand the state of remote parameters over to the workers; return what is left to load here."""
        numbers = self.numbers()
        remote = {key: state_dict["state"][n] for key, n in numbers.items() if n in state_dict["state"]}
        taken = set(numbers.values())
        self._describe()
        self._left = None
        self._put(remote)
        local = {number: state for number, state in state_dict["state"].items() if number not in taken}
        return {**state_dict, "state": local}

    def _loaded(self) -> None:
        """Watch what ``load_state_dict`` has made, and check the groups that it brought."""
        self._state = self._watch()
        self._check_groups()

    def _put(self, remote: Mapping[ParameterKey, Mapping[str, Any]]) -> None:
        self._pipeline.surviving(lambda: self._put_once(remote))

    def _put_once(self, remote: Mapping[ParameterKey, Mapping[str, Any]]) -> None:
        self._pipeline.heal()
        if self._pipeline.leads:
            for link in self._pipeline.links:
                blocks = set(self._pipeline.layout.hosted(link.rank))
                own = {key: dict(state) for key, state in remote.items() if key[0] in blocks}
                part = self._pipeline.shards.part_of_state(own, link.rank)
                link.send(PutOptimizerState(*encode_optimizer_state(part)))
        self._pipeline.links.expect_all(Ready)

    def _fetch(self) -> dict[ParameterKey, dict[str, Any]]:
        return self._pipeline.surviving(self._fetch_once)

    def _fetch_once(self) -> dict[ParameterKey, dict[str, Any]]:
        parts: dict[int, dict[ParameterKey, dict[str, Any]]] = {}
        phases.reach(phases.Phase.SAVING)
        self._pipeline.heal()
        for link in self._pipeline.remote.first_holders():
            state = link.ask(Get("optimizer"), State)
            parts[link.rank] = decode_optimizer_state(state.tensors, state.blobs)
        return self._pipeline.shards.join_states(parts)

    def numbers(self) -> dict[ParameterKey, int]:
        """Map remote parameters to their numbers in the optimizer's ``state_dict``."""
        members = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        return {
            self._keys[id(parameter)]: number for number, parameter in enumerate(members) if id(parameter) in self._keys
        }

    # ---------------------------------------------------------------- state

    def _watch(self) -> WatchedState:
        """Put a state in the optimizer's place that refuses to speak for parameters on workers."""
        name_of = {id(parameter): name for name, parameter in self._named_remote().items()}.get
        state = WatchedState(self._optimizer.state, lambda key: name_of(id(key)), self)
        self._optimizer.state = state
        return state

    def take(self, key: Tensor) -> dict[str, Any] | None:
        """Let the workers drop the state of one parameter before the next step; return it."""
        if self._left is None:
            self._left = self._fetch()
        return self._left.pop(self._keys[id(key)], None)

    def drop(self) -> None:
        """Let the workers drop their state before the next step."""
        self._left = {}

    def _follow_state(self) -> None:
        """Let the workers have what user code has made of the state: it may have replaced it, or dropped some."""
        if self._optimizer.state is not self._state:
            state = self._optimizer.state
            members = self._named_remote().values()
            self._left = {self._keys[id(each)]: state.pop(each) for each in members if each in state}
            self._state = self._watch()
        if self._left is not None:
            left, self._left = self._left, None
            self._put(left)

    def _named_remote(self) -> dict[str, Tensor]:
        members = (parameter for group in self._optimizer.param_groups for parameter in group["params"])
        keys = ((self._keys.get(id(parameter)), parameter) for parameter in members)
        return {f"{key[1]} of block {key[0]}": parameter for key, parameter in keys if key is not None}

    def _open_state(self) -> None:
        self._follow_state()
        self._state.is_open = True

    # ----------------------------------------------------------------- what it is

    def _check(self) -> None:
        """Raise unless workers can have parts of this optimizer that step as it does."""
        self._check_groups()
        check_step_is_of_class(self._optimizer)
        plan = self._plan()
        check_steps_apart(plan, self._pipeline.device)
        if self._pipeline.shards.placements:
            check_steps_rows_apart(plan, self._pipeline.device)
        check_attributes(self._optimizer, plan)
        for number, group in enumerate(self._optimizer.param_groups):
            remote = any(id(parameter) in self._keys for parameter in group["params"])
            local = any(not is_remote(parameter) and parameter.requires_grad for parameter in group["params"])
            if remote and not local and not counts_without_gradients(plan):
                raise SkipPipeError(
                    f"{type(self._optimizer).__name__} counts in parameter group {number} only where a parameter of it "
                    "has a gradient, and those of this group are all on workers, so the driver's count would "
                    "stand still; put a parameter from outside of the blocks into the group, or train without the "
                    "pipeline"
                )

    def _check_groups(self) -> None:
        for number, group in enumerate(self._optimizer.param_groups):
            for key, value in group.items():
                if key != "params" and _holds_parameters(value):
                    raise SkipPipeError(
                        f"parameter group {number} of the {type(self._optimizer).__name__} holds a parameter or a "
                        f"tensor without values under {key!r}, which cannot be sent to the workers; keep it out of the "
                        "groups"
                    )

    def _plan(self) -> OptimizerPlan:
        groups = self._optimizer.param_groups
        keys = tuple(tuple(self._keys[id(p)] for p in group["params"] if id(p) in self._keys) for group in groups)
        settings = settings_of(self._optimizer, (*self._attributes, *own_code(self._optimizer)))
        return OptimizerPlan(type(self._optimizer), dict(self._optimizer.defaults), keys, settings)

    def _describe(self) -> None:
        """Let the workers build their parts; their state starts empty."""
        self._members = self._membership()
        self._step.forget_members()
        plan = self._plan()
        owned = {key for group in plan.groups for key in group}
        needing = self._pipeline.remote.parameters(needing_gradients=True).values()
        self._pipeline.gradients.copies.own([tensor_name(*key) for key in needing if key not in owned])
        if self._pipeline.leads:
            self._pipeline.optimizer_plan = cloudpickle.dumps(plan)
            self._pipeline.links.broadcast(BuildOptimizer(self._pipeline.optimizer_plan))

    def _membership(self) -> list[list[int]]:
        return [[id(parameter) for parameter in group["params"]] for group in self._optimizer.param_groups]

    # ---------------------------------------------------------------- step

    def _zero(self, set_to_none: bool = True) -> None:
        with self._pipeline.gradients.copies.unseen():
            self._zero_grad(set_to_none)
        self._pipeline.gradients.zero(set_to_none)

    def begin(self) -> None:
        """Note the settings before the driver's own step, which may change them."""
        self._begun()
        self._note_settings()
        self._had_merged = self._pipeline.gradients.num_merged if self._pipeline.gradients.are_waiting else None

    def ready(self, *, closure: bool) -> None:
        """Note the settings when all that may change them has run: the closure, in which the user's hooks run."""
        self._pipeline.gradients.accumulation.require()
        closure = closure and type(self._optimizer) not in STEP_APART
        if closure and self._had_merged is not None:
            closure = False
            if self._had_merged != self._pipeline.gradients.num_merged and self._minds_early_gradients:
                raise SkipPipeError(
                    f"{type(self._optimizer).__name__}.step uses gradients before it calls its closure, which adds to "
                    "them: those are of a part of the accumulated batches only, and workers have the sum. Call the "
                    "closure first in step(), or do not accumulate gradients over batches"
                )
        self._note_settings(closure=closure)

    def show(self, *, everything: bool) -> None:
        """Let user code see all, or the optimizer's own code what is here, and nothing of what is elsewhere."""
        if not everything:
            self._follow_state()
        elif self._optimizer.state is not self._state:  # its own code has made another, as that on the workers does
            self._state = self._watch()
        self._state.is_open = self._pipeline.gradients.copies.hidden = not everything

    def finish(self) -> None:
        """Step the parts on the workers, with the settings before the driver's own step."""
        self._pipeline.mirror.settle()
        settings, self._before = self._before, None
        assert settings is not None, "a step has a beginning"
        if self._membership() != self._members:
            self._regroup()
        if not (self.unscales and _skips(self._optimizer)):
            self._pipeline.gradients.step_optimizers(settings.dumps())
            self._pipeline.mirror.weights.outdate()
            self._ended()

    @functools.cached_property
    def _minds_early_gradients(self) -> bool:
        return minds_early_gradients(self._plan(), self._pipeline.device)

    def _note_settings(self, *, closure: bool = False) -> None:
        self._before = settings_of(self._optimizer, self._attributes, closure=closure)

    def _regroup(self) -> None:
        """Parameters were added (unfreezing does that) or moved: rebuild the remote parts, with their state."""
        self._check()
        remote = self._fetch()
        self._describe()
        self._put(remote)

    def _switch(self, method: _Mode, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call ``train`` or ``eval`` of the optimizer here and of its parts on the workers."""
        settings = settings_of(self._optimizer, self._attributes)
        self._pipeline.mirror.settle()
        with self._step.reduced():
            result = original(*args, **kwargs)
        if self._pipeline.leads:
            self._pipeline.links.broadcast(SwitchOptimizer(method, settings.dumps()))
        else:
            self._pipeline.links.broadcast(Pass())
        self._pipeline.mirror.weights.outdate()
        return result


def _holds_parameters(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.is_meta or is_remote(value) or isinstance(value, nn.Parameter)
    if isinstance(value, dict):
        return any(_holds_parameters(each) for each in value.values())
    return isinstance(value, list | tuple | set) and any(_holds_parameters(each) for each in value)


def _has_values(state: Mapping[str, Any] | None) -> bool:
    """Whether a parameter's state is one that it was given or has got, not what a constructor makes on the driver."""
    values = [] if state is None else state.values()
    return state is not None and not any(isinstance(v, Tensor) and (v.is_meta or is_remote(v)) for v in values)


def _skips(optimizer: Optimizer) -> bool:
    """Whether a fused step was told by a loss scaler that gradients are not finite, so that it has done nothing."""
    return bool(optimizer.__dict__.get("found_inf", False))


def to_device(optimizer: Optimizer, device: torch.device) -> None:
    """Move the optimizer's own state, which has none for remote parameters.

    How many steps were taken stays where it is, as Lightning and torch leave it: it is counted on the host, unless all
    of a step runs on the device.
    """
    whole = [group for group in optimizer.param_groups if group.get("capturable") or group.get("fused")]
    counts_there = {id(parameter) for group in whole for parameter in group["params"]}
    watched = optimizer.state
    with watched.opened() if isinstance(watched, WatchedState) else nullcontext():
        for parameter, state in watched.items():
            for name, value in state.items():
                if name != "step" or id(parameter) in counts_there:
                    state[name] = tree_map_only(Tensor, lambda each: each if each.is_meta else each.to(device), value)
