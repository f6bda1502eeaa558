"""What stands between, around and beside the blocks: exact, or refused with a way out that is exact."""

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.partition import PartitionError
from tests.e2e.modules import loader
from tests.e2e.support import assert_same_run, train, trainer_for
from tests.grids import all_slow_but, slow

DATA = loader(torch.randn(32, 4, generator=torch.Generator().manual_seed(0)), 8)
STEPS = 3
SETTINGS: dict[str, dict[str, Any]] = {
    "1f1b": {},
    "gpipe": {"schedule": "gpipe"},
    "driver_stage": {"driver_stage": True},
    "one microbatch": {"num_microbatches": 1},
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + torch.tanh(self.linear(self.norm(hidden)))


class Model(LightningModule):
    """An embedding, blocks and a head; tests say what comes between."""

    block: Callable[[], nn.Module] = Block
    around: Callable[[Any, Tensor], Tensor] | None = None

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 1)
        self.blocks = self.make_blocks()

    def make_blocks(self) -> nn.Module:
        return nn.ModuleList([type(self).block() for _ in range(4)])

    def stack(self, hidden: Tensor) -> Tensor:
        for block in self.blocks:
            hidden = block(hidden)
        return hidden

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stack(self.embed(x)))

    def training_step(self, batch: Tensor, index: int) -> Any:
        return F.mse_loss(self(batch), batch.pow(2).sum(1, keepdim=True))

    def predict_step(self, batch: Tensor, index: int) -> Any:
        return self(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # Weight decay and momentum tell a gradient of zero from none.
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9, weight_decay=0.1)


def made(**members: Any) -> Callable[[], Model]:
    """A class of models with some members of its own."""
    members = {name: staticmethod(each) if name == "block" else each for name, each in members.items()}
    return type("Made", (Model,), members)


def settings(options: dict[str, Any]) -> dict[str, Any]:
    return {"num_microbatches": 2, "verbose": False, **options}


def fit(make: Callable[[], Model], options: dict[str, Any] | None = None, **trainer: Any) -> Any:
    return train(make, DATA, 3, settings(options or {}), max_steps=STEPS, **trainer)


def assert_exact(make: Callable[[], Model], options: dict[str, Any] | None = None, **trainer: Any) -> None:
    assert_same_run(fit(make, options, **trainer), train(make, DATA, 1, max_steps=STEPS, **trainer))


def predict(make: Callable[[], Model], devices: int) -> Tensor:
    torch.manual_seed(0)
    model = make()
    return torch.cat(trainer_for(devices, settings({}) if devices > 1 else None).predict(model, DATA))


# Between ------------------------------------------------------------------------------------------


