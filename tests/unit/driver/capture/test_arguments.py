"""Arguments of blocks become templates: equal when blocks cannot tell them apart, found out where a gradient hides."""

import dataclasses
import enum
import functools
import io
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import cloudpickle
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from skippipe_plugin.driver.capture.arguments import ArgumentTaker, SideInputs
from skippipe_plugin.driver.capture.token import HiddenToken, Origin
from skippipe_plugin.driver.capture.unavailable import Recording, Unavailable
from skippipe_plugin.engine.arguments import ArrayInput, HiddenAgain, Packed, SideInput, Template, array_of
from skippipe_plugin.engine.call import Made
from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.engine.transport import TensorSpec

NAMES = tuple(f"net.{index}" for index in range(4))


@dataclasses.dataclass
class Meta:
    bias: Any
    flag: bool = True


@dataclasses.dataclass(frozen=True)
class Frozen:
    bias: Any


@dataclasses.dataclass(slots=True)
class Slots:
    bias: Any


class Pair(NamedTuple):
    left: Any
    right: int


class Plain:
    def __init__(self, bias: Any) -> None:
        self.bias = bias


class Kind(enum.Enum):
    LOCAL = 1
    GLOBAL = 2


class Mapping(dict):
    pass


def scaled(value: Any) -> Callable[[Tensor], Tensor]:
    return lambda hidden: hidden * value


HOLDERS: dict[str, Callable[[Any], Any]] = {
    "tensor": lambda x: x,
    "tuple": lambda x: (x, 1),
    "list": lambda x: [x],
    "dict": lambda x: {"bias": x},
    "nested": lambda x: {"a": [(x, None)]},
    "ordered": lambda x: OrderedDict(bias=x),
    "default": lambda x: defaultdict(list, bias=x),
    "named tuple": lambda x: Pair(x, 1),
    "dataclass": Meta,
    "frozen dataclass": Frozen,
    "slots": Slots,
    "namespace": lambda x: SimpleNamespace(bias=x),
    "object": Plain,
    "object in object": lambda x: Plain(Plain(x)),
    "subclass of dict": lambda x: Mapping(bias=x),
    "user dict": lambda x: UserDict(bias=x),
    "partial": lambda x: functools.partial(torch.add, x),
    "closure": scaled,
    "bound method": lambda x: Plain(x).__eq__,
    "object in a list": lambda x: [Plain(x)],
}


def taker(hidden: Tensor, beside: SideInputs, *, block: int = 0, grad: bool = True) -> ArgumentTaker:
    return ArgumentTaker(NAMES, block, hidden, beside, grad=grad, cache_slot=lambda cache: 0)


def take(*args: Any, grad: bool = True, **kwargs: Any) -> tuple[Template, SideInputs]:
    hidden, beside = torch.zeros(2), SideInputs()
    return taker(hidden, beside, grad=grad).template(0, (hidden, *args), kwargs), beside


def filled(template: Template, beside: SideInputs) -> tuple[list[Any], dict[str, Any]]:
    """Give a block its arguments, on the other side of a wire."""
    travelled: Template = cloudpickle.loads(cloudpickle.dumps(template))
    assert travelled == template

    def leaf(value: Any) -> Any:
        if isinstance(value, SideInput):
            return beside.tensors[value.slot]
        if isinstance(value, ArrayInput):
            return array_of(beside.tensors[value.slot])
        return value.load(leaf) if isinstance(value, Packed) else value

    return travelled.fill(leaf)


def tensors_in(value: Any) -> list[Tensor]:
    found: list[Tensor] = []

    class Finder(cloudpickle.Pickler):
        def persistent_id(self, part: Any) -> Any:
            return found.append(part) or 0 if isinstance(part, Tensor) else None

    Finder(io.BytesIO()).dump(value)
    return found


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
def test_a_tensor_arrives_wherever_it_is(hold: Callable[[Any], Any]) -> None:
    tensor = torch.randn(3)
    value = hold(tensor)
    template, beside = take(value, named=value)
    assert [each is tensor for each in beside.tensors] == [True]
    args, kwargs = filled(template, beside)
    for arrived in (args[1], kwargs["named"]):
        assert type(arrived).__name__ == type(value).__name__
        assert [each.tolist() for each in tensors_in(arrived)] == [tensor.tolist()]


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
def test_a_gradient_is_found_wherever_it_is(hold: Callable[[Any], Any]) -> None:
    tensor = torch.randn(3, requires_grad=True) * 2
    template, beside = take(torch.zeros(3), hold(tensor), torch.zeros(2))
    (slot,) = beside.carrying
    assert beside.tensors[slot] is tensor
    assert slot in template.slots()


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
def test_an_earlier_output_is_found_wherever_it_is(hold: Callable[[Any], Any]) -> None:
    origin = Origin(NAMES, torch.device("cpu"), Recording(), ())
    token = HiddenToken.of(origin, Made(0, 0), TensorSpec((2,), torch.float32), carries=False)
    hidden = torch.zeros(2)
    with pytest.raises(SkipPipeError, match=r"net\.2 takes the output of net\.0 .*\(argument 'skip'\)"):
        taker(hidden, SideInputs(), block=2).template(0, (hidden,), {"skip": hold(token)})


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
def test_weights_that_are_elsewhere_are_found(hold: Callable[[Any], Any]) -> None:
    with pytest.raises(SkipPipeError, match="has no values"):
        take(hold(torch.empty(3, device="meta")))


