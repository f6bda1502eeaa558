"""How often experts were chosen in a step so far, by the microbatches of all replicas of a stage.

A balancing loss on the statistics of the global batch (Qiu et al., arXiv 2501.11873) needs the visits of microbatches
that ran elsewhere. Its gradient is linear in them and they are needed in the backward only, so each replica sends its
own after a forward, and waits for those of the others before a backward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor


class Arrival(Protocol):
    """A tensor that is on its way."""

    def wait(self) -> Tensor:
        """Return it."""


class Post(Protocol):
    """Messages to other ranks beside those of the schedule."""

    def send_aside(self, tensor: Tensor, destination: int, tag: int) -> None:
        """Start to send a host tensor."""

    def receive_aside(self, length: int, source: int, tag: int) -> Arrival:
        """Post a receive of ``length`` int64."""


class Tally:
    """The visits of experts at one stage in one step; implements :class:`skippipe_plugin.engine.stage.Witness`.

    Args:
        widths: By router of the stage, in an order that all replicas have: how many counts it makes.
        so_far: By microbatch: those whose visits count in its backward, itself included.
        ranks: By microbatch that visits the stage: on which rank.
        rank: This one.
        base: By router: the visits of earlier batches of the same optimizer step.
        post: To the other replicas; needed if there are any.
        tag: The first of as many tags as there are microbatches, for no other use.
    """

    def __init__(
        self,
        widths: Mapping[str, int],
        so_far: Mapping[int, Sequence[int]],
        ranks: Mapping[int, int],
        rank: int,
        *,
        base: Mapping[str, Tensor] | None = None,
        post: Post | None = None,
        tag: int = 0,
    ) -> None:
        self._widths = dict(widths)
        self._so_far, self._ranks, self._rank = so_far, ranks, rank
        self._base = base or {}
        self._post, self._tag = post, tag
        self._counts: dict[int, dict[str, Tensor]] = {}
        self._current = -1
        own = [microbatch for microbatch, on in ranks.items() if on == rank]
        self._wanted_by = {
            microbatch: sorted({ranks[later] for later in so_far if microbatch in so_far[later]} - {rank})
            for microbatch in own
        }

    # ------------------------------------------------------------- the stage's

    def begin(self, microbatch: int) -> None:
        """Begin the forward of a microbatch."""
        self._current = microbatch
        self._counts[microbatch] = {name: torch.zeros(w, dtype=torch.int64) for name, w in self._widths.items()}

    def end(self, microbatch: int) -> None:
        """End it: let the others know."""
        flat = torch.cat(list(self._counts[microbatch].values()))
        for rank in self._wanted_by.get(microbatch, ()):
            assert self._post is not None, "other replicas without a way to them"
            self._post.send_aside(flat, rank, self._tag + microbatch)

    def turn(self, microbatch: int) -> None:
        """Begin the backward of a microbatch: wait for what the others have to say."""
        self._current = microbatch
        lacking = [each for each in self._so_far[microbatch] if each not in self._counts]
        coming = [(each, self._receive(each)) for each in lacking]
        for each, arrival in coming:
            parts = torch.split(arrival.wait(), list(self._widths.values()))
            self._counts[each] = dict(zip(self._widths, parts, strict=True))

    def _receive(self, microbatch: int) -> Arrival:
        assert self._post is not None, "other replicas without a way to them"
        return self._post.receive_aside(sum(self._widths.values()), self._ranks[microbatch], self._tag + microbatch)

    # ------------------------------------------------------------- the routers'

    @property
    def current(self) -> int:
        """The microbatch that runs."""
        return self._current

    def note(self, router: str, visits: Tensor) -> None:
        """Count what a router has chosen for the microbatch that runs."""
        self._counts[self._current][router] += visits

    def loads(self, router: str, microbatch: int) -> Tensor:
        """Return the visits so far, when the microbatch goes back."""
        total = self._base.get(router, torch.zeros(self._widths[router], dtype=torch.int64)).clone()
        for each in self._so_far[microbatch]:
            total += self._counts[each][router]
        return total

    def own(self) -> dict[str, Tensor]:
        """Return the visits of this rank's microbatches."""
        mine = [self._counts[each] for each in self._counts if self._ranks[each] == self._rank]
        return {
            name: sum((counts[name] for counts in mine), torch.zeros(width, dtype=torch.int64))
            for name, width in self._widths.items()
        }