def after_second(use: Callable[[Any, Tensor], Tensor]) -> Callable[[], Model]:
    """``use`` gets the output of the second block, and returns what goes on."""

    def stack(self: Model, hidden: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            hidden = block(hidden)
            if index == 1:
                hidden = use(self, hidden)
        return hidden

    return made(stack=stack)


def logged(self: Model, hidden: Tensor) -> Tensor:
    self.log("norm", hidden.norm())
    return hidden


def zeroed(self: Model, hidden: Tensor) -> Tensor:
    hidden[:, 0] = 0
    return hidden


def weighed(self: Model, hidden: Tensor) -> Tensor:
    with torch.no_grad():
        weight = hidden.softmax(-1)
    return hidden * (1 + weight)


USES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "scaled": lambda self, h: h * 2,
    "projected by layers on the driver": lambda self, h: self.embed(F.linear(h, self.embed.weight.T)) * self.head(h),
    "in two parts": lambda self, h: torch.cat(h.chunk(2, -1)[::-1], -1),
    "chosen": lambda self, h: torch.where(h > 0, h, 0.1 * h),
    "rows and columns": lambda self, h: h[:, [1, 0, *range(2, 8)]].unsqueeze(1).expand(-1, 2, -1).mean(1),
    "without gradients in part": weighed,
    "asked for strides": lambda self, h: h.as_strided((h.shape[0], 8), h.stride()),
    "of all samples": lambda self, h: h - h.mean(0),
    "in another dtype": lambda self, h: h.double().tanh().float(),
    "logged": logged,
    "normed": lambda self, h: F.layer_norm(h, (8,)),
    "detached": lambda self, h: h.detach(),
    "viewed": lambda self, h: h.view(-1, 8),
    "dropped out": lambda self, h: F.dropout(h, 0.0),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_code_between_blocks_is_exact(use: Any) -> None:
    assert_exact(after_second(use))


@pytest.mark.slow
@pytest.mark.parametrize("options", [*SETTINGS.values(), {"microbatches": "stack"}], ids=[*SETTINGS, "stack"])
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_code_between_blocks_is_exact_with(use: Any, options: dict[str, Any]) -> None:
    assert_exact(after_second(use), options)


def skipping(self: Model, hidden: Tensor) -> Tensor:
    """The second half gets the sum with, and a projection of, what the first half has made."""
    first = self.blocks[0](hidden)
    second = self.blocks[1](first)
    third = self.blocks[2](second + 0.1 * first)
    return self.blocks[3](
        F.linear(
            torch.cat([third, first], -1), torch.cat([self.head.weight.T, self.embed.weight], 1).repeat(1, 4)[:, :16]
        )
    )


def balancing(self: Model, batch: Tensor, index: int) -> Tensor:
    """Something of each block's output is added up on the way."""
    hidden, balance = self.embed(batch), 0.0
    for block in self.blocks:
        hidden = block(hidden)
        balance = balance + hidden.var(-1).mean()
    return F.mse_loss(self.head(hidden), batch.sum(1, keepdim=True)) + 0.1 * balance


@pytest.mark.parametrize("options", [{}, {"microbatches": "stack"}], ids=["batch", "stack"])
@pytest.mark.parametrize("members", [{"stack": skipping}, {"training_step": balancing}], ids=["skips", "a sum"])
def test_code_that_computes_with_several_outputs(members: dict[str, Any], options: dict[str, Any]) -> None:
    assert_exact(made(**members), options)


@pytest.mark.parametrize("options", [{"microbatches": "stack"}, {"num_microbatches": 1}], ids=["stack", "one"])
def test_noise_between_blocks_is_that_of_one_process(options: dict[str, Any]) -> None:
    assert_exact(after_second(lambda self, h: h + 0.1 * torch.randn_like(h) * torch.rand_like(h[:, :1])), options)


def branching(self: Model, hidden: Tensor) -> Tensor:
    return hidden * 2 if hidden.mean() > 0 else hidden


def normalized(self: Model, hidden: Tensor) -> Tensor:
    self.batch_norm = getattr(self, "batch_norm", nn.BatchNorm1d(8))
    return self.batch_norm(hidden)


VALUES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "an if": branching,
    "statistics": normalized,
    "rows": lambda self, h: h[h[:, 0] > 0],
    "a number": lambda self, h: h * float(h.mean()),
    "numpy": lambda self, h: torch.from_numpy(h.detach().numpy()),
}


@pytest.mark.parametrize("use", VALUES.values(), ids=VALUES)
def test_code_between_blocks_that_needs_values_is_refused_and_the_parts_that_are_named_are_exact(use: Any) -> None:
    make = after_second(use)
    with pytest.raises(SkipPipeError, match=r'output of blocks\.1 .*blocks="blocks\.0:2" or blocks="blocks\.2:4"'):
        fit(make)
    if use is branching:
        assert_exact(make, {"blocks": "blocks.0:2"})
        assert_exact(make, {"blocks": "blocks.2:4"})


def test_code_that_changes_what_is_between_in_place() -> None:
    with pytest.raises(SkipPipeError, match=r"output of blocks\.1 \(__setitem__\)"):
        fit(after_second(zeroed))
    assert_exact(after_second(zeroed), {"blocks": "blocks.0:2"})


def collecting(self: Model, hidden: Tensor) -> Tensor:
    seen = []
    for block in self.blocks:
        hidden = block(hidden)
        seen.append(hidden)
    return torch.stack(seen).mean(0)


def supervising(self: Model, batch: Tensor, index: int) -> Tensor:
    hidden, loss = self.embed(batch), torch.zeros(())
    for block in self.blocks:
        hidden = block(hidden)
        loss = loss + self.head(hidden).pow(2).mean()
    return loss


def keeping(self: Model, hidden: Tensor) -> Tensor:
    self.seen = []
    for block in self.blocks:
        self.seen.append(hidden)
        hidden = block(hidden)
    return hidden + self.seen[2]


