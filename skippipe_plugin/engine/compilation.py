"""How blocks are compiled, on its way to where they are: ``Module.compile`` is kept by no module that is pickled."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import cloudpickle
from torch import nn

from .channel import Buffer
from .errors import SkipPipeError


@dataclass(frozen=True, slots=True)
class Compilation:
    """What is compiled, and with what keyword arguments of ``Module.compile``."""

    settings: Mapping[int, Mapping[str, Mapping[str, Any]]]  # Any: arguments of Module.compile
    """By block, and by the name of the module within it; the block itself has none."""

    def pack(self) -> bytes:
        """Return what :meth:`unpack` reads; nothing where nothing is compiled.

        Raises:
            SkipPipeError: A setting is something that only this process has.
        """
        if not self.settings:
            return b""
        try:
            packed: bytes = cloudpickle.dumps(dict(self.settings))
        except Exception as error:
            raise SkipPipeError(
                f"the settings of torch.compile cannot be sent to the workers, which compile the blocks: {error}. Give "
                "the backend by its name, or as a function of a module that the workers can import, and options "
                "without what belongs to this process, such as locks or open files"
            ) from error
        return packed

    @classmethod
    def unpack(cls, packed: Buffer) -> Compilation:
        """Invert :meth:`pack`."""
        return cls(pickle.loads(packed) if len(packed) else {})

    def compile(self, blocks: Mapping[int, nn.Module]) -> None:
        """Let these blocks be compiled when they are called."""
        for index, block in blocks.items():
            modules = dict(block.named_modules()) if index in self.settings else {}
            for name, settings in self.settings.get(index, {}).items():
                if name in modules:
                    # torch takes some options out of the dictionary
                    modules[name].compile(**{k: dict(v) if k == "options" else v for k, v in settings.items()})
