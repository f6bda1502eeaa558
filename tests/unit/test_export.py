"""`skippipe export`: smaller checkpoints load where smaller models are made, and bad input is one clear line."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from skippipe_plugin.cli import main

DEPTH = 6
TOKENS = torch.arange(8).view(1, 8)


class Net(LightningModule):
    """A module whose depth is a hyperparameter."""

    def __init__(self, depth: int = DEPTH, width: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.Linear(width, width)) for _ in range(depth)
        )
        for layer in self.layers:
            layer.append(nn.Sequential(nn.LayerNorm(width)))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Net, Path]:
    """A module and a checkpoint with all that Lightning puts there."""
    net, path = Net(), tmp_path / "whole.ckpt"
    content = {
        "epoch": 1,
        "global_step": 20,
        "pytorch-lightning_version": "2.6.0",
        "state_dict": net.state_dict(),
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint": {"best_model_path": "whole.ckpt"}},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": []}],
        "lr_schedulers": [{"last_epoch": 20}],
        "hparams_name": "kwargs",
        "hyper_parameters": dict(net.hparams),
    }
    torch.save(content, path)
    return net, path


def export(*arguments: object) -> int:
    return main(["export", *map(str, arguments)])


def test_a_lightning_checkpoint_without_two_stages(
    checkpoint: tuple[Net, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net, path = checkpoint
    out = tmp_path / "small.ckpt"
    assert export(path, "--skip-stages", "2,4", "--num-stages", 4, out) == 0  # stages of 2, 2, 1, 1 blocks
    report = capsys.readouterr().out
    assert "stages 2, 4 of 4 (blocks 2, 3, 5), kept 3" in report
    assert "dropped optimizer_states, lr_schedulers, callbacks" in report
    assert "hyper_parameters changed: depth" in report
    smaller = Net.load_from_checkpoint(out)
    assert smaller.hparams == {"depth": 3, "width": 4}
    for index in (5, 3, 2):
        del net.layers[index]
    x = torch.randn(2, 4)
    torch.testing.assert_close(smaller(x), net(x), rtol=0, atol=0)
    assert torch.load(out)["global_step"] == 20


def test_blocks_by_number_and_a_config_beside(
    checkpoint: tuple[Net, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, out = tmp_path / "config.json", tmp_path / "small.ckpt"
    config.write_text(json.dumps({"n_layer": DEPTH, "layer_types": list("abcdef")}))
    assert export(checkpoint[1], out, "--skip-blocks", "1,0", "--blocks", "layers", "--config", config) == 0
    assert json.loads((tmp_path / "small.ckpt.config.json").read_text()) == {"n_layer": 4, "layer_types": list("cdef")}
    assert "small.ckpt.config.json with n_layer, layer_types changed" in capsys.readouterr().out
    assert torch.equal(torch.load(out)["state_dict"]["layers.0.0.weight"], checkpoint[0].layers[2][0].weight)


def tiny(kind: str) -> Any:
    """A causal language model of transformers with six layers, of one or two kinds."""
    transformers = pytest.importorskip("transformers")
    common = {"vocab_size": 32, "tie_word_embeddings": True}
    if kind == "gpt2":
        config = transformers.GPT2Config(n_layer=DEPTH, n_embd=16, n_head=2, n_positions=16, **common)
    else:
        options = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
        if kind == "gemma3_text":
            options |= {
                "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
                "sliding_window": 2,
                "head_dim": 8,
            }
        config = transformers.AutoConfig.for_model(kind, num_hidden_layers=DEPTH, **options, **common)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("shards", ["50GB", "4KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma3_text"])
def test_a_folder_of_transformers_loads_smaller(kind: str, shards: str, tmp_path: Path) -> None:
    model = tiny(kind)
    model.save_pretrained(tmp_path / "whole", max_shard_size=shards)
    assert export(tmp_path / "whole", tmp_path / "small", "--skip-blocks", "1,4") == 0
    smaller, info = type(model).from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    body = model.transformer.h if kind == "gpt2" else model.model.layers
    del body[4], body[1]
    model.config.num_hidden_layers = 4
    if kind == "gemma3_text":
        model.config.layer_types = ["sliding_attention"] * 3 + ["full_attention"]
        assert smaller.config.layer_types == model.config.layer_types
    with torch.no_grad():
        found, expected = (net(TOKENS, use_cache=False).logits for net in (smaller.eval(), model))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_configuration_among_the_hyperparameters(tmp_path: Path) -> None:
    model = tiny("llama")
    content = {"state_dict": model.state_dict(), "hyper_parameters": {"config": model.config, "lr": 1.0}}
    torch.save(content, tmp_path / "whole.ckpt")
    refused = export(tmp_path / "whole.ckpt", tmp_path / "small.ckpt", "--skip-blocks", "0")
    assert refused == 2
    assert export(tmp_path / "whole.ckpt", tmp_path / "small.ckpt", "--skip-blocks", "0", "--trust") == 0
    small = torch.load(tmp_path / "small.ckpt", weights_only=False)
    smaller = type(model)(small["hyper_parameters"]["config"])
    smaller.load_state_dict(small["state_dict"])
    assert (len(smaller.model.layers), model.config.num_hidden_layers) == (5, 6)


def test_parts_of_a_configuration_that_cannot_be_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny("gpt2")
    model.save_pretrained(tmp_path / "whole")
    for config, reason in [
        ({"text": {"n_layer": 6}, "vision": {"n_layer": 6}}, "several parts say so"),
        ({"n_embd": 6}, "no entry says so"),
        ({"n_layer": 6, "moe_layer_freq": 2}, "moe_layer_freq=2"),
    ]:
        (tmp_path / "whole/config.json").write_text(json.dumps(config))
        assert export(tmp_path / "whole", tmp_path / "small", "--skip-blocks", "1") == 2
        assert reason in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["whole"]


STAGES = ["--num-stages", "3", "--skip-stages"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ([*STAGES, "1,2,3"], "all 3 stages would be left out"),
        ([*STAGES, "4"], "no stage 4; the 3 stages are 1 to 3"),
        ([*STAGES, "0"], "no stage 0"),
        (["--skip-stages", "1"], "add --num-stages"),
        (["--num-stages", "7", "--skip-stages", "1"], "6 blocks cannot fill 7 stages"),
        (["--skip-blocks", "9"], "no block 9"),
        ([], "say what to leave out"),
        ([*STAGES, "1", "--skip-blocks", "1"], "either"),
        (
            ["--skip-blocks", "1", "--blocks", "net.h"],
            r"no numbered blocks below 'net.h'. Candidates: layers: 6 blocks",
        ),
        (["--skip-blocks", "1", "--config", "none.json"], "none.json: No such file"),
    ],
)
def test_what_cannot_be_left_out_is_one_clear_line(
    checkpoint: tuple[Net, Path], capsys: pytest.CaptureFixture[str], options: list[str], reason: str
) -> None:
    out = checkpoint[1].with_name("small.ckpt")
    assert export(checkpoint[1], out, *options) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(reason, error)
    assert [path.name for path in out.parent.iterdir()] == ["whole.ckpt"]


def test_files_that_are_no_checkpoints(
    checkpoint: tuple[Net, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, weights, empty, out = tmp_path / "text", tmp_path / "weights.pt", tmp_path / "empty", tmp_path / "small"
    text.write_text("no checkpoint")
    torch.save(checkpoint[0].state_dict(), weights)
    empty.mkdir()
    for source, target, reason in [
        (text, out, "is not a checkpoint"),
        (weights, out, "it has no 'state_dict'"),
        (empty, out, "config.json: No such file"),
        (tmp_path / "none", out, "none: No such file"),
        (checkpoint[1], text, "exists; name a new one"),
        (checkpoint[1], tmp_path / "none" / "small", "there is no folder"),
    ]:
        assert export(source, target, "--skip-blocks", "1") == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert reason in error


def _t5() -> Any:
    import transformers

    torch.manual_seed(0)
    sizes = {"d_model": 16, "num_layers": 4, "num_heads": 2, "d_kv": 8, "d_ff": 32, "vocab_size": 32}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).eval()


def _bart() -> Any:
    import transformers

    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 4, "decoder_layers": 4, "vocab_size": 32, "max_position_embeddings": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes, **heads)).eval()


@pytest.mark.parametrize("which", [["--skip-blocks", "0"], ["--skip-stages", "1", "--num-stages", "2"]])
@pytest.mark.parametrize("stack", ["encoder.block", "decoder.block"])
def test_the_block_that_owns_what_all_need_cannot_be_left_out(
    stack: str, which: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _t5().save_pretrained(tmp_path / "whole")
    assert export(tmp_path / "whole", tmp_path / "small", "--blocks", stack, *which) == 2
    error = capsys.readouterr().err
    assert "without block 0 no block has layer.0.SelfAttention.relative_attention_bias.weight" in error
    assert "keep block 0, and leave out others" in error
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize(
    ("make", "stack"),
    [(_t5, "encoder.block"), (_t5, "decoder.block"), (_bart, "model.encoder.layers"), (_bart, "model.decoder.layers")],
)
def test_other_blocks_of_one_of_two_stacks_can(make: Callable[[], Any], stack: str, tmp_path: Path) -> None:
    """What the refusal advises: the rest is complete, and computes what the model without these blocks does."""
    model = make()
    model.save_pretrained(tmp_path / "whole")
    assert export(tmp_path / "whole", tmp_path / "small", "--blocks", stack, "--skip-blocks", "1,2") == 0
    smaller, info = type(model).from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    blocks = model.get_submodule(stack)
    del blocks[2], blocks[1]
    tokens = TOKENS[:, :8] % 32
    with torch.no_grad():
        found, expected = (
            net(input_ids=tokens, decoder_input_ids=tokens, use_cache=False).logits for net in (smaller.eval(), model)
        )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kinds", "gone", "reason"),
    [
        ("ABBB", "1", None),
        ("ABBB", "0", "without block 0 no block has a.weight"),
        ("BBBA", "1", None),
        ("BBBA", "3", "without block 3 no block has a.weight"),
        ("ABAB", "1", "block 2 would come to the place of block 1"),
        ("ABAB", "0,1", None),
        ("AABB", "0", "block 2 would come to the place of block 1"),
        ("AAAA", "0,2", None),
    ],
)
def test_kinds_of_blocks_in_a_checkpoint(
    kinds: str, gone: str, reason: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {f"body.{i}.{kind.lower()}.weight": torch.ones(2) for i, kind in enumerate(kinds)}
    torch.save(
        {"state_dict": {**state, **{f"body.{i}.norm.bias": torch.ones(1) for i in range(4)}}}, tmp_path / "a.ckpt"
    )
    assert export(tmp_path / "a.ckpt", tmp_path / "b.ckpt", "--skip-blocks", gone) == (2 if reason else 0)
    assert (reason or "") in capsys.readouterr().err