def remembering(self: Model, hidden: Tensor) -> Tensor:
    if getattr(self, "last", None) is not None:
        hidden = hidden + self.last.detach()
    hidden = self.blocks[0](hidden)
    self.last = hidden
    for block in list(self.blocks)[1:]:
        hidden = block(hidden)
    return hidden


@pytest.mark.parametrize(
    "members",
    [{"stack": collecting}, {"training_step": supervising}, {"stack": keeping}, {"stack": remembering}],
    ids=["mean of all", "a loss on each", "kept in a list", "used in the next step"],
)
def test_outputs_of_many_layers(members: dict[str, Any]) -> None:
    assert_exact(made(**members))


@pytest.mark.parametrize("stack", [collecting, keeping])
def test_outputs_of_many_layers_in_prediction(stack: Any) -> None:
    make = made(stack=stack)
    torch.testing.assert_close(predict(make, 3), predict(make, 1))


class Skip(Block):
    def forward(self, hidden: Tensor, skip: Tensor | None = None) -> Tensor:
        return super().forward(hidden if skip is None else hidden + skip)


def long_skip(self: Model, hidden: Tensor) -> Tensor:
    first = self.blocks[0](hidden)
    second = self.blocks[1](first, first)
    return self.blocks[3](self.blocks[2](second, skip=first))


def test_a_skip_connection_between_blocks() -> None:
    assert_exact(made(block=Skip, stack=long_skip))


def asks_about_the_form(self: Model, hidden: Tensor) -> Tensor:
    for block in self.blocks:
        hidden = block(hidden).to(hidden.dtype).contiguous()
        assert hidden.shape[0] == hidden.size(0) == len(hidden)
        assert hidden.dim() == 2
        assert hidden.requires_grad == torch.is_grad_enabled()
        assert "8]" in f"{hidden}" or "tensor" in f"{hidden}"
    return hidden


def test_questions_about_the_form_are_answered() -> None:
    assert_exact(made(stack=asks_about_the_form))


# The same hidden states again -----------------------------------------------------------------------


class Twice(Block):
    def forward(self, hidden: Tensor, memory: Any = None, *, again: Any = None) -> Tensor:
        memory = memory if again is None else again
        memory = memory["memory"] if isinstance(memory, dict) else memory
        return super().forward(hidden) + 0.1 * self.linear(memory)


AGAIN: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "positional": lambda block, h: block(h, h),
    "keyword": lambda block, h: block(h, again=h),
    "in a dict": lambda block, h: block(h, {"memory": h}),
    "mixed": lambda block, h: block(h, h, again={"memory": h}),
}


def calling(call: Callable[[nn.Module, Tensor], Tensor], embed: Any = nn.Identity) -> dict[str, Any]:
    def stack(self: Model, hidden: Tensor) -> Tensor:
        for block in self.blocks:
            hidden = call(block, hidden)
        return hidden

    return {"stack": stack, "block": Twice}


@pytest.mark.parametrize(
    "options", all_slow_but(SETTINGS.values(), SETTINGS["1f1b"], SETTINGS["driver_stage"]), ids=SETTINGS
)
@pytest.mark.parametrize("call", AGAIN.values(), ids=AGAIN)
def test_the_hidden_states_in_two_places(call: Any, options: dict[str, Any]) -> None:
    assert_exact(made(**calling(call)), options)


@pytest.mark.parametrize("call", AGAIN.values(), ids=AGAIN)
def test_the_hidden_states_in_two_places_of_a_prediction(call: Any) -> None:
    make = made(**calling(call))
    torch.testing.assert_close(predict(make, 3), predict(make, 1))


def first_input(self: Model, hidden: Tensor) -> Tensor:
    first = hidden
    for block in self.blocks:
        hidden = block(hidden, first)
    return hidden


def test_what_entered_the_stack_in_every_block() -> None:
    make = made(stack=first_input, block=Twice)
    torch.testing.assert_close(predict(make, 3), predict(make, 1))
    assert_exact(make)


# In place -------------------------------------------------------------------------------------------


