"""What things cost: seconds per action and stage, latency and bandwidth per link, bytes per activation.

Frozen data that answers how long an action or a message takes. What messages on one link do to each other is not
known here: see `Links`. Measuring costs is done elsewhere.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path as FilePath
from typing import Any, Literal, Self

from skippipe_plugin.schedule.ir import DRIVER_STAGE, Action, Op
from skippipe_plugin.schedule.jsontext import parse

INPUT_SHARE = 1.27 / (1.27 + 0.94)
"""Share of a transformer block's backward that computes the input gradient, measured on a CPU (F:I:W 1:1.27:0.94)."""

_FORMAT = "skippipe-cost"
_VERSION = 1

Matrix = tuple[tuple[float, ...], ...]

Links = Literal["free", "queued", "shared"]
"""What messages on one directed link wait for. "free": nothing, any number travels at once. "queued": their bytes leave
one after the other at the link's bandwidth, and then share its latency, as on a long wire; and as in the engine, none
leaves before its receiver, once told of the microbatch by the driver, has asked for it. "shared": each has the link for
its whole cost."""


@dataclass(frozen=True, slots=True)
class ComputeCost:
    """Seconds per microbatch of each stage on a rank of speed factor 1.

    Raises:
        ValueError: A number is negative or not finite, or the tuples do not fit together.
    """

    forward_s: tuple[float, ...]
    """By stage; entry 0 is the driver's embedding."""
    backward_s: tuple[float, ...]
    """By stage: the full backward; entry 0 is that of the embedding."""
    loss_s: float
    """Head and loss on the driver, forward and (in training) backward together."""
    input_share: float = INPUT_SHARE
    """Share of the backward that ``I`` takes; ``W`` takes the rest."""
    rank_factor: tuple[float, ...] = ()
    """By rank: how many times slower it is than factor 1, for all it does. Empty means 1 everywhere."""
    gap_s: float = 0.0
    """How long a rank stays busy after each action before it can begin the next; results leave at once."""

    def __post_init__(self) -> None:
        if not self.forward_s or len(self.forward_s) != len(self.backward_s):
            raise ValueError(
                f"forward_s has {len(self.forward_s)} entries, backward_s {len(self.backward_s)}; "
                "give one each per stage, the driver's stage 0 first"
            )
        for name in ("forward_s", "backward_s", "rank_factor"):
            _check_all(name, getattr(self, name))
        for name in ("loss_s", "gap_s", "input_share"):
            _check_one(name, getattr(self, name))
        if self.input_share > 1:
            raise ValueError(f"input_share is {self.input_share}; it is a share between 0 and 1")


@dataclass(frozen=True, slots=True)
class NetworkCost:
    """What a message costs from each rank to each other: ``latency + bytes / bandwidth + overhead`` seconds.

    The diagonals are never used: a hop inside a rank is free.

    Raises:
        ValueError: A latency is negative or not finite, a bandwidth is not positive, or a matrix is not square.
    """

    latency_s: Matrix
    """Shape [ranks, ranks], from row to column."""
    bandwidth_Bps: Matrix
    """Shape [ranks, ranks]; ``inf`` makes size free."""
    overhead_s: float = 0.0
    """Seconds added to every message."""

    def __post_init__(self) -> None:
        for name in ("latency_s", "bandwidth_Bps"):
            matrix: Matrix = getattr(self, name)
            if any(len(row) != len(self.latency_s) for row in matrix) or len(matrix) != len(self.latency_s):
                raise ValueError(f"{name} is not a square matrix over the {len(self.latency_s)} ranks of latency_s")
        _check_links(self)
        _check_one("overhead_s", self.overhead_s)


