"""The experts function `"moe_mtl"` of transformers: any of its models with fused experts runs on `expert_mlp`.

    import moe_mtl.ops
    model.set_experts_implementation("moe_mtl")

Importing `moe_mtl.ops` registers it. Gated or not, with biases, transposed or interleaved weights, and with the ids
that expert parallelism gives to copies of other ranks.

Shapes: `N` tokens, `D` width, `K` experts chosen per token.
"""

from typing import Any

from torch import Tensor, nn
from transformers.activations import GELUActivation, GELUTanh, ReLUSquaredActivation, SiLUActivation
from transformers.integrations.moe import ExpertsInterface

from .activations import GATED, Activation
from .experts import expert_mlp

NAME = "moe_mtl"


def experts_forward(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """`[N, D]` through the experts module `experts` of a transformers model.

    Args:
        experts: holds `gate_up_proj` or `up_proj`, and `down_proj`, for all experts at once, and says how they lie.
        hidden_states: `[N, D]`.
        top_k_index: `[N, K]`; the number of experts means "not mine".
        top_k_weights: `[N, K]`.

    Raises:
        NotImplementedError: the model normalises each expert's output before the weights.
    """
    if getattr(experts, "has_post_expert_norm", False):  # not known to older releases
        raise NotImplementedError(
            f"{type(experts).__name__} normalises each expert's output, which experts_implementation {NAME!r} does "
            "not; take eager, grouped_mm or batched_mm"
        )
    kind = "gate_up_proj" if experts.has_gate else "up_proj"
    up, down = getattr(experts, kind), experts.down_proj
    return expert_mlp(
        hidden_states,
        up.mT if experts.is_transposed else up,
        down.mT if experts.is_transposed else down,
        top_k_index,
        top_k_weights,
        activation=_activation(experts),
        b_up_EP=getattr(experts, f"{kind}_bias") if experts.has_bias else None,
        b_down_EO=experts.down_proj_bias if experts.has_bias else None,
    )


def _activation(experts: Any) -> str | Activation:
    """The name of what stands between the layers, which the kernels fuse; or the model's own function.

    Only that one knows how gate and up lie in a row of its own making, and what is clamped.
    """
    name = _name(getattr(experts, "act_fn", None))
    if not experts.has_gate:
        return name or experts.act_fn
    plain = getattr(type(experts)._apply_gate, "__name__", "") == "_default_apply_gate"
    return next((gate for gate, inner in GATED.items() if plain and inner == name), None) or experts._apply_gate


def _name(function: Any) -> str | None:
    if isinstance(function, nn.GELU | GELUTanh | GELUActivation):
        tanh = isinstance(function, GELUTanh) or getattr(function, "approximate", "none") == "tanh"
        return "gelu_tanh" if tanh else "gelu"
    known = {nn.SiLU: "silu", SiLUActivation: "silu", nn.ReLU: "relu", ReLUSquaredActivation: "relu2"}
    return known.get(type(function))


ExpertsInterface.register(NAME, experts_forward)
