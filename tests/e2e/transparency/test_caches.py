"""Decoding by hand, from one call of the model to the next: the text of one process, or a refusal that is true."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from skippipe_plugin import SkipPipeConfig, SkipPipeError, TorchPipeline
from tests.e2e import zoo
from tests.e2e.models import tokens
from tests.e2e.modules import loader
from tests.e2e.support import trainer_for

PROMPTS = tokens(6, 5, seed=3).clamp(min=3)
Decode = Callable[[nn.Module, Tensor], Tensor]


def llama() -> nn.Module:
    """Weights so large that each token depends on those before it."""
    net, generator = zoo.llama(), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in net.parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.7)
    return net.eval()


def by_hand(net: nn.Module, ids: Tensor, **first: Any) -> Tensor:
    """Return the logits of each new token."""
    out = net(ids, **first)
    logits = [out.logits[:, -1]]
    for _ in range(3):
        out = net(logits[-1].argmax(-1, keepdim=True), past_key_values=out.past_key_values)
        logits.append(out.logits[:, -1])
    return torch.cat(logits, 1).detach()


def from_nothing(net: nn.Module, ids: Tensor) -> Tensor:
    return by_hand(net, ids, past_key_values=None, use_cache=True)


def from_an_empty_cache(net: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return by_hand(net, ids, past_key_values=transformers.DynamicCache(config=net.config))


def without_gradients(net: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return by_hand(net, ids, use_cache=True)


def from_copies(net: nn.Module, ids: Tensor) -> Tensor:
    """As who keeps the cache of a common prompt: each copy goes its own way, also when the original is gone."""
    with torch.no_grad():
        cache = net(ids, use_cache=True).past_key_values
        one, unused = copy.deepcopy(cache), copy.deepcopy(cache)
        del unused
        logits = [net(ids[:, :1], past_key_values=cache).logits, net(ids[:, 1:2], past_key_values=one).logits]
        other = copy.deepcopy(copy.deepcopy(one))
        other.crop(-2)
        del one, cache
        logits.append(net(ids[:, 2:3], past_key_values=other).logits)
    return torch.cat(logits, 2).flatten(1)


EXACT: dict[str, Decode] = {
    each.__name__: each for each in (from_nothing, from_an_empty_cache, without_gradients, from_copies)
}


@pytest.mark.parametrize("case", EXACT)
def test_a_loop_that_decodes_by_hand_writes_what_one_process_writes(case: str) -> None:
    net = llama()
    expected = EXACT[case](net, PROMPTS)
    with TorchPipeline(net, None, SkipPipeConfig(num_stages=2, num_microbatches=2, verbose=False)):
        torch.testing.assert_close(EXACT[case](net, PROMPTS), expected, rtol=1e-3, atol=1e-4)


class Writer(LightningModule):
    def __init__(self, decode: Decode) -> None:
        super().__init__()
        self.net, self.decode = llama(), decode

    def predict_step(self, batch: Tensor) -> Tensor:
        return self.decode(self.net, batch)


def padded(net: nn.Module, ids: Tensor) -> Tensor:
    """A static cache is as long as it will ever be, and so is the mask of padded prompts."""
    net.generation_config.eos_token_id = None
    mask = (torch.arange(ids.shape[1], device=ids.device) >= ids[:, :1] % 4).long()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 2, "cache_implementation": "static"}
    return net.generate(input_ids=ids.where(mask > 0, 2), attention_mask=mask, **options)


def guided(net: nn.Module, ids: Tensor) -> Tensor:
    """The model runs twice for each token, with two caches."""
    net.generation_config.eos_token_id = None
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 2, "guidance_scale": 1.5}
    return net.generate(input_ids=ids, attention_mask=torch.ones_like(ids), negative_prompt_ids=ids.flip(1), **options)


@pytest.mark.parametrize("decode", [from_nothing, from_copies, padded, guided], ids=lambda each: each.__name__)
def test_a_step_that_decodes_writes_what_one_process_writes(decode: Decode) -> None:
    def predict(devices: int) -> Tensor:
        settings = {"num_microbatches": 2} if devices > 1 else None
        return torch.cat(trainer_for(devices, settings).predict(Writer(decode), loader(PROMPTS, batch_size=6)))

    torch.testing.assert_close(predict(3), predict(1), rtol=1e-3, atol=1e-4)


def unsaid(net: nn.Module, ids: Tensor) -> Tensor:
    return by_hand(net, ids)


def while_training(net: nn.Module, ids: Tensor) -> Tensor:
    return by_hand(net.train(), ids, use_cache=True)


def read_while_training(net: nn.Module, ids: Tensor) -> Tensor:
    cache = transformers.DynamicCache(config=net.config)
    net.train()(ids, past_key_values=cache)
    return torch.tensor(cache.get_seq_length())


@pytest.mark.parametrize(
    ("decode", "message"),
    [
        (unsaid, r"cut into microbatches.*use_cache=True"),
        (while_training, r"while gradients were on.*torch.no_grad\(\)"),
        (read_while_training, r"while gradients were on.*torch.no_grad\(\)"),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_a_cache_that_holds_nothing_says_so(decode: Decode, message: str) -> None:
    """What the messages say is exact: see ``from_nothing``, ``without_gradients`` and ``from_an_empty_cache``."""
    net = llama()
    config = SkipPipeConfig(num_stages=2, num_microbatches=2, verbose=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with TorchPipeline(net, optimizer, config), pytest.raises(SkipPipeError, match=message):
        decode(net, PROMPTS)


class Attention(nn.Module):
    """Attends to the keys and values of earlier calls, in a way of its own or in a cache of transformers."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.projection, self.layer = nn.Linear(8, 24), layer

    def forward(self, hidden: Tensor, past: Any = None) -> Any:
        query, key, value = self.projection(hidden)[:, None].chunk(3, -1)
        if isinstance(past, transformers.Cache):
            key, value = past.update(key, value, self.layer)
        elif past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        attended = nn.functional.scaled_dot_product_attention(query, key, value)[:, 0]
        return hidden + attended, (key, value)


class OwnCache(LightningModule):
    def __init__(self, cache: Callable[[], Any]) -> None:
        super().__init__()
        self.embed, self.cache = nn.Embedding(32, 8), cache
        self.blocks = nn.ModuleList([Attention(layer) for layer in range(4)])

    def predict_step(self, batch: Tensor) -> Tensor:
        seen, past = [], self.cache()
        for token in batch.T[:, :, None]:
            hidden = self.embed(token)
            for index, block in enumerate(self.blocks):
                own = past[index] if isinstance(past, list) else past
                hidden, pair = block(hidden, own)
                if isinstance(past, list):
                    past[index] = pair
            seen.append(hidden[:, 0])
        return torch.stack(seen, 1)


def test_a_cache_of_ones_own_is_exact() -> None:
    def predict(devices: int, cache: Callable[[], Any]) -> Tensor:
        torch.manual_seed(0)
        module, settings = OwnCache(cache), {"num_microbatches": 2} if devices > 1 else None
        return torch.cat(trainer_for(devices, settings).predict(module, loader(PROMPTS, batch_size=6)))

    expected = predict(1, lambda: [None] * 4)
    torch.testing.assert_close(predict(3, lambda: [None] * 4), expected)
    torch.testing.assert_close(predict(3, transformers.DynamicCache), expected)