class InPlace(Block):
    """Begins by changing its input."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(F.relu(hidden, inplace=True))


class Added(Block):
    def forward(self, hidden: Tensor) -> Tensor:
        hidden += 0.1
        return super().forward(hidden)


def residual_in_place(self: Model, hidden: Tensor) -> Tensor:
    residual = hidden
    for block in self.blocks:
        hidden = block(hidden)
    hidden += residual
    return F.relu(hidden, inplace=True)


def scaled_in_place(self: Model, hidden: Tensor) -> Tensor:
    for block in self.blocks:
        hidden = block(hidden)
    hidden[:, 0] = 0
    return hidden.mul_(2)


def around(self: Model, hidden: Tensor) -> Tensor:
    return hidden + Model.stack(self, hidden)


def conditioned(self: Model, x: Tensor) -> Tensor:
    """Something of the embedding is used after the blocks, too."""
    condition = torch.tanh(self.embed(x))
    return self.head(self.stack(condition * 2) * condition)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(options, id=name, marks=pytest.mark.slow if name in ("gpipe", "one microbatch") else ())
        for name, options in {**SETTINGS, "replicas": {"skip_ratio": 0.0, "replicas": 2}}.items()
    ],
)
@pytest.mark.parametrize(
    "members",
    [
        {"stack": residual_in_place},
        {"stack": scaled_in_place},
        {"stack": around},
        {"forward": conditioned},
        {"block": InPlace},
        {"block": Added},
        {"block": InPlace, "stack": scaled_in_place},
    ],
    ids=["residual", "scaled", "around", "conditioned", "in blocks", "added in blocks", "both"],
)
def test_in_place_and_around_the_blocks(members: dict[str, Any], options: dict[str, Any]) -> None:
    assert_exact(made(**members), options)


class InPlaceWhenLarge(Block):
    """Changes its input in place only with data that no question about the block has."""

    def forward(self, hidden: Tensor) -> Tensor:
        if hidden.detach().mean() > 5:
            hidden -= 9
        return 9 + super().forward(hidden)


class CountingWhenLarge(InPlaceWhenLarge):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, hidden: Tensor) -> Tensor:
        self.count += 1
        return super().forward(hidden)


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_in_place_that_depends_on_the_data(options: dict[str, Any]) -> None:
    assert_exact(made(block=InPlaceWhenLarge), options)
    with pytest.raises(SkipPipeError, match=r"changes its input in place, which it did not do .* make a new tensor"):
        fit(made(block=CountingWhenLarge), options)


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("stack", [residual_in_place, around])
def test_a_residual_around_blocks_that_change_their_input(stack: Any, options: dict[str, Any]) -> None:
    with pytest.raises(SkipPipeError, match=r"blocks\.0 changes the hidden states that enter it in place"):
        fit(made(block=InPlace, stack=stack), options)


def test_a_residual_around_the_same_blocks_out_of_place() -> None:
    class OutOfPlace(Block):
        def forward(self, hidden: Tensor) -> Tensor:
            return super().forward(F.relu(hidden))

    assert_exact(made(block=OutOfPlace, stack=around))
    assert_exact(made(block=InPlace, stack=lambda self, hidden: hidden + Model.stack(self, hidden.clone())))


def changes_what_entered(self: Model, hidden: Tensor) -> Tensor:
    entered = hidden.clone()
    hidden = self.blocks[0](entered)
    with torch.no_grad():
        entered.add_(1)
    for block in list(self.blocks)[1:]:
        hidden = block(hidden)
    return hidden


def test_what_entered_is_changed_before_the_blocks_run() -> None:
    with pytest.raises(SkipPipeError, match=r"hidden states that entered the first block .* were changed in place"):
        fit(made(stack=changes_what_entered))


# Without gradients ----------------------------------------------------------------------------------


def under_no_grad(self: Model, x: Tensor) -> Tensor:
    with torch.no_grad():
        hidden = self.stack(self.embed(x))
    return self.head(hidden)


def under_inference_mode(self: Model, x: Tensor) -> Tensor:
    with torch.inference_mode():
        hidden = self.stack(self.embed(x))
    return self.head(hidden.clone())


def only_the_embedding_under_no_grad(self: Model, x: Tensor) -> Tensor:
    with torch.no_grad():
        hidden = self.embed(x)
    return self.head(self.stack(hidden))


def for_some_batches(self: Model, x: Tensor) -> Tensor:
    with torch.set_grad_enabled(bool(self.global_step % 2)):
        hidden = self.stack(self.embed(x))
    return self.head(hidden)


def without_the_blocks(self: Model, x: Tensor) -> Tensor:
    self.stack(self.embed(x))
    return self.head(self.embed(x))


def detached(self: Model, x: Tensor) -> Tensor:
    return self.head(self.stack(self.embed(x)).detach())


def without_the_blocks_at_times(self: Model, x: Tensor) -> Tensor:
    hidden = self.stack(self.embed(x))
    return self.head(hidden if self.global_step == 1 else self.embed(x))


class Stopping(Block):
    """Lets no gradient through to its input."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden.detach())


