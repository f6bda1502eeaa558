"""A stage's part of key-value caches: what a call finds there, also one that runs once more."""

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, MistralConfig
from transformers.cache_utils import Cache

from skippipe_plugin.driver.capture.caches import CacheLedger
from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.engine.kvcache import CacheShelf

LAYERS = 2


def states(value: float, tokens: int = 1, samples: int = 2) -> Tensor:
    return torch.full((samples, 1, tokens, 3), value) + torch.arange(float(samples)).reshape(-1, 1, 1, 1)


def fill(cache: Cache, value: float, tokens: int = 1, layers: int = LAYERS) -> None:
    """Do what blocks do with their tokens."""
    own = decoders(cache)
    for layer in range(layers):
        own.update(states(value + layer, tokens), -states(value + layer, tokens), layer)


def decoders(cache: Cache) -> Cache:
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def keys_and_values(cache: Cache) -> list[Tensor]:
    return [tensor for layer in decoders(cache).layers for tensor in (layer.keys, layer.values)]


def make(kind: str) -> Cache:
    return EncoderDecoderCache(DynamicCache(), DynamicCache()) if kind == "encoder-decoder" else DynamicCache()


@pytest.mark.parametrize("given_up_after", range(LAYERS + 1))
@pytest.mark.parametrize("nth", range(4))
@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
def test_a_call_that_runs_once_more_finds_what_it_found(kind: str, nth: int, given_up_after: int) -> None:
    """Whichever call it is, and how far it had come: also after the driver's code has sorted beams."""
    ledger, shelf = CacheLedger(), CacheShelf()
    cache, undisturbed = make(kind), make(kind)
    order = torch.tensor([1, 0])
    for number in range(4):
        key = ledger.key(cache)
        if number > 1:
            for each in (cache, undisturbed):
                each.reorder_cache(order)
        use = ledger.use([key])
        if number == nth:
            shelf.begin(use)
            fill(shelf.cache(key), float(number), 3 if number == 0 else 1, given_up_after)
        shelf.begin(use)
        fill(shelf.cache(key), float(number), 3 if number == 0 else 1)
        fill(undisturbed, float(number), 3 if number == 0 else 1)
    for found, expected in zip(keys_and_values(shelf.cache(key)), keys_and_values(undisturbed), strict=True):
        assert torch.equal(found, expected)


def test_a_cache_that_forgets_says_so() -> None:
    """Of a sliding window only the last tokens are kept; a first call begins with an empty cache whatever it is."""
    ledger, shelf = CacheLedger(), CacheShelf()
    cache = DynamicCache(config=MistralConfig(num_hidden_layers=LAYERS, sliding_window=2))
    key = ledger.key(cache)
    use = ledger.use([key])
    for _ in range(2):
        shelf.begin(use)
        fill(shelf.cache(key), 0.0)
    assert shelf.cache(key).get_seq_length() == 1
    use = ledger.use([key])
    shelf.begin(use)
    fill(shelf.cache(key), 1.0)
    with pytest.raises(SkipPipeError, match=r"cannot go back .*SlidingWindowLayer.*begin the generation anew"):
        shelf.begin(use)
