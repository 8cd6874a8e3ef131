"""A sparse mixture of two-layer experts: each token through the experts chosen for it, and their weighted sum.

    y_n = sum_k weight_nk (W_down[e] act(W_up[e] x_n + b_up[e]) + b_down[e]),   e = index_nk

Dropless: every chosen expert computes, none is padded, none has a capacity. One function, one result, three ways to get
it: `torch` is the equation as written, a loop over experts; `grouped` sorts the copies by expert and gives each layer
to one product of torch; `triton` does that in kernels which gather, activate and combine as they go.

Shapes: `N` tokens, `D` width, `E` experts, `K` experts chosen per token, `S = N K` routed copies, `P` rows of the
first layer (`2 H` where gate and up lie in one tensor, else `H`), `H` hidden width, `O` output width.
"""

import importlib.util
import math
from types import ModuleType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from . import grouped
from .activations import ACTIVATIONS, GATED, Activation, activate
from .routing import Backend, RoutingPlan, make_plan
from .weights import ExpertWeights, PerInput

# Asked once: to look for a package that is not there takes longer than a small product.
HAS_TRITON = importlib.util.find_spec("triton") is not None


def expert_mlp(
    x_ND: Tensor,
    w_up_EPD: Tensor,
    w_down_EOH: Tensor,
    indices_NK: Tensor,
    weights_NK: Tensor,
    *,
    activation: str | Activation = "swiglu",
    w_gate_EHD: Tensor | None = None,
    b_up_EP: Tensor | None = None,
    b_down_EO: Tensor | None = None,
    b_gate_EH: Tensor | None = None,
    recompute: bool = False,
    backend: Backend | None = None,
    fallback: bool = False,
) -> Tensor:
    """Applies to each token the experts chosen for it.

    Under autocast the floating-point arguments but the weights of the mixture are cast to its dtype.

    Args:
        x_ND: tokens.
        w_up_EPD: first layers, `[E, P, D]`; any strides, so that transposed weights need no copy. A gated activation
            finds the gate's rows before the others, unless `w_gate_EHD` holds them.
        w_down_EOH: second layers, `[E, O, H]`; any strides.
        indices_NK: int64, each in `[0, E]`; `E` is nobody here, and adds nothing.
        weights_NK: float weights of the chosen experts; differentiable.
        activation: a name of `ACTIVATIONS`, or a function `[S, P] -> [S, H]` that treats each row by itself and has no
            parameters of its own. Only names are fused into the kernels.
        w_gate_EHD: the gate's first layers where they are a tensor of their own, of the strides of `w_up_EPD`.
        b_up_EP, b_down_EO, b_gate_EH: biases.
        recompute: keep nothing of width `P` for the backward; it computes the first layer once more.
        backend: `torch`, `grouped` or `triton`; by default `triton` for CUDA tensors where it is installed, else
            `grouped`.
        fallback: where `triton` cannot work (see the error it raises), take `grouped`.

    Returns:
        `[N, O]`, in the dtype of `x_ND`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; raised before anything is computed.
        NotImplementedError: backend `triton` cannot compute this; says why.
    """
    if isinstance(activation, str) and activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)} or a function, found {activation!r}")
    if isinstance(activation, nn.Module) and any(p.requires_grad for p in activation.parameters()):
        raise ValueError("activation: expected one without parameters to train, they would get no gradient")
    w = ExpertWeights(w_up_EPD, w_down_EOH, w_gate_EHD, b_up_EP, b_down_EO, b_gate_EH)
    x_ND, *tensors = under_autocast(x_ND, *_tensors(w))
    w = ExpertWeights(*tensors)
    _check(x_ND, w, indices_NK, weights_NK, activation)
    backend = choose_backend(backend, fallback, x_ND)
    if backend == "torch":
        return _loop(x_ND, w, indices_NK, weights_NK, activation)
    keep = torch.is_grad_enabled() and not recompute
    keep = keep and any(t is not None and t.requires_grad for t in (x_ND, weights_NK, *_tensors(w)))
    if not torch.compiler.is_compiling() and not x_ND.is_meta:
        plan = make_plan(indices_NK, len(w_up_EPD), backend)
        return _ExpertMLP.apply(x_ND, weights_NK, *_tensors(w), plan, activation, backend, keep)
    if not isinstance(activation, str):
        from .linear import composed

        return composed(x_ND, w, make_plan(indices_NK, len(w_up_EPD)), weights_NK, activation, backend)
    inputs = (x_ND, weights_NK, *_tensors(w), indices_NK.contiguous())
    return _expert_mlp(*inputs, activation, backend, keep)[0]


