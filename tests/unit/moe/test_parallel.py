"""Experts spread over ranks (threads here) against the same model in one piece."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from skippipe_plugin.moe import MoEConfig, MoELayer
from skippipe_plugin.moe.attach import attach
from skippipe_plugin.moe.routing import Routing
from tests.unit.moe.families import FAMILIES, build, tokens
from tests.unit.moe.together import Rank, gradients, run_together, spread

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
RANKS = 4


def answer(model: nn.Module, ids: Tensor, share: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return loss and logits, after a backward of the loss's share."""
    output = model(input_ids=ids, labels=ids)
    (output.loss * share).backward()
    return output.loss.detach(), output.logits.detach()


def meet(rank: Rank, work: Any) -> Any:
    """Let a rank work with all the others there."""
    rank.company.enter([True] * rank.company.exchange.size)
    result = work()
    rank.company.leave()
    return result


def compare(model: nn.Module, ranks: Sequence[Rank], batches: Sequence[Tensor | None]) -> None:
    """Let each rank do its batch, or none, and the original all of them; compare outputs and gradients."""
    weight = 1 / sum(batch is not None for batch in batches)
    expected = [None if batch is None else answer(model, batch, weight) for batch in batches]
    present = [batch is not None for batch in batches]

    def work(rank: Rank) -> Any:
        batch = batches[rank.position]
        if batch is None:
            rank.company.attend(0)
            rank.company.attend(0)
            return None
        rank.company.enter(present)
        output = rank.model(input_ids=batch, labels=batch)
        rank.company.leave()
        rank.company.enter(present)
        (output.loss * weight).backward()
        rank.company.leave()
        return output.loss.detach(), output.logits.detach()

    found = run_together(ranks, work)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)
    whole = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    torch.testing.assert_close(gradients(ranks), whole, **CLOSE)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_the_model_in_one_piece(family: str, size: int) -> None:
    model = build(family)
    compare(model, spread(model, size), [tokens(seed, batch=1 + seed % 2) for seed in range(size)])


CORNERS = {
    "one token": ("mixtral", {}, [1, 1]),
    "all experts for every token": ("mixtral", {"num_experts_per_tok": 4}, [5, 7]),
    "odd sizes": ("qwen3_moe", {"moe_intermediate_size": 7}, [5, 3]),
    "the model's auxiliary loss": ("mixtral", {"output_router_logits": True}, [6, 6]),
    "transposed with biases": ("gpt_oss", {"num_experts_per_tok": 4}, [1, 9]),
}


@pytest.mark.parametrize("case", CORNERS)
def test_corners(case: str) -> None:
    family, changes, lengths = CORNERS[case]
    model = build(family, **changes)
    compare(model, spread(model, 2), [tokens(seed, 1, max(2, length)) for seed, length in enumerate(lengths)])


@pytest.mark.parametrize("expert", [0, 3])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_all_tokens_at_one_expert(family: str, expert: int) -> None:
    """One rank computes everything, the other nothing; its experts still get gradients, of zeros."""

    def to_one(logits: Tensor, top_k: int, bias: Tensor | None) -> Routing:
        return Routing(logits.softmax(-1)[:, :1], torch.full((len(logits), 1), expert))

    model = build(family)
    compare(model, spread(model, 2, config=MoEConfig(router=to_one)), [tokens(0), tokens(1)])


@pytest.mark.parametrize("absent", [(0,), (1,), (0, 2)], ids=str)
@pytest.mark.parametrize("recompute", [False, True], ids=["", "recomputed"])
def test_ranks_without_tokens_take_part(absent: tuple[int, ...], recompute: bool) -> None:
    model = build("qwen2_moe")
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batches = [None if position in absent else tokens(position) for position in range(RANKS)]
    compare(model, spread(model, RANKS), batches)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activations_are_recomputed(reentrant: bool) -> None:
    model = build("mixtral")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    ranks = spread(model, 2)
    compare(model, ranks, [tokens(0), tokens(1, batch=1)])
    hooks = [hook for rank in ranks for module in rank.model.modules() for hook in module._forward_hooks.values()]
    counts = [hook.take().num_tokens for hook in hooks if hasattr(hook, "take")]
    assert counts == [24, 24, 12, 12]  # once each


@pytest.mark.parametrize("degree", [2, 3, 8])
def test_chunks_that_overlap_change_nothing(degree: int) -> None:
    """Also with more chunks than one rank has tokens, and one rank that has none."""
    model = build("deepseek_v3")
    ranks = spread(model, 3 if degree == 3 else 2) if degree != 3 else spread(model, 4)
    for rank in ranks:
        rank.company.degree = degree
    batches: list[Tensor | None] = [tokens(0), tokens(1, 1, 2), None, tokens(3)]
    compare(model, ranks, batches[: len(ranks)])


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_any_placement_gives_the_same(family: str) -> None:
    model = build(family)
    attach(model)
    paths = [name for name, module in model.named_modules() if name.endswith("experts")]
    placements = {paths[0]: (1, 0, 1, 0), paths[1]: (0, 1, 1, 0)}
    compare(model, spread(model, 2, placements), [tokens(0), tokens(1)])


