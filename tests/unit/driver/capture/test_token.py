"""The token between two blocks: it tells its form, goes to the next block, and raises for everything else."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from skippipe_plugin.driver.capture.token import HiddenToken, Origin, named_parts
from skippipe_plugin.driver.capture.unavailable import Recording
from skippipe_plugin.engine.call import BlockMode, Made
from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.engine.transport import TensorSpec

NAMES = tuple(f"net.{index}" for index in range(4))
ORIGIN = Origin(NAMES, torch.device("cpu"), Recording(), ())
REAL = torch.ones(2, 3)


@pytest.fixture
def token() -> HiddenToken:
    return HiddenToken.of(ORIGIN, Made(1, 0), TensorSpec((2, 3), torch.float32), carries=True)


FORM: dict[str, Callable[[Tensor], Any]] = {
    "shape": lambda h: h.shape,
    "size": lambda h: (h.size(), h.size(1)),
    "dim": lambda h: (h.dim(), h.ndim, h.ndimension()),
    "numel": lambda h: (h.numel(), torch.numel(h), h.nelement()),
    "dtype": lambda h: (h.dtype, h.is_floating_point(), torch.is_floating_point(h), h.is_complex()),
    "device": lambda h: (h.device, h.is_cuda, h.is_cpu, h.is_meta, h.get_device()),
    "layout": lambda h: (h.layout, h.is_sparse, h.is_nested, h.is_quantized),
    "bytes": lambda h: (h.element_size(), h.itemsize, h.nbytes),
    "len": len,
    "is_tensor": lambda h: torch.is_tensor(h) and isinstance(h, Tensor),
    "zeros_like": lambda h: torch.zeros_like(h).tolist(),
    "new_ones": lambda h: h.new_ones(h.shape[0]).tolist(),
}


@pytest.mark.parametrize("ask", FORM.values(), ids=FORM)
def test_it_answers_what_its_form_tells(token: HiddenToken, ask: Callable[[Tensor], Any]) -> None:
    assert ask(token) == ask(REAL)


def test_it_lies_as_what_it_stands_for() -> None:
    real = torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last)
    token = HiddenToken.of(ORIGIN, Made(1, 0), TensorSpec.of(real), carries=True)
    assert not token.is_contiguous()
    assert token.is_contiguous(memory_format=torch.channels_last)
    assert torch.zeros_like(token).stride() == real.stride()
    for same in (token.contiguous(memory_format=torch.channels_last), token.to(memory_format=torch.channels_last)):
        assert same is token
    for other in (token.contiguous, lambda: token.to(memory_format=torch.contiguous_format)):
        with pytest.raises(SkipPipeError, match=r"needs the output of net\.1"):
            other()


SAME: dict[str, Callable[[Tensor], Any]] = {
    "contiguous": lambda h: h.contiguous(),
    "to dtype": lambda h: h.to(torch.float32),
    "to device": lambda h: h.to("cpu"),
    "to tensor": lambda h: h.to(REAL),
    "to keywords": lambda h: h.to(device="cpu", dtype=torch.float32, non_blocking=True),
    "float": lambda h: h.float(),
    "type_as": lambda h: h.type_as(REAL),
    "cpu": lambda h: h.cpu(),
    "identity": nn.Identity(),
    "found in a list": lambda h: [h][[h].index(h)],
    "key": lambda h: next(iter({h: 0})),
}


@pytest.mark.parametrize("convert", SAME.values(), ids=SAME)
def test_conversions_to_what_it_is_return_it(token: HiddenToken, convert: Callable[[Tensor], Any]) -> None:
    assert convert(token) is token


class Unchanged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        return hidden

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def assign(hidden: Tensor, name: str) -> None:
    setattr(hidden, name, REAL)


def begin(hidden: Tensor) -> None:
    hidden[:, 0] = 0


def add_in_place(hidden: Tensor) -> None:
    hidden += 1


REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "operator": lambda h: h + 1,
    "other side": lambda h: REAL * h,
    "into another": lambda h: REAL.clone().add_(h),
    "in place": add_in_place,
    "memory of another": lambda h: h.set_(REAL),
    "set item": begin,
    "get item": lambda h: h[0],
    "iterate": list,
    "method": lambda h: h.mean(),
    "function": lambda h: torch.stack([REAL, h]),
    "keyword": lambda h: torch.add(input=REAL, other=h),
    "view": lambda h: h.view(-1),
    "transpose": lambda h: h.T,
    "detach": lambda h: h.detach(),
    "data": lambda h: h.data,
    "grad_fn": lambda h: h.grad_fn,
    "item": lambda h: h.item(),
    "bool": bool,
    "compare": lambda h: h == REAL,
    "format": lambda h: f"{h:.3f}",
    "numpy": lambda h: h.numpy(),
    "asarray": np.asarray,
    "tolist": lambda h: h.tolist(),
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "save": lambda h: torch.save(h, io.BytesIO()),
    "function of autograd": Unchanged.apply,
    "module": nn.Linear(3, 3),
    "dropout": nn.Dropout(0.0),
    "hook": lambda h: h.register_hook(print),
    "attribute": lambda h: assign(h, "mask"),
    "set data": lambda h: assign(h, "data"),
    "other dtype": lambda h: h.double(),
    "to other dtype": lambda h: h.to(torch.bfloat16),
    "to other device": lambda h: h.to("meta"),
    "copy": lambda h: h.to("cpu", copy=True),
    "backward": lambda h: h.backward(),
    "foreach": lambda h: torch._foreach_norm([h]),
    "parameter": nn.Parameter,
    "einsum": lambda h: torch.einsum("ij->i", h),
    "without subclasses": lambda h: torch._C._nn.gelu(h),
}


@pytest.mark.parametrize("use", REFUSED.values(), ids=REFUSED)
def test_everything_else_names_the_block_and_the_way_out(token: HiddenToken, use: Callable[[Tensor], Any]) -> None:
    with pytest.raises(
        SkipPipeError, match=r'output of net\.1 .*passed on to net\.2.*blocks="net\.0:2" or .*net\.2:4"'
    ):
        use(token)


def test_whether_it_needs_a_gradient_is_asked_when_it_matters() -> None:
    modes = [BlockMode(True, (False,)), BlockMode(True, (False,))]
    spec, origin = TensorSpec((1,), torch.float32), ORIGIN._replace(modes=modes)
    first, second = (HiddenToken.of(origin, Made(block, 0), spec, carries=False) for block in range(2))
    assert not first.requires_grad
    assert not second.requires_grad
    modes[1] = BlockMode(True, (False, True))
    assert not first.requires_grad
    assert second.requires_grad


def test_its_description() -> None:
    token = HiddenToken.of(ORIGIN, Made(0, 0), TensorSpec((1,), torch.float32), carries=False)
    assert str(token) == f"{token}" == "<the output of net.0, float32[1], which is on a worker>"


@pytest.mark.parametrize(
    ("names", "first", "last", "expected"),
    [
        (["h.2", "h.3", "h.4", "h.5"], 1, 1, 'blocks="h.2:4" or blocks="h.4:6"'),
        (["h.0", "h.1", "h.2"], 0, 0, 'blocks="h.1:3"'),
        (["0", "1", "2", "3"], 2, 2, 'blocks="0:3"'),
        (["h.0", "h.1"], 0, 1, ""),
    ],
)
def test_the_parts_that_are_offered(names: list[str], first: int, last: int, expected: str) -> None:
    assert named_parts(names, first, last) == expected