def default_backend(device: torch.device) -> Backend:
    """What `expert_mlp` takes for tensors there."""
    return "triton" if device.type == "cuda" and HAS_TRITON else "grouped"


def engine(backend: str) -> ModuleType:
    """The module with the two passes."""
    if backend == "grouped":
        return grouped
    from . import triton_experts

    return triton_experts


def choose_backend(backend: Backend | None, fallback: bool, x_ND: Tensor) -> Backend:
    """The backend for these tensors, where None was said or a fallback was asked for."""
    if backend is None:
        backend, fallback = default_backend(x_ND.device), True
    if backend not in ("torch", "grouped", "triton"):
        raise ValueError(f"backend: expected torch, grouped or triton, found {backend!r}")
    if x_ND.is_meta:  # where no choice can be read, but an operator can say what shape it returns
        return "grouped"
    if backend != "triton":
        return backend
    reason = why_not_triton(x_ND)
    if reason is None:
        return backend
    if not fallback:
        raise NotImplementedError(
            f"backend triton: {reason}; backend='grouped' computes the same, and fallback=True takes it"
        )
    return "grouped"


def why_not_triton(x: Tensor) -> str | None:
    """What keeps the kernels from working on `x`, if anything does."""
    if not HAS_TRITON:
        return "Triton is not installed; it comes with the extra moe_mtl[triton]"
    from .triton_launch import why_not

    return why_not(x)


