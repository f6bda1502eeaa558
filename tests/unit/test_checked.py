"""Settings check themselves: nonsense gets our error, which names the setting, or is a setting as documented."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skippipe_plugin import MoEConfig, NetworkConfig, PathConfig, RecoveryPolicy, SkipPipeConfig
from skippipe_plugin.callbacks import ExpertConfig, LoadBalancer, PipelineMonitor, StageRecovery
from skippipe_plugin.checked import COUNT, Range, SettingError, check, checked, describe
from skippipe_plugin.model.settings import PipelineSettings
from skippipe_plugin.schedule import PathConstraints, Schedule, full_schedule
from skippipe_plugin.schedule.balance import SwitchRule
from skippipe_plugin.strategies import SkipPipeStrategy

SCHEDULE = full_schedule("1f1b", num_stages=2, num_microbatches=2)
NONE = type(None)
SKIP_RATIO = (int, float, dict, FunctionType)
SHAPE: dict[str, tuple[type, ...]] = {
    "skip_ratio": SKIP_RATIO,
    "schedule": (str, Schedule),
    "num_microbatches": (int, NONE),
    "microbatches": (str,),
    "microbatch_weight": (str, FunctionType, NONE),
    "replicas": (int,),
    "drivers": (int,),
    "blocks": (str, list, tuple, NONE),
    "driver_stage": (bool,),
    "gradient_scale": (str,),
    "paths": (PathConfig,),
    "network": (NetworkConfig,),
    "moe": (MoEConfig, NONE),
    "verbose": (bool,),
}
SETTINGS: dict[type, dict[str, tuple[type, ...]]] = {
    PathConstraints: {
        "skip_ratio": (int, float, NONE),
        "path_length": (int, NONE),
        "max_jump": (int,),
        "max_swaps": (int, NONE),
        "max_back": (int,),
        "max_total_back": (int, NONE),
        "required": (tuple,),
    },
    PathConfig: {
        "max_jump": (int,),
        "max_swaps": (int, NONE),
        "max_back": (int,),
        "eval_skip_ratio": (int, float),
        "costs": (str,),
        "seed": (int,),
    },
    NetworkConfig: {
        "host": (str, NONE),
        "port": (int,),
        "secret_file": (str, NONE),
        "workers": (str, FunctionType, NONE),
        "local_workers": (int, NONE),
        "join_timeout_s": (int, float),
        "backend": (str,),
        "workers_per_device": (int,),
    },
    RecoveryPolicy: {
        "spares": (int,),
        "rule": (str,),
        "lr_factor": (int, float),
        "while_missing": (str,),
        "swap_ends": (bool,),
        "heartbeat_s": (int, float),
        "elastic": (bool,),
    },
    MoEConfig: {
        "router": (str, FunctionType),
        "expert_parallel": (int,),
        "overlap": (int, str),
        "top_k": (int, NONE),
        "capacity_factor": (int, float, NONE),
        "rectify": (str, NONE),
        "quantiles": (bool,),
        "exact_bias": (bool,),
        "freeze_after": (int, NONE),
        "experts": (str,),
        "auxiliary_loss": (int, float),
        "causal": (bool,),
    },
    SwitchRule: {"min_gain": (float,), "min_steps": (int,)},
    ExpertConfig: {
        "rule": (str,),
        "rate": (int, float, NONE),
        "auxiliary_loss": (int, float),
        "payback_steps": (int,),
    },
    PipelineSettings: SHAPE,
    SkipPipeConfig: {**SHAPE, "num_stages": (int, NONE), "recovery": (RecoveryPolicy, NONE)},
    SkipPipeStrategy: {
        **SHAPE,
        "paths": (PathConfig, NONE),
        "network": (NetworkConfig, NONE),
        "verify": (str,),
    },
    StageRecovery: {
        "spares": (int,),
        "rule": (str,),
        "lr_factor": (int, float),
        "while_missing": (str,),
        "swap_ends": (bool,),
        "heartbeat_s": (int, float),
        "elastic": (bool,),
    },
    PipelineMonitor: {"every_n_steps": (int,), "picture": (bool,), "trace": (bool,)},
    LoadBalancer: {
        "stages": (bool,),
        "every_n_steps": (int,),
        "min_gain": (float,),
        "min_steps": (int,),
        "window": (int,),
        "memory": (int,),
        "experts": (str, tuple, NONE),
        "expert_config": (ExpertConfig, NONE),
    },
}
"""By class and setting: which types the documents allow. Written by hand: the annotations are what is tested."""
FIELDS = [(cls, name) for cls, names in SETTINGS.items() for name in names]


class Odd:
    """Compares, prints and is true or false as badly as objects can."""

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no comparison")

    def __bool__(self) -> bool:
        raise RuntimeError("neither true nor false")

    def __repr__(self) -> str:
        raise RuntimeError("no text")

    __hash__ = None  # type: ignore[assignment]


PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 20),
    st.sampled_from([-(10**20), 2**31, 2**63, 10**400, 10**5000]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([0.25, 1.0, 1e308, -0.0, math.nan, math.inf]),
    st.text(max_size=8),
    st.sampled_from(["", "true", "auto", "1", "yes", "norm", "gpipe", "gloo", "sigmoid", "model", "samples", "nan"]),
    st.binary(max_size=4),
    st.complex_numbers(),
)
NONSENSE = st.one_of(
    PLAIN,
    st.lists(PLAIN, max_size=3),
    st.tuples(PLAIN, PLAIN),
    st.dictionaries(st.one_of(st.integers(), st.text(max_size=3), st.none(), st.booleans()), PLAIN, max_size=2),
    st.sets(st.integers(), max_size=2),
    st.sampled_from(
        [
            *(PathConfig(), NetworkConfig(), RecoveryPolicy(), PathConstraints(), MoEConfig(), SCHEDULE, SwitchRule()),
            *(Odd(), Odd, object(), int, len, print, Ellipsis, NotImplemented, range(3), slice(2)),
        ]
    ),
    st.just(lambda *_: 0.25),
)


def is_documented(value: Any, types: tuple[type, ...]) -> bool:
    """Whether a value is of one of the types, a number that is one, and no truth value in the place of a number."""
    if isinstance(value, bool) and bool not in types:
        return False
    if isinstance(value, float) and not math.isfinite(value):
        return False
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) > 2**63:
        return False
    return isinstance(value, types) or (FunctionType in types and callable(value) and not isinstance(value, type))


def error_of(make: Callable[[], Any]) -> ValueError | None:
    """Return the error of ours that comes of it; SettingError is one, the others are contradictions of settings."""
    try:
        make()
    except ValueError as error:
        return error
    return None


@pytest.mark.parametrize(("cls", "name"), FIELDS, ids=lambda each: each if isinstance(each, str) else each.__name__)
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(value=NONSENSE)
def test_nonsense_is_our_error_or_a_documented_setting(cls: Callable[..., Any], name: str, value: Any) -> None:
    error = error_of(lambda: cls(**{name: value}))
    if error is None:
        assert is_documented(value, SETTINGS[cls][name]), f"{cls.__name__} takes {name}={value!r}"
        return
    text = str(error)
    assert name in text
    assert len(text) < 700
    if not is_documented(value, SETTINGS[cls][name]):
        assert isinstance(error, SettingError)
        assert "it is " in text


@pytest.mark.parametrize("cls", SETTINGS, ids=lambda cls: cls.__name__)
def test_every_setting_is_in_the_table(cls: type) -> None:
    if dataclasses.is_dataclass(cls):
        assert set(SETTINGS[cls]) == {field.name for field in dataclasses.fields(cls)}


@pytest.mark.parametrize("cls", SETTINGS, ids=lambda cls: cls.__name__)
def test_an_unknown_setting_is_named_with_those_there_are(cls: Callable[..., Any]) -> None:
    known = next(iter(SETTINGS[cls]))  # type: ignore[call-overload]
    with pytest.raises(SettingError, match=rf"there is no setting '{known}z' of .*; did you mean '{known}'\?"):
        cls(**{f"{known}z": 1})
    with pytest.raises(SettingError, match="there is no setting 'qqqqqq'"):
        cls(qqqqqq=1)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"num_microbatches": True}, "num_microbatches=True is of the wrong type (bool); it is a whole number of at"),
        ({"replicas": 2.0}, "replicas=2.0 is of the wrong type (float); it is a whole number of at least 1"),
        ({"num_stages": 0}, "num_stages=0 is out of range; it is a whole number of at least 1 and at most 10,000"),
        ({"skip_ratio": math.nan}, "skip_ratio=nan is not a finite number; it is a finite number of at least 0"),
        ({"verbose": "no"}, "verbose='no' is of the wrong type (str); it is True or False"),
        ({"schedule": "zigzag"}, "schedule='zigzag' is unknown; it is one of 'auto', 'gpipe', '1f1b', or a Schedule"),
        ({"paths": NetworkConfig()}, "it is a PathConfig such as PathConfig(...)"),
        ({"recovery": {"spares": 1}}, "it is a RecoveryPolicy such as RecoveryPolicy(...), or None"),
        ({"skip_ratio": {0: "x"}}, "not all numbers ('x' is of the wrong type (str))"),
        ({"replicas": 10**5000}, "replicas=<int> is out of range"),
    ],
)
def test_messages_name_setting_value_and_what_is_allowed(value: Mapping[str, Any], text: str) -> None:
    with pytest.raises(SettingError) as caught:
        SkipPipeConfig(**value)
    assert text in str(caught.value)


def test_what_is_allowed_is_read_off_annotations() -> None:
    @checked(width=COUNT, share=Range(0, 1))
    @dataclasses.dataclass(frozen=True, slots=True)
    class Sizes:
        width: int
        share: float = 0.5
        names: tuple[str, ...] = ()
        kind: Literal["a", 1] = "a"
        anything: Any = None

    assert Sizes(3, 1, ("x",), 1, object()).share == 1
    assert dataclasses.replace(Sizes(3), width=4).width == 4
    for wrong in ((0,), (3, 1.5), (3, 1, ["x"]), (3, 1, (1,)), (3, 1, (), True), (3, 1, (), "a", 0, 0)):
        with pytest.raises(SettingError):
            Sizes(*wrong)
    assert describe(int | None, COUNT) == "a whole number of at least 1 and at most 1,000,000, or None"
    check("x", 2.5, float, Range(0, 3))
    with pytest.raises(TypeError):  # whoever expects Python's own finds it
        check("x", "2.5", float)


# ------------------------------------------------------------------ the environment and files


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ({"SKIPPIPE_DRIVER_STAGE": "perhaps"}, "driver_stage='perhaps' is of the wrong type (str); it is True"),
        ({"SKIPPIPE_NUM_STAGE": "3"}, "there is no setting 'SKIPPIPE_NUM_STAGE' of the environment; did you mean"),
        ({"SKIPPIPE_RECOVERY": "{heartbeat_s: soon}"}, "under recovery: heartbeat_s='soon' is of the wrong type (str)"),
        ({"SKIPPIPE_RECOVERY": "{spares: -5}"}, "under recovery: spares=-5 is out of range"),
        ({"SKIPPIPE_NETWORK": "{port: http}"}, "under network: port='http' is of the wrong type (str); it is a"),
        ({"SKIPPIPE_NETWORK": "{1: 2, null: 3}"}, "there is no setting 1 of network (NetworkConfig)"),
        ({"SKIPPIPE_PATHS": "[1, 2]"}, "paths=[1, 2] is of the wrong type (list); it is a PathConfig"),
        ({"SKIPPIPE_PATHS": "[" * 5000}, "is nested too deep for a setting"),
        ({"SKIPPIPE_REPLICAS": "1" * 5000}, "is no YAML"),
        ({"SKIPPIPE_REPLICAS": "{"}, "is no YAML"),
        ({"SKIPPIPE_SKIP_RATIO": ".nan"}, "skip_ratio=nan is not a finite number"),
    ],
)
def test_the_environment_is_checked_alike(environment: Mapping[str, str], text: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - below
        SkipPipeConfig.from_environment(environment)
    assert text in str(caught.value)
    assert len(str(caught.value)) < 700


@given(st.text(max_size=30))
@settings(max_examples=200)
def test_no_text_in_the_environment_ends_in_a_raw_error(text: str) -> None:
    for name in ("NUM_STAGES", "PATHS", "SKIP_RATIO", "VERBOSE", "RECOVERY"):
        error = error_of(lambda name=name: SkipPipeConfig.from_environment({f"SKIPPIPE_{name}": text}))
        assert error is None or name.lower() in str(error).lower()