def freezing(*parts: str) -> Callable[[Model], None]:
    def __init__(self: Model) -> None:
        Model.__init__(self)
        for part in parts:
            self.get_submodule(part).requires_grad_(False)

    return __init__


FROZEN: dict[str, dict[str, Any]] = {
    "no_grad": {"forward": under_no_grad},
    "inference mode": {"forward": under_inference_mode},
    "embedding": {"forward": only_the_embedding_under_no_grad},
    "at times": {"forward": for_some_batches},
    "frozen": {"__init__": freezing("embed", "blocks")},
    "frozen prefix": {"__init__": freezing("embed", "blocks.0", "blocks.1")},
    "frozen blocks": {"__init__": freezing("blocks")},
    "frozen in the middle": {"__init__": freezing("blocks.1", "blocks.2")},
    "unused": {"forward": without_the_blocks},
    "unused at times": {"forward": without_the_blocks_at_times},
    "detached": {"forward": detached},
    "stopped": {"block": Stopping},
    "frozen end": {"__init__": freezing("blocks.2", "blocks.3")},
}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(options, id=name, marks=() if name == "1f1b" else pytest.mark.slow)
        for name, options in {**SETTINGS, "replicas": {"replicas": 2}}.items()
    ],
)
@pytest.mark.parametrize("members", FROZEN.values(), ids=FROZEN)
def test_steps_without_some_gradients(members: dict[str, Any], options: dict[str, Any]) -> None:
    assert_exact(made(**members), options)


@pytest.mark.parametrize("members", [FROZEN["no_grad"], FROZEN["at times"], FROZEN["unused at times"]])
def test_steps_without_gradients_accumulate(members: dict[str, Any]) -> None:
    assert_exact(made(**members), accumulate_grad_batches=2)