def under_autocast(x: Tensor, *others: Any) -> tuple[Any, ...]:
    """What autocast makes of the arguments of a product; None stays None."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return x, *others
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(None if t is None else t.to(dtype) for t in (x, *others))


def _tensors(w: ExpertWeights) -> tuple[Tensor | None, ...]:
    return tuple(w.named().values())


def _check(
    x_ND: Tensor, w: ExpertWeights, indices_NK: Tensor, weights_NK: Tensor, activation: str | Activation
) -> None:
    if x_ND.dim() != 2 or w.up_EPD.dim() != 3 or w.down_EOH.dim() != 3:
        shapes = [list(t.shape) for t in (x_ND, w.up_EPD, w.down_EOH)]
        raise ValueError(f"expected x [N, D], w_up [E, P, D] and w_down [E, O, H], found {shapes}")
    rows, width = x_ND.shape
    experts, wide, of = w.up_EPD.shape
    out, hidden = w.down_EOH.shape[1:]
    if of != width or len(w.down_EOH) != experts:
        raise ValueError(
            f"expected w_up [E, P, {width}] and w_down [E, O, H] of as many experts, "
            f"found {list(w.up_EPD.shape)} and {list(w.down_EOH.shape)}"
        )
    if w.gate_EHD is not None:
        if activation not in GATED:
            raise ValueError(f"w_gate: expected an activation of {', '.join(GATED)} beside it, found {activation!r}")
        if w.gate_EHD.shape != w.up_EPD.shape or w.gate_EHD.stride() != w.up_EPD.stride():
            raise ValueError(
                f"w_gate: expected the shape and strides of w_up, {list(w.up_EPD.shape)} and {w.up_EPD.stride()}, "
                f"found {list(w.gate_EHD.shape)} and {w.gate_EHD.stride()}"
            )
        if (w.b_gate_EH is None) != (w.b_up_EP is None):
            raise ValueError("b_gate: expected together with b_up, or neither")
    elif w.b_gate_EH is not None:
        raise ValueError("b_gate: expected only beside w_gate; else b_up holds it")
    if isinstance(activation, str):  # what a function makes of a row only running it would tell
        halved = activation in GATED and w.gate_EHD is None
        made = wide // 2 if halved else wide
        if made != hidden or (halved and wide % 2):
            raise ValueError(f"w_down: expected [E, O, {made}], as {activation} makes {made} of {wide}")
    if weights_NK.shape != indices_NK.shape or indices_NK.dim() != 2 or indices_NK.shape[0] != rows:
        raise ValueError(
            f"expected indices and weights of shape [{rows}, K], "
            f"found {list(indices_NK.shape)} and {list(weights_NK.shape)}"
        )
    if not indices_NK.shape[1]:
        raise ValueError("indices: expected at least one expert per token, found none")
    if not weights_NK.is_floating_point():
        raise ValueError(f"weights: expected floats, found {weights_NK.dtype}")
    biases = (("b_up", w.b_up_EP, wide), ("b_gate", w.b_gate_EH, wide), ("b_down", w.b_down_EO, out))
    for name, bias, size in biases:
        if bias is not None and bias.shape != (experts, size):
            raise ValueError(f"{name}: expected shape {[experts, size]}, found {list(bias.shape)}")
    for name, tensor in w.named().items():
        if tensor is not None and (tensor.dtype != x_ND.dtype or tensor.device != x_ND.device):
            raise ValueError(f"{name}: expected {x_ND.dtype} on {x_ND.device}, found {tensor.dtype} on {tensor.device}")
    for name, tensor in (("indices", indices_NK), ("weights", weights_NK)):
        if tensor.device != x_ND.device:
            raise ValueError(f"{name}: expected a tensor on {x_ND.device}, found one on {tensor.device}")


def _loop(
    x_ND: Tensor, w: ExpertWeights, indices_NK: Tensor, weights_NK: Tensor, activation: str | Activation
) -> Tensor:
    """The equation as written. `unbind` once: a `w[e]` per expert would cost the backward a full-size zero for each."""
    experts = len(w.up_EPD)
    up_EPD, b_up_EP = w.up_EPD, w.b_up_EP
    if w.gate_EHD is not None:
        up_EPD = torch.cat([w.gate_EHD, up_EPD], dim=1)
        b_up_EP = None if b_up_EP is None else torch.cat([cast(Tensor, w.b_gate_EH), b_up_EP], dim=1)
    b_up = [None] * experts if b_up_EP is None else b_up_EP.unbind()
    b_down = [None] * experts if w.b_down_EO is None else w.b_down_EO.unbind()
    out_NO = x_ND.new_zeros(len(x_ND), w.down_EOH.shape[1])
    for e, (w_up_PD, w_down_OH) in enumerate(zip(up_EPD.unbind(), w.down_EOH.unbind(), strict=True)):
        tokens, k = (indices_NK == e).nonzero(as_tuple=True)
        hidden = activate(activation, F.linear(x_ND[tokens], w_up_PD, b_up[e]))
        y = F.linear(hidden, w_down_OH, b_down[e])
        out_NO = out_NO.index_add(0, tokens, (y * weights_NK[tokens, k].unsqueeze(-1)).to(out_NO.dtype))
    return out_NO


# --- in graphs: operators, so that torch.compile and torch.export keep them whole ---


@torch.library.custom_op("moe_mtl::expert_mlp", mutates_args=())
def _expert_mlp(
    x_ND: Tensor,
    weights_NK: Tensor,
    w_up_EPD: Tensor,
    w_down_EOH: Tensor,
    w_gate_EHD: Tensor | None,
    b_up_EP: Tensor | None,
    b_down_EO: Tensor | None,
    b_gate_EH: Tensor | None,
    indices_NK: Tensor,
    activation: str,
    backend: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The output, what enters the activation (empty unless `keep`), and the plan's three tensors."""
    w = ExpertWeights(w_up_EPD, w_down_EOH, w_gate_EHD, b_up_EP, b_down_EO, b_gate_EH)
    plan = make_plan(indices_NK, len(w_up_EPD), cast(Backend, backend))
    out_NO, kept = engine(backend).forward(x_ND, weights_NK, w, plan, activation, keep, in_graph=True)
    return out_NO, kept[0] if kept else x_ND.new_empty(0), plan.order_S, plan.position_S, plan.offsets


@_expert_mlp.register_fake
def _(x_ND, weights_NK, w_up_EPD, w_down_EOH, w_gate_EHD, *rest):  # type: ignore[no-untyped-def]
    _, _, _, indices_NK, _, _, keep = rest
    copies = indices_NK.shape[0] * indices_NK.shape[1]
    wide = w_up_EPD.shape[1] * (1 if w_gate_EHD is None else 2)
    order_S = indices_NK.new_empty(copies, dtype=torch.int64)
    return (
        x_ND.new_empty(x_ND.shape[0], w_down_EOH.shape[1]),
        x_ND.new_empty(copies, wide) if keep else x_ND.new_empty(0),
        order_S,
        torch.empty_like(order_S),
        order_S.new_empty(w_up_EPD.shape[0] + 1),
    )


