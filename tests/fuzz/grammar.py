"""The things users do: each a feature that edits a program, read from ``features/*.txt``.

A file holds the axes ``[axis]`` of the grammar; under each stand features, ``name (kind who)``, with the slots of
:mod:`.program` that they fill: one line after the slot's name, or several below it. Kinds are letters; ``ok`` marks
what was never in doubt.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

from .program import Feature


def parse(text: str) -> Iterator[Feature]:
    """Read the features of a file."""
    for section in re.split(r"^\[", text, flags=re.MULTILINE)[1:]:
        axis, rest = section.split("]", 1)
        for part in re.split(r"^(?=\w)", rest.strip("\n"), flags=re.MULTILINE)[1:]:
            head, body = part.split("\n", 1)
            name, kind = head.removesuffix(")").split(" (")
            slots = re.split(r"^    (\w+):(?: |$)", body, flags=re.MULTILINE)[1:]
            pairs = zip(slots[::2], slots[1::2], strict=True)
            yield Feature(name, axis, kind, {slot: dedent(lines.strip("\n")) for slot, lines in pairs})


FEATURES = [
    feature
    for file in sorted((Path(__file__).parent / "features").glob("*.txt"))
    for feature in parse(file.read_text(encoding="utf-8"))
]
BY_NAME = {feature.name: feature for feature in FEATURES}
assert len(BY_NAME) == len(FEATURES), "two features have one name"
