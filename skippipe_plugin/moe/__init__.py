"""Mixture of experts: routers, expert compute, adapters for models as they are, and rules of balance.

Nothing here knows processes or networks. A routing is a value; routers are small rules that return one; a model is
adapted by hooks on its router instances.
"""

from skippipe_plugin.moe.attach import Attached, RouterStatistics, attach, freeze_routers
from skippipe_plugin.moe.balance import (
    BIAS_RULES,
    add_auxiliary_loss,
    load_balancing_loss,
    max_violation,
    quantile_bias,
    update_by_sign,
    update_in_proportion,
)
from skippipe_plugin.moe.config import MoEConfig
from skippipe_plugin.moe.experts import ExpertWeights, run_experts
from skippipe_plugin.moe.families import RouterSite, find_routers, register_family
from skippipe_plugin.moe.gates import CosineGate, LinearGate
from skippipe_plugin.moe.layer import MoELayer
from skippipe_plugin.moe.rectification import rectify
from skippipe_plugin.moe.routers import ROUTERS, ExpertChoice, GShard, NullExperts, Sigmoid, Softmax
from skippipe_plugin.moe.routing import Router, Routing, count_loads, limit_capacity, route

__all__ = [
    "BIAS_RULES",
    "ROUTERS",
    "Attached",
    "CosineGate",
    "ExpertChoice",
    "ExpertWeights",
    "GShard",
    "LinearGate",
    "MoEConfig",
    "MoELayer",
    "NullExperts",
    "Router",
    "RouterSite",
    "RouterStatistics",
    "Routing",
    "Sigmoid",
    "Softmax",
    "add_auxiliary_loss",
    "attach",
    "count_loads",
    "find_routers",
    "freeze_routers",
    "limit_capacity",
    "load_balancing_loss",
    "max_violation",
    "quantile_bias",
    "rectify",
    "register_family",
    "route",
    "run_experts",
    "update_by_sign",
    "update_in_proportion",
]
