"""The experts' side of LoadBalancer: biases and auxiliary loss, the log, and the picture of loads."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor

from ..checked import COUNT, Range, checked
from ..driver.routers import RouterControl
from ..moe import BIAS_RULES, MoEConfig, RouterStatistics, max_violation
from ..schedule.picture import require_matplotlib
from ..strategies import SkipPipeStrategy

log = logging.getLogger(__name__)

ExpertMethod = Literal["bias", "loss", "placement"]

RATES = {"sign": 1e-3, "proportional": 1e-2}
"""The rate of each rule for the selection bias: the paper's, and one that is ten times as fast at the start."""
QUANTILE = "quantile"
AUXILIARY_LOSS = 0.01
MAX_REMEMBERED = 1000


_RATE: Final = Range(0, 1_000_000, includes_least=False)


@checked(rate=_RATE, auxiliary_loss=_RATE, payback_steps=COUNT)
@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertConfig:
    """How experts are balanced."""

    rule: str = "sign"
    """The rule of the selection bias: ``"sign"`` (Wang et al., arXiv 2408.15664) takes one or two hundred steps from a
    skewed start, ``"proportional"`` a few dozen, ``"quantile"`` a few: it computes for every microbatch the bias that
    would have balanced it, and takes their mean."""
    rate: float | None = None
    """The rule's rate; None: 0.001 for ``"sign"``, 0.01 for ``"proportional"``. ``"quantile"`` has none."""
    auxiliary_loss: float = AUXILIARY_LOSS
    """The coefficient of the auxiliary loss, where it is asked for."""
    payback_steps: int = 100
    """Within how many steps a move of experts (``"placement"``) must pay for itself, by measured loads and links."""

    def __post_init__(self) -> None:
        if self.rule not in (*BIAS_RULES, QUANTILE):
            raise ValueError(f"rule={self.rule!r} is unknown; choose one of {', '.join((*BIAS_RULES, QUANTILE))}")
        if self.rule == QUANTILE and self.rate is not None:
            raise ValueError(f"rate={self.rate} has no effect with rule='quantile', which has none")