CONSTANTS = [
    *(None, True, False, 1, 0, 2, 1.0, 0.0, -0.0, float("nan"), float("inf"), 1j, "", "1", b"1", ...),
    *(torch.float32, torch.float64, torch.device("cpu"), torch.device("meta"), torch.Size([1])),
    *(Kind.LOCAL, Kind.GLOBAL, (1,), [1], (True,), [1.0], {"a": 1}, {"a": 1.0}, {1: 0}, {True: 0}, {1, 2}),
    *(Pair(1, 2), Pair(1.0, 2), Plain(1), Plain(2), Meta(1), Meta(1.0), Frozen(1), range(3), slice(1, 2), len, Plain),
    *(np.float32(1), np.int64(1), np.array(["a"]), np.array(1), namedtuple("Other", "left right")(1, 2), scaled),
]


def test_constants_are_equal_to_themselves_only() -> None:
    taken = [take(value)[0] for value in CONSTANTS]
    again = [take(value)[0] for value in CONSTANTS]
    for index, one in enumerate(taken):
        assert [other for other, template in enumerate(again) if template == one] == [index], CONSTANTS[index]


@pytest.mark.parametrize("value", CONSTANTS, ids=lambda value: str(value).partition(" at 0x")[0])
def test_constants_arrive(value: Any) -> None:
    args, _ = filled(*take(value))
    assert type(args[1]) is type(value)
    assert cloudpickle.dumps(args[1]) == cloudpickle.dumps(value) or repr(args[1]) == repr(value)


def test_templates_of_arrays_and_tensors_compare() -> None:
    values = [np.arange(3), Meta(np.arange(3)), Meta(torch.arange(3)), {"a": np.arange(3)}]
    for value in values:
        assert take(value)[0] == take(value)[0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.bool_, np.uint8, np.complex64])
@pytest.mark.parametrize("hold", [lambda x: x, Meta, lambda x: [x]], ids=["bare", "held", "listed"])
def test_arrays_travel_as_tensors(dtype: Any, hold: Callable[[Any], Any]) -> None:
    array = np.arange(6).reshape(2, 3).astype(dtype)[:, ::-1]
    template, beside = take(hold(array))
    array[:] = 0  # what is taken is taken
    args, _ = filled(template, beside)
    (arrived,) = [args[1]] if hold(1) == 1 else [args[1].bias] if isinstance(args[1], Meta) else args[1]
    assert arrived.dtype == dtype
    assert arrived.tolist() == np.arange(6).reshape(2, 3).astype(dtype)[:, ::-1].tolist()
    assert len(beside.tensors) == 1


def test_the_same_hidden_states_again() -> None:
    hidden, beside = torch.zeros(2, requires_grad=True), SideInputs()
    template = taker(hidden, beside).template(0, (hidden, hidden), {"memory": {"states": hidden}})
    assert template.args == (None, HiddenAgain())
    assert template.kwargs == {"memory": {"states": HiddenAgain()}}
    assert template.repeats
    assert not beside.tensors


REFUSED: dict[str, tuple[Any, str]] = {
    "generator": ((index for index in range(3)), r"number 1 of net\.0 is or holds a generator"),
    "module": (nn.Linear(2, 2), r"a module with parameters \(Linear\)"),
    "method of a module": (nn.Linear(2, 2).forward, "a module with parameters"),
    "module in a closure": (scaled(nn.Linear(2, 2)), "a module with parameters"),
    "second output": (Unavailable("a block", 1), "a second output of a block, which stays"),
    "sparse": (torch.eye(2).to_sparse(), "layout torch.sparse_coo"),
    "file": (io.StringIO, ""),
}


@pytest.mark.parametrize(("value", "message"), list(REFUSED.values())[:-1], ids=list(REFUSED)[:-1])
def test_what_cannot_travel_is_named(value: Any, message: str) -> None:
    with pytest.raises(SkipPipeError, match=message):
        take(value)


def test_what_cannot_be_pickled_is_named() -> None:
    import threading

    with pytest.raises(SkipPipeError, match=r"argument 'lock' of net\.0 \(Plain\) cannot be sent"):
        take(lock=Plain(threading.Lock()))


def test_modules_without_parameters_may_be_passed() -> None:
    args, _ = filled(*take(nn.GELU()))
    assert isinstance(args[1], nn.GELU)


def change_dict(value: dict[str, Any]) -> None:
    value["layer"] = 2


def change_object(value: Plain) -> None:
    value.bias = 2


@pytest.mark.parametrize(
    ("value", "change"),
    [
        ({"layer": 1}, change_dict),
        ([1], lambda value: value.append(2)),
        (Plain(1), change_object),
        (Plain([1]), lambda value: value.bias.append(2)),
        (SimpleNamespace(bias=1), change_object),
        (np.zeros(2), lambda value: value.fill(1)),
        ({1}, lambda value: value.add(2)),
    ],
    ids=["dict", "list", "object", "list in object", "namespace", "array", "set"],
)
def test_a_value_is_what_it_is_when_the_block_is_called(value: Any, change: Callable[[Any], Any]) -> None:
    hidden, beside = torch.zeros(2), SideInputs()
    first = taker(hidden, beside).template(0, (hidden, value), {})
    same = taker(hidden, beside, block=1).template(0, (hidden, value), {})
    before = repr(getattr(value, "bias", value))
    change(value)
    other = taker(hidden, beside, block=2).template(0, (hidden, value), {})
    assert first == same != other
    (arrived, _), (changed, _) = filled(first, beside), filled(other, beside)
    assert repr(getattr(arrived[1], "bias", arrived[1])) == before
    assert repr(getattr(changed[1], "bias", changed[1])) == repr(getattr(value, "bias", value)) != before


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
def test_a_tensor_that_is_changed_in_place_before_it_has_travelled(hold: Callable[[Any], Any]) -> None:
    tensor = torch.zeros(2)
    _, beside = take(hold(tensor))
    beside.check()
    tensor.add_(1)
    with pytest.raises(SkipPipeError, match=r"arguments of net\.0 .* was changed in place"):
        beside.check()
