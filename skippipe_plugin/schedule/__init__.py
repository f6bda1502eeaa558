"""What runs where and when: schedules as values, their validator, generators, cost model and simulator.

Pure Python without torch, processes or network; everything else of the package builds on this one.
"""

from skippipe_plugin.schedule.cost import ComputeCost, CostModel, Links, NetworkCost
from skippipe_plugin.schedule.couple import Meeting, condense, condense_costs, expand, meetings
from skippipe_plugin.schedule.derive import forward_only
from skippipe_plugin.schedule.detour import detour, leaves_out, swap_ends
from skippipe_plugin.schedule.fit import find_transfers, fit_costs
from skippipe_plugin.schedule.full import FULL_SCHEDULES, full_schedule, gpipe, one_f_one_b
from skippipe_plugin.schedule.ir import (
    DRIVER_STAGE,
    Action,
    Message,
    Op,
    Path,
    Schedule,
    ScheduleError,
    Visit,
    dependencies,
    messages,
    rank_of,
)
from skippipe_plugin.schedule.order import list_schedule
from skippipe_plugin.schedule.partial import Plan, plan, plan_paths
from skippipe_plugin.schedule.picture import draw
from skippipe_plugin.schedule.problem import PlanProblem
from skippipe_plugin.schedule.routes import PathConstraints
from skippipe_plugin.schedule.simulate import lower_bound_s, simulate
from skippipe_plugin.schedule.timeline import Event, Mark, Timeline, Transfer
from skippipe_plugin.schedule.validate import in_order_links, peak_activations, topological_order, validate

__all__ = [
    "DRIVER_STAGE",
    "FULL_SCHEDULES",
    "Action",
    "ComputeCost",
    "CostModel",
    "Event",
    "Links",
    "Mark",
    "Meeting",
    "Message",
    "NetworkCost",
    "Op",
    "Path",
    "PathConstraints",
    "Plan",
    "PlanProblem",
    "Schedule",
    "ScheduleError",
    "Timeline",
    "Transfer",
    "Visit",
    "condense",
    "condense_costs",
    "dependencies",
    "detour",
    "draw",
    "expand",
    "find_transfers",
    "fit_costs",
    "forward_only",
    "full_schedule",
    "gpipe",
    "in_order_links",
    "leaves_out",
    "list_schedule",
    "lower_bound_s",
    "meetings",
    "messages",
    "one_f_one_b",
    "peak_activations",
    "plan",
    "plan_paths",
    "rank_of",
    "simulate",
    "swap_ends",
    "topological_order",
    "validate",
]
