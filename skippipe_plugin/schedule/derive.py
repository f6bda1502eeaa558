"""Schedules made from schedules."""

from dataclasses import replace

from skippipe_plugin.schedule.ir import Action, Op, Schedule


def forward_only(schedule: Schedule) -> Schedule:
    """Return what is left of ``schedule`` in evaluation: its forwards and the driver's ``0L``, in the same order.

    Dropping actions from an order that cannot deadlock leaves one that cannot.
    """
    orders = tuple(tuple(action for action in order if _stays(action)) for order in schedule.orders)
    return replace(schedule, orders=orders, backward=False)


def _stays(action: Action) -> bool:
    return action.op in (Op.F, Op.L)
