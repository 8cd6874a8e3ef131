"""One task's sparse path: what it costs, and what can be left out of it."""

from ._cost import Cost, PartCost, cost, part_of
from ._prune import PruneReport, prune

__all__ = ["Cost", "PartCost", "PruneReport", "cost", "part_of", "prune"]
