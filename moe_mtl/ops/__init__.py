"""The fast path of sparse experts: a routing plan, and the experts over it; of rank experts too."""

from .activations import ACTIVATIONS, gated
from .experts import expert_mlp
from .linear import expert_combine, expert_linear
from .ranks import rank_experts
from .routing import Backend, RoutingPlan, make_plan, route
from .transformers import experts_forward

__all__ = [
    "ACTIVATIONS",
    "Backend",
    "RoutingPlan",
    "expert_combine",
    "expert_linear",
    "expert_mlp",
    "experts_forward",
    "gated",
    "make_plan",
    "rank_experts",
    "route",
]
