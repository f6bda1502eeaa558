"""Nodes on one machine: network namespaces, each with one address, and cables between them. Needs root."""

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


@dataclass(frozen=True)
class Cable:
    """What connects this machine to a node."""

    node: Node
    address: str
    """Of this machine, as the node sees it."""
    interface: str

    def cut(self) -> None:
        """Carry nothing any more, and tell nobody."""
        _ip("link", "set", self.interface, "down")

    def repair(self) -> None:
        """Carry everything again."""
        _ip("link", "set", self.interface, "up")


@contextmanager
def cable_to_a_node() -> Iterator[Cable]:
    """Make a node that reaches this machine and nothing else; remove it at the end."""
    cable = Cable(Node(f"skippipe{os.getpid()}c", "10.79.1.2"), "10.79.1.1", f"skp{os.getpid()}")
    node = cable.node
    _ip("netns", "add", node.name)
    try:
        far = ["peer", "name", node.interface, "netns", node.name]
        _ip("link", "add", cable.interface, "type", "veth", *far)
        _ip("addr", "add", f"{cable.address}/24", "dev", cable.interface)
        _ip("-n", node.name, "addr", "add", f"{node.address}/24", "dev", node.interface)
        for interface in ("lo", node.interface):
            _ip("-n", node.name, "link", "set", interface, "up")
        cable.repair()
        yield cable
    finally:
        subprocess.run(["ip", "netns", "delete", node.name], check=False, capture_output=True)
        subprocess.run(["ip", "link", "delete", cable.interface], check=False, capture_output=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
