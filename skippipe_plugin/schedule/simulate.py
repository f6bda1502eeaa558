"""Schedule x cost model -> timeline, and the time that no order of the same paths can beat.

Each rank runs its own order, one action at a time; an action starts when its rank is free and its input has arrived.
Coupled ranks begin an action together when all of them can, and end it together with the slowest.
Messages leave when their producer ends and do not contend, unless links are told to be queued or shared.
"""

from itertools import pairwise

from skippipe_plugin.schedule.cost import CostModel, Links
from skippipe_plugin.schedule.couple import Meeting, meetings
from skippipe_plugin.schedule.ir import Action, Op, Schedule, chains, dependencies, messages, rank_of
from skippipe_plugin.schedule.timeline import Event, Timeline, Transfer
from skippipe_plugin.schedule.validate import topological_order


def simulate(schedule: Schedule, cost: CostModel, *, links: Links = "free") -> Timeline:
    """Predict when each action runs and each message travels.

    Args:
        schedule: What runs.
        cost: On which costs.
        links: What messages on one directed link do to each other; they pass it in the order they are sent.

    Raises:
        ScheduleError: The schedule deadlocks, or lacks an action or has one too many; the message names them.
        ValueError: The cost model lacks a stage or a rank of the schedule.
    """
    cost.check_covers(schedule.num_stages, schedule.num_ranks)
    sent = {message.producer: message for message in messages(schedule)}
    inputs, ranks = dependencies(schedule), rank_of(schedule)
    free_s = [0.0] * schedule.num_ranks
    link_free_s: dict[tuple[int, int], float] = {}
    begun_s: dict[int, float] = {}
    arrival_s: dict[Action, float] = {}
    spans_s: dict[Action, tuple[float, float]] = {}
    events: list[Event] = []
    transfers: list[Transfer] = []
    coupled = meetings(schedule)
    for action in topological_order(schedule):
        rank = ranks[action]
        if action not in spans_s:
            meeting = coupled.get(action) or Meeting((rank,), (action,))
            # W takes what I left on the same rank; what I sent away travels to someone else.
            awaited = [needed for each in meeting.actions if each.op is not Op.W for needed in inputs[each]]
            start_s = max([*(free_s[each] for each in meeting.ranks), *(arrival_s[needed] for needed in awaited)])
            end_s = start_s + max(
                cost.action_s(its, each) for each, its in zip(meeting.ranks, meeting.actions, strict=True)
            )
            for each in meeting.ranks:
                free_s[each] = end_s + cost.compute.gap_s
            spans_s.update(dict.fromkeys(meeting.actions, (start_s, end_s)))
        start_s, end_s = spans_s[action]
        arrival_s[action] = end_s
        begun_s.setdefault(action.microbatch, end_s)
        events.append(Event(rank, action, start_s, end_s))
        if action in sent:
            message = sent[action]
            link = (rank, message.destination)
            # A link's messages come from one rank, whose actions are met here in the order they run.
            sent_s = end_s
            if links != "free":
                driver = schedule.paths[action.microbatch].driver
                asked_s = begun_s[action.microbatch] + cost.request_s(links, driver, *link)
                sent_s = max(end_s, link_free_s.get(link, 0.0), asked_s)
            arrival_s[action] = sent_s + cost.message_s(*link, message.activation_stage)
            link_free_s[link] = sent_s + cost.occupied_s(links, *link, message.activation_stage)
            transfers.append(Transfer(*link, action, sent_s, arrival_s[action]))
    return Timeline(tuple(events), tuple(transfers), label=schedule.name)


def lower_bound_s(schedule: Schedule, cost: CostModel) -> float:
    """Return a time that no order of these actions on these paths can beat.

    The larger of two bounds: the longest way of one microbatch through compute and links alone; and over the ranks,
    the earliest that any input can reach it, plus all its work, plus the least that must follow after its last action.
    """
    cost.check_covers(schedule.num_stages, schedule.num_ranks)
    heads, tails = _heads_s(schedule, cost), _tails_s(schedule, cost)
    ranks = rank_of(schedule)
    own: dict[int, list[Action]] = {}
    for action, rank in ranks.items():
        own.setdefault(rank, []).append(action)
    bounds = [heads[action] + cost.action_s(action, rank) + tails[action] for action, rank in ranks.items()]
    for rank, actions in own.items():
        work_s = sum(cost.action_s(action, rank) for action in actions) + cost.compute.gap_s * (len(actions) - 1)
        bounds.append(min(heads[action] for action in actions) + work_s + min(tails[action] for action in actions))
    return max(bounds, default=0.0)


def _hops_s(schedule: Schedule, cost: CostModel) -> dict[tuple[Action, Action], float]:
    """Map each (producer, consumer) pair between two ranks to the seconds its message travels."""
    return {
        (message.producer, message.consumer): cost.message_s(
            message.source, message.destination, message.activation_stage
        )
        for message in messages(schedule)
    }


def _heads_s(schedule: Schedule, cost: CostModel) -> dict[Action, float]:
    """Map each action to its earliest possible start, were every rank free at all times."""
    ranks, hops_s = rank_of(schedule), _hops_s(schedule, cost)
    heads: dict[Action, float] = {}
    for action, inputs in dependencies(schedule).items():  # lists each input before its consumers
        ends = (heads[a] + cost.action_s(a, ranks[a]) + hops_s.get((a, action), 0.0) for a in inputs)
        heads[action] = max(ends, default=0.0)
    return heads


def _tails_s(schedule: Schedule, cost: CostModel) -> dict[Action, float]:
    """Map each action to the least time from its end to the end of all that waits for it."""
    ranks, hops_s = rank_of(schedule), _hops_s(schedule, cost)
    tails = dict.fromkeys(ranks, 0.0)
    for steps in chains(schedule):
        for (producer, rank), (consumer, next_rank) in reversed(list(pairwise(steps))):
            after_s = cost.action_s(consumer, next_rank) + tails[consumer]
            tails[producer] = hops_s.get((producer, consumer), 0.0) + after_s
            if producer.op is Op.I:
                half = Action(producer.stage, Op.W, producer.microbatch)
                tails[producer] = max(tails[producer], cost.action_s(half, rank))
    return tails
