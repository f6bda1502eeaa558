"""Settings of a loop's pipeline: arguments come before environment variables, these before a YAML file."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from textwrap import shorten
from typing import Any, Final, Self

import yaml

from ..checked import NUM_PROCESSES, SettingError, checked, unknown_settings
from ..driver.recovery.policy import RecoveryPolicy
from ..job.network import NetworkConfig
from ..moe import MoEConfig
from .config import PathConfig
from .settings import PipelineSettings

PREFIX: Final = "SKIPPIPE_"
_OURS: Final = ("ATTEMPT", "PARENT", "SUPERVISOR")
"""Variables by which our own processes tell each other who they are."""
FILE_VARIABLE: Final = f"{PREFIX}CONFIG_FILE"
"""Names the YAML file."""
_OTHER_VARIABLES: Final = (FILE_VARIABLE, *(PREFIX + name for name in ("SECRET", "SECRET_FILE", "WORKERS", *_OURS)))
_NESTED: Final[Mapping[str, type]] = {
    "paths": PathConfig,
    "network": NetworkConfig,
    "moe": MoEConfig,
    "recovery": RecoveryPolicy,
}


@checked(num_stages=NUM_PROCESSES)
@dataclass(frozen=True, kw_only=True)
class SkipPipeConfig(PipelineSettings):
    """How a loop's model is spread: the settings of a SkipPipeStrategy, and what its Trainer would say.

    Every setting may also be an environment variable (``SKIPPIPE_SKIP_RATIO=0.25``) or a line of the YAML file that
    ``SKIPPIPE_CONFIG_FILE`` names (``skip_ratio: 0.25``); see :meth:`from_environment`.

    Example:
        >>> SkipPipeConfig.from_environment({"SKIPPIPE_NUM_STAGES": "4", "SKIPPIPE_PATHS": "{max_jump: 2}"}).num_stages
        4

    Raises:
        ValueError: A setting cannot be, or contradicts another one.
    """

    num_stages: int | None = None
    """Into how many stages the blocks are cut. None: as many as the launcher's processes or this machine's GPUs make;
    without either, four."""
    recovery: RecoveryPolicy | None = None
    """How lost workers are replaced; None: a lost worker ends the run."""

    def __post_init__(self) -> None:
        PipelineSettings.__post_init__(self)
        if self.drivers != 1:
            raise ValueError(f"drivers={self.drivers}: one process drives the pipeline of a loop; use drivers=1")
        if self.recovery is not None:
            self.fit_recovery(self.recovery)

    def stages_of(self, num_processes: int) -> int:
        """Return how many stages the processes of a launcher make, the driver included.

        Raises:
            ValueError: They do not fit.
        """
        stages = self.shape.num_stages(num_processes)
        if self.num_stages not in (None, stages):
            raise ValueError(
                f"num_stages={self.num_stages}, but {num_processes} processes make {stages}; leave num_stages out, or "
                "start another number of processes"
            )
        return stages

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None, **arguments: Any) -> Self:
        """Return the settings of ``arguments``, else of the environment, else of the YAML file, else the defaults.

        Args:
            environment: Instead of ``os.environ``. Values are read as YAML, so that numbers and mappings are what they
                look like.
            arguments: Settings by name.

        Raises:
            ValueError: A setting is unknown or cannot be, or the file cannot be read.
        """
        environment = os.environ if environment is None else environment
        settings = _read(environment[FILE_VARIABLE]) if environment.get(FILE_VARIABLE) else {}
        names = [field.name for field in fields(cls)]
        _check_variables(environment, names)
        for name in names:
            if (text := environment.get(PREFIX + name.upper())) is not None:
                settings[name] = _parsed(text, f"{PREFIX}{name.upper()}={text!r}")
        settings |= arguments
        unknown_settings(settings, names, cls.__name__)
        return cls(**{name: _nested(name, value) for name, value in settings.items()})

    @classmethod
    def names(cls) -> frozenset[str]:
        """Return the names of all settings."""
        return frozenset(field.name for field in fields(cls))


def _read(file: str) -> dict[str, Any]:
    try:
        text = Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{FILE_VARIABLE}={file!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{FILE_VARIABLE}={file!r} is no text in UTF-8") from error
    settings = _parsed(text, file)
    if not isinstance(settings, dict):
        raise ValueError(f"{file} holds no settings; write one per line, such as 'skip_ratio: 0.25'")
    return settings


def _parsed(text: str, source: str) -> Any:  # Any: what YAML holds
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{shorten(source, 200)} is no YAML: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{shorten(source, 200)} is nested too deep for a setting") from error


def _nested(name: str, value: Any) -> Any:
    if name not in _NESTED or not isinstance(value, Mapping):
        return value
    kind = _NESTED[name]
    unknown_settings(value, [field.name for field in dataclasses.fields(kind)], f"{name} ({kind.__name__})")
    try:
        return kind(**value)
    except ValueError as error:
        raise SettingError(f"under {name}: {error}") from error


def _check_variables(environment: Mapping[str, str], names: list[str]) -> None:
    """Refuse variables that look like settings and are none: a misspelt one would do nothing."""
    known = [*(PREFIX + name.upper() for name in names), *_OTHER_VARIABLES]
    unknown_settings([name for name in environment if name.startswith(PREFIX)], known, "the environment")