@register_flop_formula(torch.ops.moe_mtl.expert_mlp)
def _operations(x_ND, weights_NK, w_up_EPD, w_down_EOH, w_gate_EHD, *_, **__):  # type: ignore[no-untyped-def]
    """Two to a multiply-add, from shapes: every copy through its expert's matrices. Torch's counters ask for it."""
    each = sum(math.prod(shape[1:]) for shape in (w_up_EPD, w_down_EOH, w_gate_EHD) if shape is not None)
    return 2 * math.prod(weights_NK) * each


@torch.library.custom_op("moe_mtl::expert_mlp_backward", mutates_args=())
def _expert_mlp_backward(
    grad_NO: Tensor,
    x_ND: Tensor,
    pre_SP: Tensor | None,
    weights_NK: Tensor,
    w_up_EPD: Tensor,
    w_down_EOH: Tensor,
    w_gate_EHD: Tensor | None,
    b_up_EP: Tensor | None,
    b_down_EO: Tensor | None,
    b_gate_EH: Tensor | None,
    indices_NK: Tensor,
    order_S: Tensor,
    position_S: Tensor,
    offsets: Tensor,
    activation: str,
    backend: str,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients in the order of `PerInput`, empty where not needed."""
    w = ExpertWeights(w_up_EPD, w_down_EOH, w_gate_EHD, b_up_EP, b_down_EO, b_gate_EH)
    plan = RoutingPlan(indices_NK, order_S, position_S, offsets)
    kept = [] if pre_SP is None else [pre_SP]
    given = (grad_NO, x_ND, kept, weights_NK, w, plan, activation, PerInput(*needs))
    found = engine(backend).backward(*given, in_graph=True)
    return [x_ND.new_empty(0) if t is None else t.contiguous() for t in found.values()]


@_expert_mlp_backward.register_fake
def _(grad_NO, x_ND, pre_SP, *rest):  # type: ignore[no-untyped-def]
    inputs, needs = (x_ND, *rest[:7]), rest[-1]
    return [
        t.new_empty(t.shape) if t is not None and needed else x_ND.new_empty(0)
        for t, needed in zip(inputs, needs, strict=True)
    ]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, activation, backend, keep = inputs
    _, pre_SP, *plan = output
    ctx.save_for_backward(*tensors, pre_SP if keep else None, *plan)
    ctx.activation, ctx.backend = activation, backend
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_NO: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:8])
    if grad_NO is None:
        return (None,) * 12
    x_ND, weights_NK, *w, indices_NK, pre_SP, order_S, position_S, offsets = ctx.saved_tensors
    found = _expert_mlp_backward(
        *(grad_NO, x_ND, pre_SP, weights_NK, *w, indices_NK, order_S, position_S, offsets),
        *(ctx.activation, ctx.backend, needs),
    )
    return *(t if needed else None for t, needed in zip(found, needs, strict=True)), None, None, None, None


_expert_mlp.register_autograd(_backward, setup_context=_setup)


# --- without a graph to trace, where operators would take longer than small products ---


class _ExpertMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weights_NK: Tensor,
        w_up_EPD: Tensor,
        w_down_EOH: Tensor,
        w_gate_EHD: Tensor | None,
        b_up_EP: Tensor | None,
        b_down_EO: Tensor | None,
        b_gate_EH: Tensor | None,
        plan: RoutingPlan,
        activation: str | Activation,
        backend: str,
        keep: bool,
    ) -> Tensor:
        tensors = (w_up_EPD, w_down_EOH, w_gate_EHD, b_up_EP, b_down_EO, b_gate_EH)
        out_NO, kept = engine(backend).forward(x_ND, weights_NK, ExpertWeights(*tensors), plan, activation, keep)
        ctx.save_for_backward(x_ND, weights_NK, *tensors, *kept)
        ctx.plan, ctx.activation, ctx.backend = plan, activation, backend
        return out_NO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weights_NK, *rest = ctx.saved_tensors
        w, kept = ExpertWeights(*rest[:6]), rest[6:]
        del rest
        ctx.maybe_clear_saved_tensors()  # unless the graph is to be kept; so `kept` is the last to hold what it holds
        found = engine(ctx.backend).backward(
            *(grads[0], x_ND, kept, weights_NK, w, ctx.plan, ctx.activation),
            PerInput(*ctx.needs_input_grad[:8]),
        )
        return *found.values(), None, None, None, None
