"""Hooks on real models of every family, against the untouched model."""

import copy
import logging
import pickle
import warnings

import cloudpickle
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from skippipe_plugin.moe import MoEConfig, MoELayer, NullExperts, Softmax, quantile_bias
from skippipe_plugin.moe.attach import IMPLEMENTATION, attach
from skippipe_plugin.moe.families import RouterSite, find_routers, find_unknown
from skippipe_plugin.moe.routing import Routing, count_loads
from tests.unit.moe.families import FAMILIES, build, tokens

COUNTS = {"deepseek_v3": 1}  # its first layer is dense


def run(model: nn.Module, **arguments) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Return loss, logits and gradients."""
    model.zero_grad()
    ids = tokens()
    output = model(input_ids=ids, labels=ids, **arguments)
    output.loss.backward()
    zero = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters() if parameter.grad is None}
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return output.loss.detach(), output.logits.detach(), {**zero, **grads}


def eager(family: str, **changes) -> nn.Module:
    return build(family, experts_implementation="eager", **changes)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapted_model_is_the_original(family: str) -> None:
    model = eager(family)
    keys, classes = list(model.state_dict()), [type(module) for module in model.modules()]
    expected = run(model)
    attached = attach(model)
    assert len(attached.hooks) == COUNTS.get(family, 2)
    assert model.config._experts_implementation == IMPLEMENTATION
    torch.testing.assert_close(run(model), expected, atol=1e-5, rtol=1e-5)
    assert (list(model.state_dict()), [type(module) for module in model.modules()]) == (keys, classes)
    for name, hook in attached.hooks.items():
        assert hook.take().loads.sum() == 24 * attached.routers[name].top_k
    attached.detach()
    assert model.config._experts_implementation == "eager"
    torch.testing.assert_close(run(model), expected, atol=0, rtol=0)
    assert all(hook.take().num_tokens == 0 for hook in attached.hooks.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rule_in_place_of_the_model_is_the_model(family: str) -> None:
    """A bias of zero, the model's own if it has one, makes our rule choose instead of the module."""
    model = eager(family)
    expected = run(model)
    attached = attach(model)
    for name, hook in attached.hooks.items():
        own = hook.bias(attached.routers[name])
        hook.set_bias(attached.routers[name], torch.zeros(hook.num_experts) if own is None else own.clone())
    torch.testing.assert_close(run(model), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mixtral", {"num_experts_per_tok": 4}),
        ("gpt_oss", {"num_experts_per_tok": 4}),
        ("qwen3_moe", {"moe_intermediate_size": 7}),
        ("mixtral", {"output_router_logits": True}),
        ("qwen2_moe", {"output_router_logits": True}),
        ("mixtral", {"attn_implementation": "sdpa"}),
    ],
)
def test_corners_of_the_families(family: str, changes: dict) -> None:
    """Every expert for every token, sizes that are no multiple of 16 bytes, the models' own auxiliary loss."""
    model = eager(family, **changes)
    expected = run(model)
    attach(model)
    torch.testing.assert_close(run(model), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_all_tokens_at_one_expert(family: str) -> None:
    def first(logits, top_k, bias):
        return Routing(logits.softmax(-1)[:, :1], torch.zeros(len(logits), 1, dtype=torch.int64))

    model = eager(family)
    attached = attach(model, MoEConfig(router=first, experts="model"))
    expected = run(model)
    attached.detach()
    attached = attach(model, MoEConfig(router=first))
    torch.testing.assert_close(run(model), expected, atol=1e-5, rtol=1e-5)
    assert [hook.take().loads.tolist() for hook in attached.hooks.values()] == [[24, 0, 0, 0]] * 2


def test_captured_logits_are_still_captured() -> None:
    model = eager("mixtral")
    attach(model)
    output = model(input_ids=tokens(), output_router_logits=True)
    assert [logits.shape for logits in output.router_logits] == [(24, 4)] * 2
    assert output.aux_loss is not None


@pytest.mark.parametrize("router", ["softmax", "sigmoid", "gshard"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "granitemoe"])
def test_routers_by_name_take_over(family: str, router: str) -> None:
    """The same as writing the router's answer into the model by hand."""
    from skippipe_plugin.moe import ROUTERS

    model = eager(family)

    def by_hand(module, args, output):
        weights, index = ROUTERS[router]()(output[0], 2, None)
        return (output[0], weights, index.clamp(max=3))  # an empty slot's weight is 0: any expert will do

    sites = find_routers(model)
    handles = [site.router.register_forward_hook(by_hand) for site in sites.values()]
    expected = run(model)
    for handle in handles:
        handle.remove()
    config = MoEConfig(router=router, causal=False)
    attach(model, config)
    torch.testing.assert_close(run(model), expected, atol=1e-5, rtol=1e-5)


def test_expert_choice_takes_over_and_warns() -> None:
    model = eager("mixtral")
    with pytest.warns(UserWarning, match="looks at later tokens"):
        attached = attach(model, MoEConfig(router="expert_choice"))
    run(model)
    assert [hook.take().loads.tolist() for hook in attached.hooks.values()] == [[12] * 4] * 2


def test_capacity_drops_tokens_and_says_so() -> None:
    model = eager("mixtral")
    attached = attach(model, MoEConfig(capacity_factor=0.5))
    run(model)
    for hook in attached.hooks.values():
        taken = hook.take()
        assert int(taken.loads.max()) <= 6
        assert taken.num_empty == 48 - int(taken.loads.sum()) > 0


@pytest.mark.parametrize("top_k", [1, 3])
def test_another_number_of_experts_per_token(top_k: int) -> None:
    model, other = eager("mixtral"), eager("mixtral", num_experts_per_tok=top_k)
    other.load_state_dict(model.state_dict())
    expected = run(other)
    attach(model, MoEConfig(top_k=top_k))
    torch.testing.assert_close(run(model), expected, atol=1e-5, rtol=1e-5)


def test_statistics_are_those_of_the_training_forwards() -> None:
    model = eager("mixtral")
    attached = attach(model)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    router = model.model.layers[0].mlp.gate
    router.register_forward_hook(lambda module, args, output: seen.append((output[0].detach(), output[2])))
    run(model)
    run(model)
    model.eval()
    model(input_ids=tokens())
    taken = attached.hooks["model.layers.0.mlp.gate"].take()
    logits, index = seen[0]
    assert taken.loads.tolist() == (2 * count_loads(index, 4)).tolist()
    assert (taken.num_tokens, taken.num_empty) == (48, 0)
    entropy = torch.distributions.Categorical(logits=logits).entropy().sum().item()
    assert taken.entropy == pytest.approx(2 * entropy, rel=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_quantiles_are_weighted_by_tokens(family: str) -> None:
    changes = {"n_group": 1, "topk_group": 1} if family == "deepseek_v3" else {}
    model = eager(family, **changes)
    attached = attach(model, MoEConfig(quantiles=True))
    name, hook = next(iter(attached.hooks.items()))
    router, logits = attached.routers[name], []
    router.register_forward_hook(lambda module, args, output: logits.append(output[0].detach()))
    for batch in (1, 3):
        model(input_ids=tokens(batch=batch))
    scores = [each.softmax(-1) if family == "mixtral" else each.sigmoid() for each in logits]
    bias = torch.zeros(4) if family == "mixtral" else router.e_score_correction_bias
    taken = hook.take()
    assert taken.num_tokens == 48
    expected = (12 * quantile_bias(scores[0], 2, bias) + 36 * quantile_bias(scores[1], 2, bias)) / 48
    torch.testing.assert_close(taken.quantiles / 48, expected)


def test_quantiles_need_a_router_that_has_them() -> None:
    with pytest.raises(ValueError, match="needs a router that adds its bias to all experts' scores"):
        attach(eager("deepseek_v3"), MoEConfig(quantiles=True))  # limited to groups of experts
    with pytest.raises(ValueError, match=r"has Softmax\(renormalise=True\) with top_k=4 of 4"):
        attach(eager("mixtral", num_experts_per_tok=4), MoEConfig(quantiles=True))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_low_precision_stays_close_to_the_original(family: str, autocast: bool) -> None:
    model = eager(family)
    model = model if autocast else model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = run(model)[0]
        attach(model)
        assert run(model)[0].item() == pytest.approx(expected.item(), abs=0.03)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_counts_once_and_changes_nothing(reentrant: bool) -> None:
    model = eager("qwen3_moe")
    attached = attach(model)
    expected = run(model)
    loads = {name: hook.take().loads.tolist() for name, hook in attached.hooks.items()}
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.testing.assert_close(run(model), expected, atol=1e-6, rtol=1e-6)
    assert {name: hook.take().loads.tolist() for name, hook in attached.hooks.items()} == loads


class Shaky(nn.Module):
    """A layer whose hidden states come out a little different each time, as on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.moe, self.seed = MoELayer(8, 13, 4), 0  # an odd width: the loop, whose shapes follow the loads

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        noise = 0.1 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(self.seed))
        return hidden + self.moe(hidden + noise)


def test_recomputation_replays_the_selection() -> None:
    """Near ties that fall otherwise in the recomputation would change the shapes that autograd saved."""
    torch.manual_seed(0)
    model = Shaky()
    nn.init.normal_(model.moe.routers[0].gate.weight, std=1e-4)  # nothing but near ties
    inputs = [torch.randn(200, 8, requires_grad=True) for _ in range(2)]

    def step() -> None:
        model.seed += 1
        outputs = [checkpoint(model, each, use_reentrant=False, preserve_rng_state=False) for each in inputs]
        model.seed += 1
        for output in outputs:
            output.sum().backward()

    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        step()
    attached = attach(model)
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        step()  # selections are kept from the first recomputation on
    for _ in range(3):
        step()
    (hook,) = attached.hooks.values()
    assert hook.take().num_tokens == 5 * 400 - 400  # the plain first step was not watched


def test_a_bias_moves_tokens() -> None:
    model = eager("mixtral")
    attached = attach(model)
    for name, hook in attached.hooks.items():
        hook.set_bias(attached.routers[name], torch.tensor([10.0, 5.0, 0.0, 0.0]))
    run(model)
    assert [hook.take().loads.tolist() for hook in attached.hooks.values()] == [[24, 24, 0, 0]] * 2


def test_deepseeks_own_bias_is_written() -> None:
    model = eager("deepseek_v3")
    attached = attach(model)
    ((name, hook),) = attached.hooks.items()
    hook.set_bias(attached.routers[name], torch.arange(8.0))
    assert model.model.layers[1].mlp.gate.e_score_correction_bias.tolist() == list(range(8))
    run(model)
    assert hook.take().loads.tolist() == [0] * 6 + [24, 24]


def test_hooks_travel_with_their_blocks() -> None:
    model = eager("mixtral")
    attached = attach(model)
    attached.hooks["model.layers.0.mlp.gate"].set_bias(model.model.layers[0].mlp.gate, torch.tensor([9.0, 0, 0, 0]))
    there = pickle.loads(cloudpickle.dumps(model))
    torch.testing.assert_close(run(there), run(model), atol=0, rtol=0)
    (hook,) = there.model.layers[0].mlp.gate._forward_hooks.values()
    assert hook is not attached.hooks["model.layers.0.mlp.gate"]
    assert hook.take().loads[0] == 24
    there.model.layers[0].mlp.gate.register_forward_hook(lambda *_: None)
    assert len(there.model.layers[0].mlp.gate._forward_hooks) == 2


def test_copies_count_for_themselves() -> None:
    model = eager("mixtral")
    attached = attach(model)
    other = copy.deepcopy(model)
    run(other)
    assert all(hook.take().num_tokens == 0 for hook in attached.hooks.values())


def test_own_layers_are_adapted_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(MoELayer(8, 12, 4), MoELayer(8, 12, 6, iterations=2, router="sigmoid"))
    hidden = torch.randn(10, 8)
    expected = model(hidden)
    attached = attach(model)
    assert list(attached.hooks) == ["0.routers.0", "1.routers.0", "1.routers.1"]
    torch.testing.assert_close(model(hidden), expected, atol=0, rtol=0)
    assert [int(hook.take().loads.sum()) for hook in attached.hooks.values()] == [20] * 3
    attached.hooks["0.routers.0"].set_bias(attached.routers["0.routers.0"], torch.ones(4))
    assert model.state_dict()["0.routers.0.selection_bias"].tolist() == [1.0] * 4


def test_null_experts_of_own_layers_are_counted_balanced_and_kept() -> None:
    torch.manual_seed(0)
    layer = MoELayer(8, 12, 2, top_k=3, router=NullExperts(num_null=2))
    model, hidden = nn.Sequential(layer), torch.randn(50, 8)
    expected = model(hidden)
    attached = attach(model, MoEConfig(auxiliary_loss=0.1))
    torch.testing.assert_close(model(hidden), expected, atol=0, rtol=0)
    ((name, hook),) = attached.hooks.items()
    taken = hook.take()
    assert taken.num_empty == 150 - int(taken.loads.sum()) > 0
    hook.set_bias(attached.routers[name], torch.tensor([1.0, 2.0]))
    assert layer.state_dict()["routers.0.selection_bias"].tolist() == [1.0, 2.0, 0.0, 0.0]
    assert hook.bias(attached.routers[name]).tolist() == [1.0, 2.0]
    model(hidden).sum().backward()
    assert layer.routers[0].gate.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match=r"routers.0 has null experts, which its own router NullExperts\(num_null=2\)"):
        attach(model, MoEConfig(router="softmax"))


class Dbrx(nn.Module):
    """A block of a family that nobody registered."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(4, 2), nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


def test_unknown_experts_stay_and_are_listed_once(caplog) -> None:
    model = nn.Sequential(MoELayer(8, 12, 4), Dbrx(), Dbrx())
    assert find_unknown(model) == ["1 (Dbrx)", "2 (Dbrx)"]
    with caplog.at_level(logging.WARNING):
        attached = attach(model)
    assert [record.getMessage() for record in caplog.records] == [
        "experts of unknown families run as they are: 1 (Dbrx), 2 (Dbrx)"
    ]
    assert list(attached.hooks) == ["0.routers.0"]
    with pytest.raises(ValueError, match=r"no mixture of experts of a known family \(but 0 \(Dbrx\)\)"):
        attach(nn.Sequential(Dbrx()))
    with pytest.raises(ValueError, match="Linear has no mixture of experts of a known family; leave moe out"):
        attach(nn.Linear(2, 2))


def test_a_family_is_one_small_function(monkeypatch) -> None:
    from skippipe_plugin.moe import families

    class MyRouter(nn.Linear):
        def forward(self, hidden):
            logits = super().forward(hidden)
            return (logits, *Softmax()(logits, 1))

    class MyBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pick, self.work = MyRouter(4, 3), nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, hidden):
            _, weights, index = self.pick(hidden)
            return sum(torch.where(index == i, weights, 0) * expert(hidden) for i, expert in enumerate(self.work))

    monkeypatch.setattr(families, "_FAMILIES", list(families._FAMILIES))

    @families.register_family
    def my_family(module: nn.Module) -> list[RouterSite]:
        if not isinstance(module, MyBlock):
            return []
        return [RouterSite(router=module.pick, experts=module.work, num_experts=3, top_k=1, rule=Softmax())]

    model = nn.Sequential(MyBlock())
    attached = attach(model)
    attached.hooks["0.pick"].set_bias(attached.routers["0.pick"], torch.tensor([0.0, 9.0, 0.0]))
    model(torch.randn(5, 4))
    assert attached.hooks["0.pick"].take().loads.tolist() == [0, 5, 0]


def test_nan_logits_name_the_layer() -> None:
    model = eager("mixtral")
    attach(model)
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"router logits of model.layers.1.mlp.gate are NaN for 24 of 24 tokens"):
        run(model)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"router": "best"}, "router='best' is unknown; choose one of softmax"),
        ({"router": "cosine"}, "router='cosine' has parameters of its own"),
        ({"capacity_factor": 0.0}, "capacity_factor=0.0 is out of range"),
        ({"top_k": 0}, "top_k=0 is out of range"),
        ({"experts": "fast"}, "experts='fast' is unknown"),
        ({"experts": "model", "capacity_factor": 1.0}, "experts='model' cannot leave slots empty"),
        ({"experts": "model", "router": "gshard"}, "experts='model' cannot leave slots empty"),
        ({"freeze_after": -1}, "freeze_after=-1 is out of range"),
        ({"auxiliary_loss": -1.0}, "auxiliary_loss=-1.0 is out of range"),
        ({"top_k": 9}, "top_k=9 is out of range for model.layers.0.mlp.gate; .* at most 4"),
        ({"router": "null_experts"}, "needs logits of its own for null experts.*Use it with MoELayer"),
    ],
)
def test_nonsense_is_refused(config: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attach(eager("mixtral"), MoEConfig(**config))


def test_a_wrong_bias_is_refused() -> None:
    model = eager("mixtral")
    attached = attach(model)
    name, hook = next(iter(attached.hooks.items()))
    with pytest.raises(ValueError, match=r"a bias \(3,\) does not fit the 4 experts of model.layers.0.mlp.gate"):
        hook.set_bias(attached.routers[name], torch.zeros(3))


def test_no_warning_about_the_models_own_router() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(eager("mixtral"))
