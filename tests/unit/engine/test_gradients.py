"""The gradient window against plain accumulation, and norms against torch's own clipping."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from skippipe_plugin.engine.gradients import GradientWindow, clip, norm_power, sum_over_holders, total_norm, unscale


def parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((2, 3), (4,))]


def backward(params: list[nn.Parameter], factor: float, only_first: bool = False) -> None:
    terms = [(p * p).sum() for p in params[: 1 if only_first else None]]
    (factor * sum(terms)).backward()


@given(st.lists(st.tuples(st.floats(0.1, 2), st.booleans(), st.floats(0.1, 1)), min_size=1, max_size=4))
def test_steps_accumulate_like_in_one_process(steps: list[tuple[float, bool, float]]) -> None:
    ours, plain = parameters(), parameters()
    window = GradientWindow(ours)
    for factor, only_first, scale in steps:
        window.open()
        backward(ours, factor, only_first)
        window.close()
        window.merge(scale)
        backward(plain, factor * scale, only_first)
    for one, other in zip(ours, plain, strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad)


def test_new_gradients_stay_apart_until_they_are_merged() -> None:
    params = parameters()
    window = GradientWindow(params)
    backward(params, 1.0)
    before = params[0].grad
    window.open()
    assert params[0].grad is None
    backward(params, 2.0)
    window.close()
    assert params[0].grad is before
    window.zero()
    window.merge(1.0)
    torch.testing.assert_close(params[0].grad, 4 * params[0].detach())


def test_a_discarded_step_leaves_no_trace() -> None:
    params = parameters()
    window = GradientWindow(params)
    backward(params, 1.0)
    before = params[0].grad
    window.open()
    backward(params, 2.0)
    window.discard()
    assert params[0].grad is before
    window.merge(1.0)
    assert params[0].grad is before


def test_user_code_in_the_middle_of_a_step_sees_what_is_accumulated_and_may_change_it() -> None:
    params = parameters()
    window = GradientWindow(params)
    backward(params, 1.0)
    before = params[0].grad
    window.open()
    backward(params, 2.0)
    with window.shown():
        assert params[0].grad is before
        params[0].grad = None
    torch.testing.assert_close(params[0].grad, 4 * params[0].detach())
    window.close()
    assert params[0].grad is None
    window.merge(1.0)
    torch.testing.assert_close(params[0].grad, 4 * params[0].detach())
    torch.testing.assert_close(params[1].grad, 6 * params[1].detach())


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, float("inf")])
@pytest.mark.parametrize("max_norm", [0.1, 100.0])
def test_norms_of_parts_are_the_norm_of_the_whole(norm_type: float, max_norm: float) -> None:
    whole, parts = parameters() + parameters(1), [parameters(), parameters(1)]
    backward(whole, 1.0)
    for part in parts:
        backward(part, 1.0)
    expected = torch.nn.utils.clip_grad_norm_(whole, max_norm, norm_type)
    norm = total_norm([norm_power(part, norm_type) for part in parts], norm_type)
    assert norm == pytest.approx(float(expected), rel=1e-6)
    for part in parts:
        clip(part, scale=min(1.0, max_norm / (norm + 1e-6)), value=None)
    for one, other in zip(whole, parts[0] + parts[1], strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_parameters_that_no_replica_used_keep_no_gradient() -> None:
    params = parameters()
    backward(params, 1.0, only_first=True)
    sums: list[torch.Tensor] = []

    def double(tensor: torch.Tensor) -> None:  # a second replica with the same gradients
        sums.append(tensor)
        tensor.mul_(2)

    sum_over_holders(params, double)
    torch.testing.assert_close(params[0].grad, 4 * params[0].detach())
    assert params[1].grad is None


@pytest.mark.parametrize("used", [((0,), (1,)), ((0, 1), (1,)), ((), (0,)), ((0, 2), (0, 3)), ((3,), (2,), (1, 3))])
def test_a_parameter_that_one_replica_used_gets_its_gradient_on_all(used: tuple[tuple[int, ...], ...]) -> None:
    """Replicas whose microbatches took different branches, against one process that took all of them."""
    shapes = ((2, 3), (4,), (1,), (3,))
    holders = [[nn.Parameter(torch.arange(1.0, 1 + n).expand(n).clone()) for (*_, n) in shapes] for _ in used]
    for parameter in (each[3] for each in holders):
        parameter.data = parameter.data.double()
    expected: list[torch.Tensor | None] = [None] * len(shapes)
    for rank, (own, indices) in enumerate(zip(holders, used, strict=True)):
        for index in indices:
            own[index].grad = torch.full_like(own[index], 10.0**rank * (index + 1))
            expected[index] = own[index].grad.clone() + (0 if expected[index] is None else expected[index])
    together(holders)
    for own in holders:
        for parameter, gradient in zip(own, expected, strict=True):
            assert (parameter.grad is None) == (gradient is None)
            if gradient is not None:
                torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=0)


@pytest.mark.parametrize("worst", [1.0, float("inf"), float("nan")])
@pytest.mark.parametrize("scale", [3.0, 2.0**16])
def test_unscaling_is_that_of_torchs_scaler(scale: float, worst: float) -> None:
    ours, theirs = parameters(), parameters()
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    scaler.scale(torch.ones(()))
    for params in (ours, theirs):
        backward(params, scale)
        params[1].grad[2] *= worst
    optimizer = torch.optim.SGD([*theirs, nn.Parameter(torch.ones(1))])  # one without a gradient
    scaler.unscale_(optimizer)
    (found,) = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values()
    assert unscale(ours, float(torch.tensor(scale, dtype=torch.float64).reciprocal().float())) == bool(found)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.grad.nan_to_num(7.0), other.grad.nan_to_num(7.0))


def test_nothing_to_unscale_and_what_torch_refuses() -> None:
    assert unscale(parameters(), 1.0) is None
    half = nn.Parameter(torch.ones(2, dtype=torch.float16))
    half.grad = torch.ones_like(half)
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        unscale([half], 1.0)


def together(holders: list[list[nn.Parameter]]) -> None:
    """Run ``sum_over_holders`` on all holders at once, with sums that want the same tensors of each."""
    barrier = threading.Barrier(len(holders), timeout=5)
    shared: list[torch.Tensor | None] = [None] * len(holders)

    def run(rank: int) -> None:
        def all_reduce(tensor: torch.Tensor) -> None:
            shared[rank] = tensor.clone()
            barrier.wait()
            assert len({(each.shape, each.dtype) for each in shared}) == 1
            total = sum(shared)
            barrier.wait()
            tensor.copy_(total)

        sum_over_holders(holders[rank], all_reduce)

    with ThreadPoolExecutor(len(holders)) as pool:
        for done in [pool.submit(run, rank) for rank in range(len(holders))]:
            done.result(10)