class Distilled(LightningModule):
    """The larger stack is the teacher's, which only runs forward."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher, self.student = Model(), nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        with torch.no_grad():
            wanted = self.teacher(batch)
        return F.mse_loss(self.student(batch), wanted)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.student.parameters(), lr=0.01, eps=1e-4)


def test_a_teacher_that_is_the_larger_stack() -> None:
    assert_exact(Distilled)


def twice_first_without(self: Model, batch: Tensor, index: int) -> Tensor:
    with torch.no_grad():
        wanted = self(batch)
    return F.mse_loss(self(batch), 0.5 * wanted + 1)


def test_a_stack_that_is_called_twice_once_without_gradients() -> None:
    assert_exact(made(training_step=twice_first_without))


# Arguments ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Meta:
    bias: Any
    scale: float = 1.0


class Given(Block):
    """Adds what it is given."""

    def forward(self, hidden: Tensor, context: Any) -> Tensor:
        bias = context["bias"] if isinstance(context, dict) else getattr(context, "bias", context)
        bias = torch.from_numpy(bias).to(hidden.device) if isinstance(bias, np.ndarray) else bias
        return super().forward(hidden) + bias


def giving(make: Callable[[Tensor, int], Any]) -> Callable[[], Model]:
    def stack(self: Model, x: Tensor) -> Tensor:
        hidden = self.embed(x)
        for index, block in enumerate(self.blocks):
            hidden = block(hidden, make(x, index))
        return self.head(hidden)

    return made(forward=stack, block=Given)


SHARED = {"bias": 0.0}


def changed_in_between(x: Tensor, index: int) -> dict[str, float]:
    SHARED["bias"] = 0.1 * index
    return SHARED


ARGUMENTS: dict[str, Callable[[Tensor, int], Any]] = {
    "dataclass": lambda x, index: Meta(x.repeat(1, 2)),
    "namespace": lambda x, index: SimpleNamespace(bias=x.repeat(1, 2)),
    "array": lambda x, index: x.repeat(1, 2).cpu().numpy(),
    "array in an object": lambda x, index: Meta(x.repeat(1, 2).cpu().numpy()),
    "number of its own": lambda x, index: 0.1 * index,
    "one dict that changes": changed_in_between,
    "integers and floats": lambda x, index: [True, 1, 1.0, torch.ones(())][index],
    "dict": lambda x, index: {"bias": x.repeat(1, 2), 1: "more"},
}


@pytest.mark.parametrize("options", [slow({}), {"driver_stage": True}], ids=["workers", "driver_stage"])
@pytest.mark.parametrize("make", ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments_arrive(make: Any, options: dict[str, Any]) -> None:
    assert_exact(giving(make), options)


def writes_to_the_dict(hidden: Tensor, context: Any) -> None:
    context["seen"] = hidden.mean()


def appends(hidden: Tensor, context: Any) -> None:
    context["list"].append(1)


def counts(hidden: Tensor, context: Any) -> None:
    context["object"].bias += 1


def fills(hidden: Tensor, context: Any) -> None:
    context["tensor"].fill_(1)


@pytest.mark.parametrize("options", [{}, {"driver_stage": True}], ids=["workers", "driver_stage"])
@pytest.mark.parametrize("write", [writes_to_the_dict, appends, counts, fills])
def test_blocks_that_change_an_argument(write: Any, options: dict[str, Any]) -> None:
    class Writing(Block):
        def forward(self, hidden: Tensor, context: Any) -> Tensor:
            write(hidden, context)
            return super().forward(hidden)

    def stack(self: Model, hidden: Tensor) -> Tensor:
        context = {"list": [], "object": SimpleNamespace(bias=0), "tensor": torch.zeros(8)}
        for block in self.blocks:
            hidden = block(hidden, context)
        return hidden

    with pytest.raises(SkipPipeError, match=r"block 0 changes its argument 'context'"):
        fit(made(block=Writing, stack=stack), options)


class Masked(Block):
    def __init__(self, copies: bool = False) -> None:
        super().__init__()
        self.copies = copies

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        mask = mask.clone() if self.copies else mask
        mask[:, 0] = 1
        return super().forward(hidden) * mask


@pytest.mark.parametrize("copies", [False, True])
def test_a_mask_that_blocks_fill_in(copies: bool) -> None:
    def stack(self: Model, hidden: Tensor) -> Tensor:
        mask = torch.ones(len(hidden), 8, device=hidden.device)
        for block in self.blocks:
            hidden = block(hidden, mask)
        return hidden

    make = made(block=lambda: Masked(copies), stack=stack)
    if copies:
        assert_exact(make)
    else:
        with pytest.raises(SkipPipeError, match=r"block 0 changes its argument 'mask' in place.*change a copy"):
            fit(make)


def test_a_tensor_that_the_step_changes_between_blocks() -> None:
    def stack(self: Model, hidden: Tensor) -> Tensor:
        bias = torch.zeros(8, device=self.device)
        for block in self.blocks:
            hidden = block(hidden, bias)
            bias += 0.1
        return hidden

    def out_of_place(self: Model, hidden: Tensor) -> Tensor:
        bias = torch.zeros(8, device=self.device)
        for block in self.blocks:
            hidden = block(hidden, bias)
            bias = bias + 0.1
        return hidden

    with pytest.raises(SkipPipeError, match=r"arguments of blocks\.0 .* changed in place .*x = x \+ 1"):
        fit(made(block=Given, stack=stack))
    assert_exact(made(block=Given, stack=out_of_place))


def test_a_tensor_that_microbatches_share_and_change() -> None:
    def stack(self: Model, hidden: Tensor) -> Tensor:
        self.counter = getattr(self, "counter", torch.zeros(8, device=self.device)).add_(1)
        for block in self.blocks:
            hidden = block(hidden, self.counter)
        return hidden

    with pytest.raises(SkipPipeError, match=r"self\.counter is then another than when it has run for the batch"):
        fit(made(block=Given, stack=stack), {"microbatches": "batch"})
    assert_exact(made(block=Given, stack=stack))


# Sharing, and stacks --------------------------------------------------------------------------------


class Pair(nn.ModuleList):
    def forward(self, hidden: Tensor) -> Tensor:
        first, second = self
        return second(first(hidden) * 0.1 + hidden)


class Pool(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.conv, self.stride = nn.Conv1d(4, 4, 3, padding=1), 2 if kind == "stride" else 1
        self.pool = nn.AvgPool1d(2) if kind == "pool" else nn.Identity()

    def forward(self, hidden: Tensor) -> Tensor:
        return self.pool(torch.relu(self.conv(hidden)))[..., :: self.stride]


class Pooling(Model):
    kinds = ("no", "pool", "no", "pool")

    def make_blocks(self) -> nn.Module:
        self.embed, self.head = nn.Conv1d(1, 4, 1), nn.Linear(4, 1)
        return nn.Sequential(*map(Pool, self.kinds))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x[:, None].repeat(1, 1, 4))).mean(-1))


@pytest.mark.parametrize("kinds", [("no", "pool", "no", "pool"), ("stride", "no", "stride", "no"), ("pool",) * 3])
@pytest.mark.parametrize("options", [{}, {"driver_stage": True}], ids=["workers", "driver_stage"])
def test_blocks_that_differ_in_what_has_no_parameters(kinds: tuple[str, ...], options: dict[str, Any]) -> None:
    assert_exact(type("Kinds", (Pooling,), {"kinds": kinds}), options)


def dict_of_blocks(self: Model) -> nn.Module:
    return nn.ModuleDict({str(index): Block() for index in range(4)})


def call_values(self: Model, hidden: Tensor) -> Tensor:
    for block in self.blocks.values():
        hidden = block(hidden)
    return hidden


@pytest.mark.parametrize("blocks", [None, "blocks", "blocks.0:4", "blocks.1:3"])
def test_numbered_layers_in_a_dict(blocks: str | None) -> None:
    assert_exact(made(make_blocks=dict_of_blocks, stack=call_values), {"blocks": blocks})


@pytest.mark.parametrize("blocks", [None, "blocks"])
def test_lists_of_lists_are_refused_and_exact_with_a_forward(blocks: str | None) -> None:
    def pairs(kind: type[nn.ModuleList]) -> Callable[[Model], nn.Module]:
        return lambda self: nn.ModuleList([kind([Block(), Block()]) for _ in range(4)])

    def unpack(self: Model, hidden: Tensor) -> Tensor:
        for first, second in self.blocks:
            hidden = second(first(hidden) * 0.1 + hidden)
        return hidden

    with pytest.raises(
        PartitionError, match=r"blocks is a list of 4 x ModuleList, which have no forward and are never"
    ):
        fit(made(make_blocks=pairs(nn.ModuleList), stack=unpack), {"blocks": blocks})
    assert_exact(made(make_blocks=pairs(Pair)), {"blocks": blocks})


def test_a_shared_module_is_refused_and_exact_with_copies() -> None:
    class Sharing(Block):
        def forward(self, hidden: Tensor) -> Tensor:
            return super().forward(hidden) + 0.1 * self.shared[0](hidden)

    class Own(Sharing):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.ModuleList([nn.Linear(8, 8)])

    def make_blocks(self: Model) -> nn.Module:
        self.common = nn.Linear(8, 8)
        blocks = nn.ModuleList([Sharing() for _ in range(4)])
        for block in blocks:
            block.shared = [self.common]
        return blocks

    with pytest.raises(PartitionError, match=r"blocks\.0\.shared uses common\.weight"):
        fit(made(make_blocks=make_blocks))
    assert_exact(made(block=Own))


class Translation(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.net = nn.Linear(4, 8), nn.Transformer(8, 2, 3, 3, 16, dropout=0.0, batch_first=True)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        hidden = self.embed(batch[:, None].repeat(1, 3, 1))
        return self.net(hidden, hidden[:, :2]).sub(1).pow(2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_either_stack_of_an_encoder_decoder(stack: str) -> None:
    assert_exact(Translation, {"blocks": f"net.{stack}.layers"})


def test_a_stack_that_the_step_never_calls_is_named_with_the_others() -> None:
    def make_blocks(self: Model) -> nn.Module:
        self.unused = nn.ModuleList([Block() for _ in range(9)])
        return nn.ModuleList([Block() for _ in range(4)])

    make = made(make_blocks=make_blocks)
    with pytest.raises(SkipPipeError, match=r'without calling the blocks .*\(unused\.0 \.\.\.\).*blocks="blocks"'):
        fit(make)
    assert_exact(make, {"blocks": "blocks"})
