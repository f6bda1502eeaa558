"""Two nodes on one machine: network namespaces, each with one address, and a cable between them. Needs root."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Node:
    """A namespace."""

    name: str
    address: str
    interface: str = "cable"

    @property
    def prefix(self) -> list[str]:
        """What to put before a command to run it there."""
        return ["ip", "netns", "exec", self.name]


@contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Make two nodes that reach each other and nothing else; remove them at the end."""
    pair = Node(f"skippipe{os.getpid()}a", "10.79.0.1"), Node(f"skippipe{os.getpid()}b", "10.79.0.2")
    first, second = pair
    try:
        for node in pair:
            _ip("netns", "add", node.name)
        _ip(
            "link",
            "add",
            first.interface,
            "netns",
            first.name,
            "type",
            "veth",
            "peer",
            second.interface,
            "netns",
            second.name,
        )
        for node in pair:
            _ip("-n", node.name, "addr", "add", f"{node.address}/24", "dev", node.interface)
            for interface in ("lo", node.interface):
                _ip("-n", node.name, "link", "set", interface, "up")
        yield pair
    finally:
        for node in pair:
            subprocess.run(["ip", "netns", "delete", node.name], check=False, capture_output=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
