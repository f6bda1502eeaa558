"""Expert compute and the layer, against one expert after the other written plainly."""

import warnings

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn import functional as F

from skippipe_plugin.engine.stage import back_propagate
from skippipe_plugin.moe.experts import ExpertWeights, run_experts
from skippipe_plugin.moe.layer import MoELayer, swiglu
from skippipe_plugin.moe.routers import GShard, NullExperts, find_router
from skippipe_plugin.moe.routing import Routing

DIM, WIDTH = 8, 12


def plain(hidden: Tensor, routing: Routing, experts: ExpertWeights) -> Tensor:
    """Run every expert on every token and keep what the routing asks for."""
    total = torch.zeros_like(hidden)
    for expert in range(experts.num_experts):
        up, down = experts.up[expert], experts.down[expert]
        inner = hidden @ (up if experts.transposed else up.t())
        output = experts.activation(inner + (0 if experts.up_bias is None else experts.up_bias[expert]))
        output = output @ (down if experts.transposed else down.t())
        output = output + (0 if experts.down_bias is None else experts.down_bias[expert])
        output = output if experts.norm is None else experts.norm(output)
        share = torch.where(routing.experts == expert, routing.weights, 0).sum(-1, keepdim=True)
        total = total + share * output
    return total


def make(num_experts: int, *, width: int = WIDTH, dim: int = DIM, dtype=torch.float64, transposed=False, bias=False):
    shapes = [(num_experts, 2 * width, dim), (num_experts, dim, width)]
    up, down = (torch.randn(shape, dtype=dtype) for shape in shapes)
    if transposed:
        up, down = up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    biases = [torch.randn(num_experts, size, dtype=dtype) if bias else None for size in (2 * width, dim)]
    leaves = [leaf for leaf in (up, down, *biases) if leaf is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    return ExpertWeights(up, down, swiglu, biases[0], biases[1], transposed), leaves


def random_routing(tokens: int, slots: int, num_experts: int, dtype, *, empty: float = 0.0) -> Routing:
    index = torch.rand(tokens, num_experts).topk(slots, dim=-1).indices
    index = index.masked_fill(torch.rand(tokens, slots) < empty, num_experts)
    weights = torch.rand(tokens, slots, dtype=dtype).masked_fill(index == num_experts, 0)
    return Routing(weights.requires_grad_(), index)


def check(
    hidden: Tensor, routing: Routing, experts: ExpertWeights, leaves: list[Tensor], method: str, atol: float
) -> None:
    """Compare the output and all gradients, relative to the largest entry of each."""
    hidden.requires_grad_()
    wanted = [hidden, routing.weights, *leaves]
    results = []
    for run in (lambda: run_experts(hidden, routing, experts, method=method), lambda: plain(hidden, routing, experts)):
        output = run()
        gradients = torch.autograd.grad((output * output.detach().cos()).sum(), wanted, allow_unused=True)
        zeros = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(gradients, wanted, strict=True)]
        # An empty slot has no weight, and so no gradient that anybody may use.
        zeros[1] = zeros[1].masked_fill(routing.experts == experts.num_experts, 0)
        results.append((output, zeros))
    (output, ours), (expected, theirs) = results
    for actual, wanted in zip([output, *ours], [expected, *theirs], strict=True):
        largest = float(wanted.detach().abs().max()) if wanted.numel() else 1.0
        torch.testing.assert_close(actual, wanted, atol=atol * max(1.0, largest), rtol=0)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    tokens=st.integers(0, 20),
    num_experts=st.integers(1, 6),
    slots=st.integers(1, 6),
    empty=st.sampled_from([0.0, 0.3, 1.0]),
    transposed=st.booleans(),
    bias=st.booleans(),
)
def test_the_loop_is_exact_in_float64(seed, tokens, num_experts, slots, empty, transposed, bias) -> None:
    torch.manual_seed(seed)
    experts, leaves = make(num_experts, transposed=transposed, bias=bias)
    routing = random_routing(tokens, min(slots, num_experts), num_experts, torch.float64, empty=empty)
    hidden = torch.randn(tokens, DIM, dtype=torch.float64)
    check(hidden, routing, experts, leaves, "auto", 1e-10)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("method", ["loop", "grouped"])
