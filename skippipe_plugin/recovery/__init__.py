"""How a lost stage is rebuilt: pure rules on state dicts. Finding, replacing and repeating is the driver's."""

from .rules import REBUILD_RULES, Neighbour, RebuildRule, rebuild_block, rebuild_stage

__all__ = ["REBUILD_RULES", "Neighbour", "RebuildRule", "rebuild_block", "rebuild_stage"]
