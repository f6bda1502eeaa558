"""Mixture of experts: routers, expert compute, and a layer made of both.

Nothing here knows processes or networks. A routing is a value; routers are small rules that return one.
"""

from skippipe_plugin.moe.experts import ExpertWeights, run_experts
from skippipe_plugin.moe.gates import CosineGate, LinearGate
from skippipe_plugin.moe.layer import MoELayer
from skippipe_plugin.moe.routers import ROUTERS, ExpertChoice, GShard, NullExperts, Sigmoid, Softmax
from skippipe_plugin.moe.routing import Router, Routing, count_loads, limit_capacity, route

__all__ = [
    "ROUTERS",
    "CosineGate",
    "ExpertChoice",
    "ExpertWeights",
    "GShard",
    "LinearGate",
    "MoELayer",
    "NullExperts",
    "Router",
    "Routing",
    "Sigmoid",
    "Softmax",
    "count_loads",
    "limit_capacity",
    "route",
    "run_experts",
]
