"""Programs of the grammar: the result of one process, or a refusal that says why not."""

import logging
import random
import warnings
from collections.abc import Iterator, Sequence

import pytest
import torch

from tests.grids import all_slow_but

from .compare import difference
from .grammar import FEATURES
from .known import KNOWN
from .program import Feature, conflict, render
from .run import draw, is_rounding, judge, load, shrink

FEATURES_THAT_HOLD = [feature for feature in FEATURES if feature.name not in KNOWN]
AXES = sorted({feature.axis for feature in FEATURES})


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logger.setLevel(level)


def complaint(features: tuple[Feature, ...]) -> str:
    """Return what is wrong with a program, and its smallest part that is wrong; nothing when it holds."""
    verdict = judge(features)
    if verdict.kind != "WRONG":
        return ""
    smallest = shrink(features, lambda smaller: judge(smaller).kind == "WRONG")
    names = "+".join(feature.name for feature in smallest)
    return f"python -m tests.fuzz --program {names}\n{judge(smallest).text or verdict.text}\n{render(smallest)}"


def check_alone(features: Sequence[Feature], axis: str) -> None:
    wrong = [complaint((feature,)) for feature in features if feature.axis == axis]
    assert not any(wrong), "\n".join(filter(None, wrong))


@pytest.mark.parametrize("axis", AXES)
def test_features_alone(axis: str) -> None:
    """Every twelfth: what the ordinary run has time for."""
    check_alone([feature for feature in FEATURES_THAT_HOLD if feature.axis == axis][::12], axis)


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("axis", AXES)
def test_each_feature_alone(axis: str) -> None:
    check_alone(FEATURES_THAT_HOLD, axis)


@pytest.mark.parametrize("seed", all_slow_but(range(4), 0))
def test_compositions(seed: int) -> None:
    random_ = random.Random(seed)
    wrong = [complaint(draw(random_, FEATURES_THAT_HOLD)) for _ in range(10)]
    assert not any(wrong), "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("seed", range(100, 112))
def test_many_compositions(seed: int) -> None:
    """An hour together."""
    random_ = random.Random(seed)
    wrong = [complaint(draw(random_, FEATURES_THAT_HOLD)) for _ in range(1500)]
    assert not any(wrong), "\n".join(filter(None, wrong))


def test_known_failures_are_features() -> None:
    assert {feature.name for feature in FEATURES} >= KNOWN.keys()


# ------------------------------------------------------------- the fuzzer itself


def test_every_program_is_a_script() -> None:
    for feature in FEATURES:
        compile(render([feature]), feature.name, "exec")


def test_features_of_one_slot_conflict() -> None:
    by_name = {feature.name: feature for feature in FEATURES}
    assert conflict((by_name["embed_tokens"], by_name["embed_conv"]))
    assert conflict((by_name["sequential_called"], by_name["mask_argument"]))
    assert not conflict((by_name["embed_tokens"], by_name["adamw"]))


ASK = "from skippipe_plugin.driver.capture.suspend import current_thread; "
"""A step that asks whether it runs in a pipeline can differ by design, whatever the product does about it."""


def test_a_planted_wrong_is_found_and_shrunk() -> None:
    """The rest of the program is dropped."""
    by_name = {feature.name: feature for feature in FEATURES}
    planted = Feature("planted", "loss", "A", {"terms": ASK + "loss = loss + float(current_thread() is not None)"})
    program = (by_name["adamw"], planted, by_name["dict_batch"])
    assert "loss[0]" in judge(program).text
    assert shrink(program, lambda smaller: judge(smaller).kind == "WRONG") == (planted,)


def test_an_error_that_is_not_ours_is_no_refusal() -> None:
    raw = Feature("raw", "loss", "A", {"terms": ASK + "assert current_thread() is None, 'not in a pipeline'"})
    assert judge((raw,)).text.startswith("raw AssertionError")


def test_what_one_process_refuses_is_skipped() -> None:
    assert judge((Feature("no", "loss", "A", {"terms": "raise ValueError('no')"}),)).kind == "skipped"


def test_a_loss_that_grows_in_16_bits_is_skipped() -> None:
    """One process itself is as far apart in 32 bits, or half a last bit off, as gradients of parts are."""
    by_name = {feature.name: feature for feature in FEATURES}
    for other in ("autocast_after_the_first_step", "blocks_of_lower_precision"):
        assert judge((by_name["setter_method"], by_name[other])).kind == "skipped"


def test_a_wrong_that_rounding_does_not_explain_is_not_skipped() -> None:
    one, single = {"a": torch.tensor(1.0, dtype=torch.bfloat16)}, {"a": torch.tensor(1.05)}
    assert is_rounding({"a": one["a"] * 1.1}, one, [single], 2e-2, 2e-3)
    assert not is_rounding({"a": one["a"] * 2}, one, [single], 2e-2, 2e-3)
    assert not is_rounding({"a": one["a"].float()}, one, [single], 2e-2, 2e-3)
    assert not is_rounding({"a": one["a"] * 1.1}, one, [{"a": torch.tensor(1.01)}], 2e-2, 2e-3)


def test_differences_name_their_place() -> None:
    assert difference({"a": [1.0, 2.0]}, {"a": [1.0, 2.0]}, 1e-9, 0.0) == ""
    assert difference({"a": [1.0, 2.5]}, {"a": [1.0, 2.0]}, 1e-9, 0.0) == ".a[1]: 2.5 instead of 2.0"
    assert "keys" in difference({"b": 1}, {"a": 1}, 1e-9, 0.0)
    assert load("A = 1")["A"] == 1
