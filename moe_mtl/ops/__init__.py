"""The fast path of sparse experts: a routing plan, and the experts over it."""

from .experts import ACTIVATIONS, expert_mlp, gated
from .routing import RoutingPlan, make_plan, route
from .transformers import experts_forward

__all__ = ["ACTIVATIONS", "RoutingPlan", "expert_mlp", "experts_forward", "gated", "make_plan", "route"]