@dataclass(frozen=True, slots=True)
class CostModel:
    """Compute profile, network profile and message sizes.

    >>> cost = CostModel.uniform(num_stages=2, num_ranks=3, latency_s=0.5)
    >>> cost.action_s(Action.parse("2B0"), rank=2), cost.message_s(1, 2, stage=1)
    (2.0, 0.5)
    """

    compute: ComputeCost
    network: NetworkCost
    activation_bytes: tuple[int, ...] | int
    """Bytes of one microbatch's output of each stage (entry 0: of the embedding), or one size for all."""

    def __post_init__(self) -> None:
        sizes = self.activation_bytes if isinstance(self.activation_bytes, tuple) else (self.activation_bytes,)
        if self.activation_bytes is sizes:
            _check_all("activation_bytes", sizes)
        else:
            _check_one("activation_bytes", sizes[0])
        if isinstance(self.activation_bytes, tuple) and len(sizes) != len(self.compute.forward_s):
            raise ValueError(f"activation_bytes has {len(sizes)} entries for {len(self.compute.forward_s)} stages")
        if self.compute.rank_factor and len(self.compute.rank_factor) != self.num_ranks:
            raise ValueError(f"rank_factor has {len(self.compute.rank_factor)} entries for {self.num_ranks} ranks")

    @property
    def num_stages(self) -> int:
        """The number of block stages that have a cost."""
        return len(self.compute.forward_s) - 1

    @property
    def num_ranks(self) -> int:
        """The number of ranks that have links."""
        return len(self.network.latency_s)

    def action_s(self, action: Action, rank: int) -> float:
        """Return the seconds that an action takes on a rank."""
        compute = self.compute
        factor = compute.rank_factor[rank] if compute.rank_factor else 1.0
        if action.op is Op.F:
            return factor * compute.forward_s[action.stage]
        if action.op is Op.L:
            return factor * compute.loss_s
        share = {Op.B: 1.0, Op.I: compute.input_share, Op.W: 1.0 - compute.input_share}[action.op]
        return factor * share * compute.backward_s[action.stage]

    def message_s(self, source: int, destination: int, stage: int = DRIVER_STAGE) -> float:
        """Return the seconds from the end of the producer to the arrival of a stage's output (or its gradient)."""
        if source == destination:
            return 0.0
        transfer_s = self.transfer_s(source, destination, stage)
        return self.network.latency_s[source][destination] + transfer_s + self.network.overhead_s

    def transfer_s(self, source: int, destination: int, stage: int = DRIVER_STAGE) -> float:
        """Return the seconds in which the bytes of a stage's output leave: the part that bandwidth is to blame for."""
        size = self.activation_bytes if isinstance(self.activation_bytes, int) else self.activation_bytes[stage]
        return size / self.network.bandwidth_Bps[source][destination]

    def occupied_s(self, links: Links, source: int, destination: int, stage: int = DRIVER_STAGE) -> float:
        """Return for how long a message keeps the next one on its link waiting."""
        if links == "free" or source == destination:
            return 0.0
        cost_s = self.transfer_s if links == "queued" else self.message_s
        return cost_s(source, destination, stage)

    def request_s(self, links: Links, driver: int, source: int, destination: int) -> float:
        """Return the seconds from the end of ``0F`` on a driver until a receiver's request is at the sender."""
        if links != "queued" or source == destination:
            return 0.0
        latency_s = self.network.latency_s
        told_s = 0.0 if destination == driver else latency_s[driver][destination]
        return told_s + latency_s[destination][source]

    @classmethod
    def uniform(
        cls,
        num_stages: int,
        num_ranks: int,
        *,
        forward_s: float = 1.0,
        backward_s: float = 2.0,
        loss_s: float = 0.0,
        driver_s: float = 0.0,
        latency_s: float = 0.0,
        bandwidth_Bps: float = math.inf,
        activation_bytes: int = 0,
    ) -> Self:
        """Build a model of equal stages, ranks and links.

        Args:
            num_stages: Number of block stages.
            num_ranks: Number of drivers and workers.
            forward_s: Forward of a block stage.
            backward_s: Full backward of a block stage.
            loss_s: Head and loss on the driver.
            driver_s: Forward, and again backward, of the embedding.
            latency_s: Every link's latency.
            bandwidth_Bps: Every link's bandwidth.
            activation_bytes: Size of every message.
        """
        compute = ComputeCost((driver_s,) + (forward_s,) * num_stages, (driver_s,) + (backward_s,) * num_stages, loss_s)
        network = NetworkCost(((latency_s,) * num_ranks,) * num_ranks, ((bandwidth_Bps,) * num_ranks,) * num_ranks)
        return cls(compute, network, activation_bytes)

    def check_covers(self, num_stages: int, num_ranks: int) -> None:
        """Raise ValueError if a schedule of that many block stages and ranks has stages or ranks without a cost."""
        if num_stages > self.num_stages or num_ranks > self.num_ranks:
            raise ValueError(
                f"the cost model covers {self.num_stages} block stages and {self.num_ranks} ranks, "
                f"the schedule has {num_stages} and {num_ranks}; measure or extend the costs"
            )

    def to_json(self) -> str:
        """Return the model as JSON; an infinite bandwidth is written as null."""
        compute, network = self.compute, self.network
        data = {
            "format": _FORMAT,
            "version": _VERSION,
            "forward_s": compute.forward_s,
            "backward_s": compute.backward_s,
            "loss_s": compute.loss_s,
            "input_share": compute.input_share,
            "rank_factor": compute.rank_factor,
            "gap_s": compute.gap_s,
            "latency_s": network.latency_s,
            "bandwidth_Bps": [[None if math.isinf(value) else value for value in row] for row in network.bandwidth_Bps],
            "overhead_s": network.overhead_s,
            "activation_bytes": self.activation_bytes,
        }
        return json.dumps(data, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` writes; ``input_share``, ``rank_factor``, ``gap_s`` and ``overhead_s`` may be left out.

        Raises:
            ValueError: Not JSON of this format, or an entry is missing, negative or not finite; the message names it.
        """
        data = _read(text)
        compute = ComputeCost(
            _vector(data, "forward_s"),
            _vector(data, "backward_s"),
            _number(data, "loss_s"),
            input_share=_number(data, "input_share", INPUT_SHARE),
            rank_factor=_vector(data, "rank_factor", ()),
            gap_s=_number(data, "gap_s", 0.0),
        )
        bandwidth = _matrix(data, "bandwidth_Bps", null=math.inf)
        network = NetworkCost(_matrix(data, "latency_s"), bandwidth, _number(data, "overhead_s", 0.0))
        return cls(compute, network, _sizes(data))

    def table(self) -> str:
        """Return the costs as text: compute by stage, speed by rank, and the seconds of a message from rank to rank."""
        compute, ranks = self.compute, range(self.num_ranks)
        sizes = self.activation_bytes if isinstance(self.activation_bytes, tuple) else ()
        lines = [f"{'stage':>8} {'forward s':>11} {'backward s':>11} {'bytes':>11}"]
        for stage, (forward_s, backward_s) in enumerate(zip(compute.forward_s, compute.backward_s, strict=True)):
            size = sizes[stage] if sizes else self.activation_bytes
            lines.append(f"{stage or 'driver':>8} {forward_s:>11.4g} {backward_s:>11.4g} {size:>11}")
        lines.append(f"{'loss':>8} {compute.loss_s:>11.4g}")
        lines.append(f"{'pause':>8} {compute.gap_s:>11.4g}")
        lines.append(f"{'message':>8}" + "".join(f" {f'to {rank}':>9}" for rank in ranks) + f" {'slower by':>10}")
        for source in ranks:
            seconds = "".join(
                f" {self.message_s(source, rank):>9.3g}" if rank != source else f" {'-':>9}" for rank in ranks
            )
            factor = compute.rank_factor[source] if compute.rank_factor else 1.0
            lines.append(f"{f'from {source}':>8}{seconds} {factor:>9.3g}x")
        return "\n".join(lines)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the model to a file as JSON."""
        FilePath(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """Read a file that `save` wrote; raises ValueError like `from_json`."""
        return cls.from_json(FilePath(path).read_text(encoding="utf-8"))


def _check_all(name: str, values: Sequence[float]) -> None:
    for at, value in enumerate(values):
        _check_one(f"{name}[{at}]", value)


def _check_one(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} is {value}; costs are finite and not negative")


def _check_links(network: NetworkCost) -> None:
    ranks = range(len(network.latency_s))
    for a, b in ((a, b) for a in ranks for b in ranks):
        latency_s, bandwidth = network.latency_s[a][b], network.bandwidth_Bps[a][b]
        if a != b and (latency_s == math.inf or bandwidth == 0):
            raise ValueError(
                f"the link from rank {a} to rank {b} has latency_s={latency_s} and bandwidth_Bps={bandwidth}, so rank "
                f"{b} cannot be reached from rank {a}; connect them, or leave one out of the run"
            )
        _check_one(f"latency_s[{a}][{b}]", latency_s)
        if not bandwidth > 0:
            raise ValueError(f"bandwidth_Bps[{a}][{b}] is {bandwidth}; a bandwidth is positive (inf for no limit)")


def _read(text: str) -> dict[str, Any]:  # Any: JSON
    try:
        data = parse(text)
    except ValueError as error:
        raise ValueError(f"the cost model is not JSON: {error}") from error
    if not isinstance(data, dict) or (data.get("format"), data.get("version")) != (_FORMAT, _VERSION):
        raise ValueError(f"the cost model is not a {_FORMAT} of version {_VERSION}")
    return data


def _entry(data: Mapping[str, Any], key: str, default: object) -> Any:  # Any: JSON
    value = data.get(key, default)
    if value is None:
        raise ValueError(f"the cost model lacks {key!r}; measure it or add it")
    return value


def _as_number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} holds {value!r}, which is not a number")
    return value


def _as_list(name: str, value: object) -> Sequence[object]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name} is {value!r}; it must be a list")
    return value


def _number(data: Mapping[str, Any], key: str, default: float | None = None) -> float:
    return _as_number(key, _entry(data, key, default))


def _vector(data: Mapping[str, Any], key: str, default: tuple[float, ...] | None = None) -> tuple[float, ...]:
    return tuple(_as_number(key, value) for value in _as_list(key, _entry(data, key, default)))


def _matrix(data: Mapping[str, Any], key: str, null: float | None = None) -> Matrix:
    rows = [_as_list(f"{key}[{i}]", row) for i, row in enumerate(_as_list(key, _entry(data, key, None)))]
    return tuple(tuple(_as_number(key, null if value is None else value) for value in row) for row in rows)


def _sizes(data: Mapping[str, Any]) -> tuple[int, ...] | int:
    value = _entry(data, "activation_bytes", None)
    sizes = _as_list("activation_bytes", value) if isinstance(value, list) else [value]
    if not all(isinstance(size, int) and not isinstance(size, bool) for size in sizes):
        raise ValueError(f"activation_bytes is {value!r}; it counts bytes, whole numbers")
    return tuple(sizes) if isinstance(value, list) else int(value)  # type: ignore[arg-type]  # checked above
