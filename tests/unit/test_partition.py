"""Finding the block stack of real and hand-written models, and cutting it."""

import itertools
import math
from collections.abc import Sequence

import peft
import pytest
import torch
import torchmetrics
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule
from torch import nn

from skippipe_plugin.partition import (
    BlockStack,
    PartitionError,
    cut,
    driver_share,
    estimate_costs,
    find_blocks,
)

# Models -------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(x)


class DictGPT(nn.Module):
    """A hand-written model in nanoGPT's shape: everything in one ModuleDict."""

    def __init__(self, num_blocks: int = 3, width: int = 8, vocabulary: int = 20) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocabulary, width),
                "h": nn.ModuleList(Residual(width) for _ in range(num_blocks)),
                "ln_f": nn.LayerNorm(width),
            }
        )
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight


class Task(LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.metrics = torchmetrics.MetricCollection([torchmetrics.MeanMetric(), torchmetrics.SumMetric()])


class BigMetric(torchmetrics.Metric):
    """A metric that carries a network of its own, as FID and BERTScore do."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(*(Residual(64) for _ in range(4)))

    def update(self) -> None: ...

    def compute(self) -> torch.Tensor:
        return torch.zeros(())


SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
TEXT = {**SMALL, "vocab_size": 50, "max_position_embeddings": 16}
GROUPED = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=3, n_head=2)
    )


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED))


def qwen3() -> nn.Module:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**GROUPED))


def opt() -> nn.Module:
    config = {key: value for key, value in TEXT.items() if key != "intermediate_size"}
    return transformers.OPTForCausalLM(transformers.OPTConfig(**config, ffn_dim=32, word_embed_proj_dim=16))


def bert() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT))


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, image_size=8, patch_size=4))


def mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**GROUPED, num_local_experts=4))


def t5() -> nn.Module:
    config = transformers.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2)
    return transformers.T5ForConditionalGeneration(config)


def lora() -> nn.Module:
    return peft.get_peft_model(gpt2(), peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))


def torch_encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), num_layers=3, enable_nested_tensor=False)


# find_blocks --------------------------------------------------------------------------------------


def test_several_stacks_are_one_after_the_other() -> None:
    model = nn.Transformer(8, 2, 2, 3, 16)
    stack = find_blocks(model, ["encoder.layers", "decoder.layers.1:3"])
    assert stack.names == ("encoder.layers.0", "encoder.layers.1", "decoder.layers.1", "decoder.layers.2")
    assert stack.blocks == (*model.encoder.layers, *model.decoder.layers[1:])
    assert str(stack).startswith("encoder.layers + decoder.layers: 2 x TransformerEncoderLayer, 2 x Transf")
    assert find_blocks(model, ["decoder.layers"]) == find_blocks(model, "decoder.layers")


@pytest.mark.parametrize(
    ("blocks", "error"),
    [
        ([], "names no stack"),
        (["encoder.layers", "encoder.layers"], r"names encoder\.layers\.0 twice"),
        (["encoder.layers.0:2", "encoder.layers.1:2"], r"names encoder\.layers\.1 twice"),
        (["encoder.layers", "body"], "'body' names no list"),
    ],
)
def test_stacks_that_cannot_be_joined(blocks: list[str], error: str) -> None:
    with pytest.raises(PartitionError, match=error):
        find_blocks(nn.Transformer(8, 2, 2, 2, 16), blocks)


@pytest.mark.parametrize(
    ("build", "container"),
    [
        (gpt2, "transformer.h"),
        (llama, "model.layers"),
        (qwen3, "model.layers"),
        (opt, "model.decoder.layers"),
        (bert, "bert.encoder.layer"),
        (vit, "vit.layers"),
        (mixtral, "model.layers"),
        (t5, "decoder.block"),
        (lora, "base_model.model.transformer.h"),
        (torch_encoder, "layers"),
        (DictGPT, "transformer.h"),
    ],
)
def test_the_layer_stack_of_known_models(build, container) -> None:
    model = build()
    stack = find_blocks(model)
    assert stack.container_name == container
    assert stack.names == tuple(f"{container}.{index}" for index in range(3))
    assert all(model.get_submodule(name) is block for name, block in zip(stack.names, stack.blocks, strict=True))


def test_a_lightning_module_with_metrics() -> None:
    task = Task(gpt2())
    task.fid = BigMetric()
    assert find_blocks(task).container_name == "model.transformer.h"


def test_models_are_not_changed_and_may_be_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = DictGPT()
    keys = list(model.state_dict())
    assert len(find_blocks(model)) == 3
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("inside", [False, True])
def test_torch_compile_wrappers(inside) -> None:
    model = DictGPT()
    if inside:
        model.transformer["h"] = nn.ModuleList(torch.compile(block) for block in model.transformer["h"])
    else:
        model = torch.compile(model)
    stack = find_blocks(model)
    assert stack.container_name == ("transformer.h" if inside else "_orig_mod.transformer.h")
    assert len(stack) == 3
    assert find_blocks(model, "transformer.h") == stack


def test_a_plain_mlp_is_a_chain_of_all_its_layers() -> None:
    task = Task(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)))
    assert find_blocks(task).names == tuple(f"model.{index}" for index in range(5))
    assert find_blocks(task.model).container_name == ""
    assert find_blocks(task.model).names == ("0", "1", "2", "3", "4")


def test_a_sequential_that_overrides_forward_is_no_plain_chain() -> None:
    class Odd(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self[0](x) + self[2](x)

    with pytest.raises(PartitionError, match=r"Looked at:\n  \(the model itself\): 1 x Linear, 1 x ReLU, 1 x Linear"):
        find_blocks(Odd(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))


def test_blocks_between_embedding_and_head_of_a_sequential() -> None:
    model = nn.Sequential(nn.Embedding(1000, 8), *(Residual() for _ in range(4)), nn.LayerNorm(8), nn.Linear(8, 1000))
    assert find_blocks(model).names == ("1", "2", "3", "4")


@pytest.mark.parametrize(
    "build", [lambda: nn.Embedding(5000, 8), lambda: nn.Linear(8, 5000)], ids=["embeddings", "heads"]
)
def test_big_lists_of_plain_layers_do_not_win(build) -> None:
    model = DictGPT()
    model.extra = nn.ModuleList([build(), build()])
    assert find_blocks(model).container_name == "transformer.h"


def test_experts_inside_a_block_do_not_win() -> None:
    class MoE(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(Residual() for _ in range(8))

    model = nn.ModuleDict({"layers": nn.ModuleList([MoE(), MoE()]), "last": nn.ModuleList([MoE()])})
    assert find_blocks(model).container_name == "layers"


def test_the_outermost_list_wins_a_tie() -> None:
    class Hollow(nn.Module):
        def __init__(self, num_blocks: int) -> None:
            super().__init__()
            self.inner = nn.Sequential(*(Residual() for _ in range(num_blocks)))

    assert find_blocks(nn.ModuleList([Hollow(3), Hollow(0)])).names == ("0", "1")


def test_only_the_largest_run_of_one_class_is_taken() -> None:
    run = [Residual(8) for _ in range(3)]
    model = nn.ModuleList([Residual(8), nn.Linear(8, 8), *run, nn.Dropout(), nn.Dropout(), Residual(8)])
    assert find_blocks(model).blocks == tuple(run)


def test_runs_without_parameters_are_no_stack() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.ReLU(), nn.Dropout())
    with pytest.raises(PartitionError, match="name the stack yourself"):
        find_blocks(model)


def test_lazy_modules_count() -> None:
    assert len(find_blocks(nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(2)))) == 3


# blocks="..." -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "names"),
    [
        ("encoder.block", ["encoder.block.0", "encoder.block.1", "encoder.block.2"]),
        ("decoder.block.1:", ["decoder.block.1", "decoder.block.2"]),
        ("decoder.block.:-1", ["decoder.block.0", "decoder.block.1"]),
        ("encoder.block.1:2", ["encoder.block.1"]),
    ],
)
def test_the_stack_can_be_named(blocks, names) -> None:
    assert find_blocks(t5(), blocks).names == tuple(names)


def test_the_root_itself_can_be_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    assert find_blocks(model, "").names == ("0", "1", "2")
    assert find_blocks(model, "1:").names == ("1", "2")


@pytest.mark.parametrize("blocks", ["encoder.layers", "encoder", "decoder.block.0", "1:2"])
def test_a_wrong_name_lists_the_candidates(blocks) -> None:
    with pytest.raises(PartitionError) as error:
        find_blocks(t5(), blocks)
    assert repr(blocks) in str(error.value)
    assert "decoder.block: 3 x T5Block (" in str(error.value)
    assert "encoder.block: 3 x T5Block (" in str(error.value)


def test_an_empty_selection_is_an_error() -> None:
    with pytest.raises(PartitionError, match="selects none of the 3 modules"):
        find_blocks(t5(), "decoder.block.7:9")


def one_layer() -> nn.Module:
    return nn.ModuleDict({"inner": nn.ModuleDict({"layer": Residual()})})


def one_head() -> nn.Module:
    return nn.ModuleDict({"heads": nn.ModuleList([nn.Linear(8, 8)])})


@pytest.mark.parametrize("build", [one_head, lambda: nn.Linear(4, 4)], ids=["head", "linear"])
def test_no_stack_says_what_was_looked_at_and_how_to_name_it(build) -> None:
    with pytest.raises(PartitionError, match=r'(?s)(heads|no nn.ModuleList).*blocks="model.layers".*layer\*6"'):
        find_blocks(build())


# Modules at several depths ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "blocks", "order"),
    [
        (1, None, "000"),
        (2, None, "001"),
        (3, None, "012"),
        (1, "encoder.albert_layer_groups", "000"),
        (2, "encoder.albert_layer_groups*2", "0101"),
        (2, "encoder.albert_layer_groups.1:2*3", "111"),
        (2, "encoder.albert_layer_groups.0", None),
        (2, "encoder.albert_layer_groups.0 * 2", "00"),
        (1, "encoder.albert_layer_groups*0", None),
    ],
)
def test_albert_and_what_is_said_of_it(groups: int, blocks: str | None, order: str | None) -> None:
    config = transformers.AlbertConfig(**TEXT, embedding_size=8, num_hidden_groups=groups)
    model = transformers.AlbertModel(config)
    if order is None:
        with pytest.raises(PartitionError, match="names no list"):
            find_blocks(model, blocks)
        return
    stack = find_blocks(model, blocks)
    assert stack.names == tuple(f"encoder.albert_layer_groups.{index}" for index in order)
    assert stack.blocks == tuple(map(model.get_submodule, stack.names))


def test_one_layer_that_code_calls_again_and_again() -> None:
    stack = find_blocks(one_layer(), "inner.layer*6")
    assert stack.names == ("inner.layer",) * 6
    assert len(set(stack.blocks)) == 1
    assert str(stack).startswith("inner: 6 x Residual")


# estimate_costs -----------------------------------------------------------------------------------


def test_costs_count_the_weights_that_are_multiplied() -> None:
    attention = nn.TransformerEncoderLayer(8, 2, 16)
    table = nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 8, bias=False))
    tied = nn.ModuleList([Residual()] * 2)
    costs = estimate_costs([attention, table, nn.ReLU(), tied])
    assert costs == (sum(p.numel() for p in attention.parameters()), 64.0, 1.0, estimate_costs([Residual()])[0])


# cut ----------------------------------------------------------------------------------------------


def all_cuts(num_blocks: int, num_stages: int):
    for bounds in itertools.combinations(range(1, num_blocks), num_stages - 1):
        edges = (0, *bounds, num_blocks)
        yield tuple(itertools.starmap(range, itertools.pairwise(edges)))


def loads(costs: Sequence[float], ranges: Sequence[range], first_share: float) -> list[float]:
    sums = [sum(costs[index] for index in part) for part in ranges]
    return [sums[0] / first_share, *sums[1:]]


@given(data=st.data(), costs=st.lists(st.integers(0, 20), min_size=1, max_size=8))
@settings(deadline=None, max_examples=200)
def test_cut_agrees_with_trying_everything(data, costs) -> None:
    num_stages = data.draw(st.integers(1, len(costs)))
    share = data.draw(st.sampled_from([0.25, 0.5, 1.0, 2.0]))

    def preference(ranges):
        each = loads(costs, ranges, share)
        return max(each), sum(load * load for load in each), [-len(part) for part in ranges]

    assert cut(costs, num_stages, first_share=share) == min(all_cuts(len(costs), num_stages), key=preference)


@given(
    costs=st.lists(st.floats(0, 1e9), min_size=1, max_size=12),
    num_stages=st.integers(1, 12),
    share=st.floats(0.01, 3),
)
@settings(deadline=None)
def test_cut_covers_all_blocks_in_order(costs, num_stages, share) -> None:
    num_stages = min(num_stages, len(costs))
    ranges = cut(costs, num_stages, first_share=share)
    assert len(ranges) == num_stages
    assert all(ranges)
    assert [index for part in ranges for index in part] == list(range(len(costs)))
    slowest = min(max(loads(costs, other, share)) for other in all_cuts(len(costs), num_stages))
    assert math.isclose(max(loads(costs, ranges, share)), slowest, rel_tol=1e-9, abs_tol=1e-300)


def test_equal_blocks_are_spread_evenly() -> None:
    assert [len(part) for part in cut([0.1] * 10, 4)] == [3, 3, 2, 2]
    assert [len(part) for part in cut([0.1] * 10, 4, first_share=0.5)] == [1, 3, 3, 3]


def test_a_deep_model_is_cut_quickly() -> None:
    ranges = cut([1.0 + index % 3 for index in range(126)], 32)
    assert max(loads([1.0 + index % 3 for index in range(126)], ranges, 1.0)) == 9


@pytest.mark.parametrize(
    ("costs", "num_stages", "share", "message"),
    [
        ([1.0, 1.0], 3, 1.0, "2 blocks cannot fill 3 stages.*at most 2 stages"),
        ([1.0], 0, 1.0, "num_stages=0"),
        ([1.0, -1.0], 1, 1.0, "finite"),
        ([1.0, math.nan], 1, 1.0, "finite"),
        ([1.0, 1.0], 2, 0.0, "share greater than 0"),
    ],
)
def test_impossible_cuts_say_why(costs, num_stages, share, message) -> None:
    with pytest.raises(PartitionError, match=message):
        cut(costs, num_stages, first_share=share)


def test_partition_errors_are_value_errors_and_stacks_are_values() -> None:
    assert issubclass(PartitionError, ValueError)
    block = nn.ReLU()
    assert BlockStack("", ("0",), (block,)) == BlockStack("", ("0",), (block,))


def test_a_driver_with_a_heavy_head_holds_fewer_blocks() -> None:
    blocks = [nn.Linear(8, 8, bias=False) for _ in range(9)]  # 64 each, 576 together
    model = nn.ModuleDict(
        {"table": nn.Embedding(50, 8), "blocks": nn.ModuleList(blocks), "head": nn.Linear(8, 16, bias=False)}
    )
    share = driver_share(model, blocks, num_stages=3)  # the head costs two blocks of eleven
    assert share == pytest.approx(1 - 2 * 3 / 11)
    assert [len(stage) for stage in cut(estimate_costs(blocks), 3, first_share=share)] == [1, 4, 4]
    assert driver_share(nn.ModuleDict({"blocks": nn.ModuleList(blocks)}), blocks, num_stages=3) == 1.0