@settings(max_examples=25)
@given(
    counts=st.lists(st.integers(0, 9), min_size=2, max_size=4),
    experts_per_rank=st.integers(1, 3),
    top_k=st.integers(1, 3),
    degree=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
def test_any_number_of_tokens_and_empty_slots(
    counts: list[int], experts_per_rank: int, top_k: int, degree: int, seed: int
) -> None:
    """Random choices with empty slots, on a layer alone; ranks may have no tokens and still call."""
    torch.manual_seed(seed)
    size = len(counts)
    layer = MoELayer(8, 12, size * experts_per_rank)
    ranks = spread(layer, size)
    hidden = [torch.randn(count, 8) for count in counts]
    index = [torch.randint(0, size * experts_per_rank + 1, (count, top_k)) for count in counts]
    weights = [torch.rand(count, top_k) for count in counts]
    whole = layer.experts(torch.cat(hidden), torch.cat(index), torch.cat(weights))
    (whole**2).sum().backward()

    def work(rank: Rank) -> tuple[Tensor, Tensor]:
        rank.company.degree = degree
        own = hidden[rank.position].requires_grad_()
        output = meet(rank, lambda: rank.model.experts(own, index[rank.position], weights[rank.position]))
        meet(rank, (output**2).sum().backward)
        return output.detach(), own.grad

    outputs, _ = zip(*run_together(ranks, work), strict=True)
    torch.testing.assert_close(torch.cat(outputs), whole.detach(), **CLOSE)
    found, expected = gradients(ranks), {f"experts.{n}": p.grad for n, p in layer.experts.named_parameters()}
    torch.testing.assert_close({name: found[name] for name in expected}, expected, **CLOSE)


def test_iterations_share_the_experts() -> None:
    """Chain-of-Experts calls the same experts several times."""
    layer = MoELayer(8, 12, 4, iterations=3, router="sigmoid")
    ranks = spread(layer, 2)
    inputs = [torch.randn(5, 8), torch.randn(3, 8)]
    expected = [layer(each) for each in inputs]
    sum(each.square().sum() for each in expected).backward()

    def work(rank: Rank) -> Tensor:
        output = meet(rank, lambda: rank.model(inputs[rank.position]))
        meet(rank, output.square().sum().backward)
        return output.detach()

    torch.testing.assert_close(run_together(ranks, work), [each.detach() for each in expected], **CLOSE)
    whole = {name: each.grad for name, each in layer.named_parameters()}
    torch.testing.assert_close(gradients(ranks), whole, **CLOSE)


@pytest.mark.parametrize("absent", [False, True])
def test_autocast_is_kept(absent: bool) -> None:
    """Rows travel in bfloat16, and a rank that attends computes in it."""
    layer = MoELayer(16, 32, 4)
    ranks = spread(layer, 2)
    hidden = torch.randn(12, 16)
    parts = [hidden, None] if absent else [hidden[:7], hidden[7:]]
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(hidden)
    expected.sum().backward()
    present = [part is not None for part in parts]

    def work(rank: Rank) -> Tensor:
        part = parts[rank.position]
        if part is None:
            rank.company.attend(0)
            rank.company.attend(0)
            return torch.empty(0, 16)
        rank.company.enter(present)
        with torch.autocast("cpu", torch.bfloat16):
            output = rank.model(part)
        rank.company.leave()
        rank.company.enter(present)
        output.sum().backward()
        rank.company.leave()
        return output.detach()

    torch.testing.assert_close(torch.cat(run_together(ranks, work)), expected.detach(), atol=1e-2, rtol=1e-2)
    whole = {name: each.grad for name, each in layer.named_parameters()}
    torch.testing.assert_close(gradients(ranks), whole, atol=2e-2, rtol=2e-2)


def test_without_gradients_nothing_is_kept() -> None:
    model = build("mixtral")
    ranks = spread(model, 2)
    with torch.no_grad():
        expected = model(input_ids=tokens()).logits

    def work(rank: Rank) -> Tensor | None:
        if rank.position:
            rank.company.attend(0)
            return None
        with torch.no_grad():
            rank.company.enter([True, False])
            logits = rank.model(input_ids=tokens()).logits
            rank.company.leave()
        return logits

    found, nothing = run_together(ranks, work)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert nothing is None
    assert all(not call.output.requires_grad for call in ranks[1].company._attended[0].values())


def test_the_auxiliary_loss_counts_the_tokens_of_all_ranks() -> None:
    """Two halves of a batch on two ranks: the gradient is that of the whole batch in one piece."""
    config = MoEConfig(auxiliary_loss=0.5)
    model = build("mixtral")
    ranks = spread(model, 2, config=config)
    ids = tokens(batch=4)
    answer(model, ids)
    for rank in ranks:
        for module in rank.model.modules():
            for hook in module._forward_hooks.values():
                hook.loss_scale = 0.5

    def work(rank: Rank) -> None:
        meet(rank, lambda: answer(rank.model, ids[2 * rank.position : 2 * rank.position + 2], 0.5))

    run_together(ranks, work)
    whole = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    torch.testing.assert_close(gradients(ranks), whole, **CLOSE)