@pytest.mark.parametrize("empty", [0.0, 0.4])
def test_both_methods_agree_with_the_plain_way(transposed, bias, method, empty) -> None:
    torch.manual_seed(0)
    experts, leaves = make(5, dtype=torch.float32, transposed=transposed, bias=bias)
    routing = random_routing(40, 2, 4, torch.float32, empty=empty)  # the fifth expert is idle
    routing = Routing(routing.weights, torch.where(routing.experts == 4, 5, routing.experts))
    check(torch.randn(40, DIM), routing, experts, leaves, method, 1e-5)


def test_a_norm_after_the_experts_comes_before_the_weights() -> None:
    torch.manual_seed(0)
    experts, leaves = make(3)
    norm = nn.LayerNorm(DIM).double()
    experts = ExpertWeights(experts.up, experts.down, swiglu, norm=norm)
    check(
        torch.randn(9, DIM, dtype=torch.float64), random_routing(9, 2, 3, torch.float64), experts, leaves, "auto", 1e-10
    )


@pytest.mark.parametrize("case", ["all to one", "one token", "every expert", "no token"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_routings(case: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tokens = {"one token": 1, "no token": 0}.get(case, 16)
    experts, leaves = make(4, dtype=dtype)
    routing = random_routing(tokens, 4 if case == "every expert" else 1, 4, dtype)
    if case == "all to one":
        routing = Routing(routing.weights, torch.full_like(routing.experts, 2))
    check(
        torch.randn(tokens, DIM, dtype=dtype),
        routing,
        experts,
        leaves,
        "auto",
        1e-5 if dtype == torch.float32 else 1e-10,
    )


def test_no_row_at_all_still_leads_backward() -> None:
    """A rank of an expert-parallel group may get no token, and must still take part in the backward."""
    experts, _ = make(3, dtype=torch.float32)
    hidden = torch.randn(4, DIM, requires_grad=True)
    routing = Routing(torch.zeros(4, 2), torch.full((4, 2), 3))
    output = run_experts(hidden, routing, experts)
    assert torch.equal(output, torch.zeros(4, DIM))
    output.sum().backward()
    assert hidden.grad is not None
    assert torch.equal(hidden.grad, torch.zeros(4, DIM))


@pytest.mark.parametrize("width", [3, 5, 30])
def test_sizes_that_grouped_mm_refuses_take_the_loop(width: int) -> None:
    torch.manual_seed(0)
    experts, leaves = make(4, width=width, dtype=torch.float32)
    routing = random_routing(20, 2, 4, torch.float32)
    check(torch.randn(20, DIM), routing, experts, leaves, "auto", 1e-5)
    if width * 4 % 16:
        with pytest.raises(ValueError, match=r"multiples of 16 bytes; there are 40 tokens.*use method='auto'"):
            run_experts(torch.randn(20, DIM), routing, experts, method="grouped")


@pytest.mark.parametrize("method", ["loop", "grouped"])
def test_autocast_really_computes_in_its_type(method: str) -> None:
    torch.manual_seed(0)
    seen = []

    def activation(inner: Tensor) -> Tensor:
        seen.append(inner.dtype)
        return swiglu(inner)

    experts, _ = make(4, width=16, dim=16, dtype=torch.float32)
    experts = ExpertWeights(experts.up, experts.down, activation)
    hidden, routing = torch.randn(32, 16, requires_grad=True), random_routing(32, 2, 4, torch.float32)
    exact = run_experts(hidden, routing, experts, method=method)
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        output = run_experts(hidden, routing, experts, method=method)
    output.sum().backward()
    assert set(seen) == {torch.bfloat16}
    assert output.dtype == torch.float32
    assert experts.up.grad is not None
    assert experts.up.grad.dtype == torch.float32
    assert (output - exact).norm() / exact.norm() < 0.02


def test_a_split_backward_gives_the_same_gradients() -> None:
    """Zero-bubble schedules compute the input's gradient first and the weights' later, with torch's own split."""
    from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

    torch.manual_seed(0)
    layer = MoELayer(DIM, WIDTH, 4)
    hidden = torch.randn(10, DIM, requires_grad=True)
    gradient = torch.randn(10, DIM)
    back_propagate(hidden + layer(hidden), gradient)
    expected = [hidden.grad, *(parameter.grad for parameter in layer.parameters())]
    layer.zero_grad()
    again = hidden.detach().requires_grad_()
    (of_input, *_), groups = stage_backward_input([again + layer(again)], [gradient], [again], layer.parameters())
    stage_backward_weight(layer.parameters(), groups)
    torch.testing.assert_close([of_input, *(parameter.grad for parameter in layer.parameters())], expected)


def layer_by_hand(layer: MoELayer, hidden: Tensor, top_k: int) -> Tensor:
    rows = []
    for token in hidden:
        for router in layer.routers:
            scores = (router.gate.weight @ token).softmax(-1)
            best = scores.argsort(descending=True)[:top_k]
            output = torch.zeros_like(token)
            for expert in best:
                gate, up = (layer.experts.gate_up_proj[expert] @ token).chunk(2)
                output += scores[expert] / scores[best].sum() * (layer.experts.down_proj[expert] @ (F.silu(gate) * up))
            token = output if len(layer.routers) == 1 else token + output
        rows.append(token)
    return torch.stack(rows)


@pytest.mark.parametrize("iterations", [1, 3])
def test_the_layer_token_by_token(iterations: int) -> None:
    torch.manual_seed(0)
    layer = MoELayer(DIM, WIDTH, 4, top_k=2, iterations=iterations).double()
    hidden = torch.randn(2, 5, DIM, dtype=torch.float64)
    expected = layer_by_hand(layer, hidden.view(10, DIM), 2).view(2, 5, DIM)
    torch.testing.assert_close(layer(hidden), expected)


@pytest.mark.parametrize("router", ["softmax", "sigmoid", "gshard", "expert_choice", "null_experts", "cosine"])
def test_every_router_trains_a_layer(router: str) -> None:
    """Teach the layer a function: the loss falls, and whatever the router has for parameters gets a gradient."""
    torch.manual_seed(0)
    layer = MoELayer(DIM, WIDTH, 4, top_k=2, router=router, causal=False)
    hidden = torch.randn(64, DIM)
    target = hidden.roll(1, dims=-1) * hidden.sign()
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.mse_loss(layer(hidden), target)
        loss.backward()
        assert all(parameter.grad is not None for parameter in layer.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_null_experts_save_work_and_their_own_gate_rows() -> None:
    layer = MoELayer(DIM, WIDTH, 4, top_k=3, router=NullExperts(num_null=2))
    assert layer.routers[0].gate.weight.shape == (6, DIM)
    assert layer.experts.down_proj.shape[0] == 4
    assert find_router(layer.routers[0].rule) is layer.routers[0].rule
    _, weights, index = layer.routers[0](torch.randn(100, DIM))
    assert 0 < (index == 4).float().mean() < 1
    assert bool((weights[index == 4] == 0).all())


def test_routers_that_look_ahead_are_warned_about() -> None:
    with pytest.warns(UserWarning, match=r"router ExpertChoice\(capacity_factor=1.0\) looks at later tokens"):
        MoELayer(DIM, WIDTH, 4, router="expert_choice")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MoELayer(DIM, WIDTH, 4, router="expert_choice", causal=False)
        MoELayer(DIM, WIDTH, 4, router=GShard(priority="position"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 5}, "top_k=5 is out of range; it is at least 1 and at most 4"),
        ({"top_k": 0}, "top_k=0"),
        ({"iterations": 0}, "iterations=0 is out of range"),
        ({"width": 0}, "width=0 is out of range"),
        ({"router": "best"}, "router='best' is unknown"),
    ],
)
def test_nonsense_is_refused(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        MoELayer(**{"dim": DIM, "width": WIDTH, "num_experts": 4, **arguments})