class ExpertBalance:
    """Keeps the experts of a pipeline evenly loaded; the loads are those of whole optimizer steps."""

    def __init__(self, methods: Sequence[str], config: ExpertConfig | None = None, every_n_steps: int = 10) -> None:
        """Check what is asked for; placements are looked at every n-th step."""
        for method in methods:
            if method not in get_args(ExpertMethod):
                known = ", ".join(map(repr, get_args(ExpertMethod)))
                raise ValueError(f"experts={method!r} is unknown; choose {known}, a tuple of these, or None")
        self.methods = tuple(methods)
        self.config = config or ExpertConfig()
        self.shares: dict[int, dict[str, list[float]]] = {}
        """By optimizer step and router: the share of all visits that each expert got; long runs are thinned out."""
        self._every = 1
        self._every_n_steps = every_n_steps
        self._loads: dict[str, list[Tensor]] = {}
        self._biases: dict[str, list[float]] = {}

    def prepare(self, strategy: SkipPipeStrategy) -> None:
        """Before the pipeline is set up: see to it that the routers are listened to."""
        moe = strategy.settings.moe or MoEConfig()
        if "loss" in self.methods and not moe.auxiliary_loss:
            moe = replace(moe, auxiliary_loss=self.config.auxiliary_loss)
        if "bias" in self.methods:
            moe = replace(moe, exact_bias=True, quantiles=moe.quantiles or self.config.rule == QUANTILE)
        strategy.settings = replace(strategy.settings, moe=moe)

    def start(self, strategy: SkipPipeStrategy) -> None:
        """When training starts: give the biases of a resumed run back to routers that do not save them."""
        self.shares.clear()
        if self._biases:
            strategy.routers.set_biases(self._biases)

    def step(self, strategy: SkipPipeStrategy, step: int) -> dict[str, float]:
        """After optimizer step number ``step``: move the biases; return what is to be logged."""
        taken = {name: each for name, each in strategy.routers.take().items() if each.num_tokens}
        if "bias" in self.methods and taken:
            self._move(strategy.routers, taken)
        self._remember(step, {name: _shares(each.loads) for name, each in taken.items()})
        spent = {"moe/spent_share": strategy.spent_share(taken)} if taken else {}
        return load_metrics(taken) | spent | self._place(strategy, step, taken)

    def _place(self, strategy: SkipPipeStrategy, step: int, taken: Mapping[str, RouterStatistics]) -> dict[str, float]:
        """Every n-th step, move experts by the mean loads since the last time."""
        if "placement" not in self.methods:
            return {}
        for name, each in taken.items():
            self._loads.setdefault(name, []).append(each.loads)
        if step % self._every_n_steps or not self._loads:
            return {}
        loads, self._loads = self._loads, {}
        means = {name: torch.stack(each).double().mean(0).tolist() for name, each in loads.items()}
        moves, before = strategy.rebalance_experts(means, self.config.payback_steps)
        for name, move in moves.items():
            log.info(
                "step %d: LoadBalancer moves %d experts of %s: saves %.3g s per step, costs %.3g s once",
                step,
                move.num_moved,
                name,
                move.saved_s,
                move.cost_s,
            )
        return {"moe/rank_imbalance": before, "moe/moved_experts": float(sum(m.num_moved for m in moves.values()))}

    def _move(self, routers: RouterControl, taken: Mapping[str, RouterStatistics]) -> None:
        if self.config.rule == QUANTILE:
            for name, each in taken.items():
                if each.quantiles is not None:
                    self._biases[name] = (each.quantiles / each.num_tokens).tolist()
            routers.set_biases(self._biases)
            return
        rate = RATES[self.config.rule] if self.config.rate is None else self.config.rate
        loads = {name: each.loads.tolist() for name, each in taken.items()}
        self._biases = routers.update_biases(loads, self.config.rule, rate)

    def _remember(self, step: int, shares: dict[str, list[float]]) -> None:
        if len(self.shares) >= MAX_REMEMBERED:
            self._every *= 2
            self.shares = {known: each for known, each in self.shares.items() if known % self._every == 0}
        if shares and step % self._every == 0:
            self.shares[step] = shares

    def state_dict(self) -> dict[str, Any]:
        """Return the biases that the model's own checkpoint lacks."""
        return {"biases": self._biases}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the biases of a run that is resumed."""
        self._biases = dict(state["biases"])


def load_metrics(statistics: Mapping[str, RouterStatistics]) -> dict[str, float]:
    """Return MaxVio, entropy and, where slots were empty, their share: by router, and MaxVio's mean and maximum."""
    metrics: dict[str, float] = {}
    for name, each in statistics.items():
        metrics[f"moe/{name}/max_violation"] = max_violation(each.loads)
        metrics[f"moe/{name}/entropy"] = each.entropy / each.num_tokens
        if each.num_empty:
            metrics[f"moe/{name}/empty_share"] = each.num_empty / (each.num_empty + int(each.loads.sum()))
    violations = [value for name, value in metrics.items() if name.endswith("max_violation")]
    if violations:
        metrics["moe/max_violation"] = sum(violations) / len(violations)
        metrics["moe/worst_max_violation"] = max(violations)
    return metrics


def _shares(loads: Tensor) -> list[float]:
    shares: list[float] = (loads / loads.sum().clamp(min=1)).tolist()
    return shares


def draw_loads(
    shares: Mapping[int, Mapping[str, Sequence[float]]], path: str | PathLike[str], *, title: str = ""
) -> None:
    """Write a heat map of expert loads over the steps: a panel per router, a row per expert, a column per step.

    Colours are multiples of the even share, from none to twice and more.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: There is no step to draw.
    """
    names = list(dict.fromkeys(name for each in shares.values() for name in each))
    if not names:
        raise ValueError("there is nothing to draw: no step has loads of experts")
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 0.6 + 1.1 * len(names)), layout="constrained")
    panels = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    for panel, name in zip(panels, names, strict=True):
        num_experts = next(len(each[name]) for each in shares.values() if name in each)
        columns = [each.get(name, [float("nan")] * num_experts) for each in shares.values()]
        image = panel.imshow(
            num_experts * torch.tensor(columns).T.numpy(),
            aspect="auto",
            interpolation="nearest",
            cmap="RdBu_r",
            vmin=0,
            vmax=2,
            extent=(min(shares) - 0.5, max(shares) + 0.5, num_experts - 0.5, -0.5),
        )
        panel.set_title(name, loc="left", fontsize=8, pad=2)
        panel.set_yticks(range(0, num_experts, max(1, num_experts // 4)))
        panel.tick_params(labelsize=7)
        panel.set_ylabel("expert", fontsize=7)
    panels[-1].set_xlabel("optimizer step", fontsize=8)
    figure.colorbar(image, ax=list(panels), label="load over the even share", extend="max", shrink=0.8)
    if title:
        figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
