"""Sparse experts from torch's own products: each expert's rows laid together, one product per layer.

Rows lie in one of two ways. As *places*, one after the other, each expert's product by itself. Or in *slots*, as many
for every expert as the busiest needs: then all experts are one batched product, which two threads of a CPU share better
than many small ones, and which wants no alignment.

Shapes: `N` tokens, `D` width, `E` experts, `K` experts chosen per token, `S = N K` routed copies, `R` rows, `P` width
of the first layer (`2 H` where it is gated, else `H`), `H` hidden width, `O` output width.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import Activation, activate, activate_for_backward
from .routing import RoutingPlan
from .weights import ExpertWeights, PerInput, no_gradients

# Slots may be this many times the copies, or this many in all: what a skewed router asks for is not allocated. And
# an expert with this many rows keeps all threads busy by itself.
SLOTS_PER_COPY = 2
FEW_SLOTS = 1024
MANY_ROWS = 256


class Places:
    """Rows in the order of the plan.

    Attributes:
        copies_R: the copy that stands in each row.
        position_S: the row of each copy; copies for nobody come after the last row.
    """

    def __init__(self, plan: RoutingPlan) -> None:
        self.plan = plan
        self.copies_R = plan.order_S[: plan.num_placed]
        self.position_S = plan.position_S

    def of_copies(self, x_SD: Tensor) -> Tensor:
        """Of each row what belongs to its copy."""
        return x_SD.index_select(0, self.copies_R)

    def of_tokens(self, x_ND: Tensor) -> Tensor:
        """Of each row what belongs to its token."""
        return x_ND.index_select(0, self.copies_R // self.plan.num_selected)

    def product(self, x_RD: Tensor, w_EDP: Tensor) -> Tensor:
        """Each expert's rows times its matrix: `[R, D], [E, D, P] -> [R, P]`."""
        if _torch_takes(x_RD, w_EDP):
            return F.grouped_mm(x_RD, w_EDP, offs=self.plan.ends_E)
        out_RP = x_RD.new_empty(len(x_RD), w_EDP.shape[2])
        for w_DP, (start, end) in zip(w_EDP.unbind(), self._spans(), strict=True):
            torch.mm(x_RD[start:end], w_DP, out=out_RP[start:end])
        return out_RP

    def outer(self, a_RP: Tensor, b_RD: Tensor) -> Tensor:
        """Per expert the product of its rows, `[R, P], [R, D] -> [E, P, D]`; 0 for an expert without rows."""
        if _torch_takes(a_RP, b_RD):
            return F.grouped_mm(a_RP.t(), b_RD, offs=self.plan.ends_E)
        out_EPD = a_RP.new_empty(self.plan.num_experts, a_RP.shape[1], b_RD.shape[1])
        for out_PD, (start, end) in zip(out_EPD.unbind(), self._spans(), strict=True):
            torch.mm(a_RP[start:end].t(), b_RD[start:end], out=out_PD)
        return out_EPD

    def add(self, y_RP: Tensor, b_EP: Tensor) -> Tensor:
        return y_RP.add_(b_EP[self._experts()])

    def sums(self, rows_RP: Tensor) -> Tensor:
        """Per expert the sum of its rows: `[E, P]`."""
        return rows_RP.new_zeros(self.plan.num_experts, rows_RP.shape[1]).index_add_(0, self._experts(), rows_RP)

    def products_with(self, rows_RO: Tensor, b_EO: Tensor) -> Tensor:
        """Of each row its product with its expert's bias: `[R]`."""
        return (b_EO[self._experts()] * rows_RO).sum(-1, dtype=torch.promote_types(rows_RO.dtype, torch.float32))

    def _experts(self) -> Tensor:
        return torch.repeat_interleave(self.plan.counts_E)

    def _spans(self) -> list[tuple[int, int]]:
        return list(pairwise(self.plan.offsets.tolist()))


class Slots(Places):
    """The same number of rows for every expert; those that it does not need are zeros, and so are their weights."""

    def __init__(self, plan: RoutingPlan, slots: int) -> None:
        self.plan, self.slots = plan, slots
        starts_E1 = plan.offsets[:-1].unsqueeze(1)
        slot_C = torch.arange(slots, device=starts_E1.device)
        real_EC = slot_C < plan.counts_E.unsqueeze(1)
        self.empty_R1 = ~real_EC.view(-1, 1)
        places_EC = torch.where(real_EC, starts_E1 + slot_C, 0)
        self.copies_R = plan.order_S.index_select(0, places_EC.flatten())
        experts_S = plan.indices_NK.flatten()
        self.position_S = experts_S * slots + plan.position_S - plan.offsets.index_select(0, experts_S)

    def of_copies(self, x_SD: Tensor) -> Tensor:
        # Zeros, not any row with weight 0: what is infinite there would become NaN here.
        return super().of_copies(x_SD).masked_fill_(self.empty_R1, 0)

    def of_tokens(self, x_ND: Tensor) -> Tensor:
        return super().of_tokens(x_ND).masked_fill_(self.empty_R1, 0)

    def product(self, x_RD: Tensor, w_EDP: Tensor) -> Tensor:
        if x_RD.dtype == torch.float32 and w_EDP.stride(2) != 1 and _torch_takes(x_RD, w_EDP):
            # In single precision the batched product is slow with matrices that are turned.
            ends_E = torch.arange(1, len(w_EDP) + 1, dtype=torch.int32, device=x_RD.device) * self.slots
            return F.grouped_mm(x_RD, w_EDP, offs=ends_E)
        return torch.bmm(self._by_expert(x_RD), w_EDP).flatten(0, 1)

    def outer(self, a_RP: Tensor, b_RD: Tensor) -> Tensor:
        return torch.bmm(self._by_expert(a_RP).transpose(1, 2), self._by_expert(b_RD))

    def add(self, y_RP: Tensor, b_EP: Tensor) -> Tensor:
        self._by_expert(y_RP).add_(b_EP.unsqueeze(1))
        return y_RP

    def sums(self, rows_RP: Tensor) -> Tensor:
        return self._by_expert(rows_RP).sum(1)

    def products_with(self, rows_RO: Tensor, b_EO: Tensor) -> Tensor:
        wide = torch.promote_types(rows_RO.dtype, torch.float32)
        return (self._by_expert(rows_RO) * b_EO.unsqueeze(1)).sum(-1, dtype=wide).flatten()

    def _by_expert(self, rows_RP: Tensor) -> Tensor:
        return rows_RP.view(self.plan.num_experts, self.slots, rows_RP.shape[1])


def lay_out(plan: RoutingPlan, in_graph: bool = False) -> Places:
    """Slots where they are not many more than the copies; never in a graph, which must know the number of rows."""
    if in_graph or not plan.num_placed:
        return Places(plan)
    slots = int(plan.counts_E.max())
    most = max(SLOTS_PER_COPY * plan.num_placed, FEW_SLOTS)
    return Slots(plan, slots) if slots * plan.num_experts <= most and slots < MANY_ROWS else Places(plan)


def forward(
    x_ND: Tensor,
    weights_NK: Tensor,
    w: ExpertWeights,
    plan: RoutingPlan,
    activation: str | Activation,
    keep: bool,
    in_graph: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`[N, O]`, and what enters the activation where `keep`: `[R, P]`, in a graph `[S, P]`."""
    rows = lay_out(plan, in_graph)
    pre_RP = _first_layer(rows.of_tokens(x_ND), w, rows)
    y_RO = _linear(activate(activation, pre_RP), w.down_EOH, w.b_down_EO, rows)
    # A graph is told of S dense rows; torch's grouped product may leave gaps between them.
    kept_RP = _with_nobodys(pre_RP, plan).contiguous() if in_graph else pre_RP
    return combine(y_RO, rows, weights_NK), kept_RP if keep else None


def backward(
    grad_NO: Tensor,
    x_ND: Tensor,
    pre_RP: Tensor | None,
    weights_NK: Tensor,
    w: ExpertWeights,
    plan: RoutingPlan,
    activation: str | Activation,
    needs: PerInput[bool],
    in_graph: bool = False,
) -> PerInput[Tensor | None]:
    """Gradients of what `needs` asks for; `pre_RP` is computed again where it was not kept."""
    rows = lay_out(plan, in_graph)
    x_RD, grad_RO = rows.of_tokens(x_ND), rows.of_tokens(grad_NO)
    weights_R1 = rows.of_copies(weights_NK.reshape(-1, 1))
    pre_RP = _first_layer(x_RD, w, rows) if pre_RP is None else pre_RP[: len(x_RD)]
    h_RH, to_pre = activate_for_backward(activation, pre_RP)
    dh_RH = rows.product(grad_RO, w.down_EOH)  # before the weight
    found = no_gradients()
    if needs.weights:
        # Where the hidden units are at hand the second layer's outputs need not be kept ("SonicMoE", 2025):
        # d weight_s = h_s . (W_down^T g_s) + b_down . g_s
        dweights_R = (h_RH * dh_RH).sum(-1, dtype=torch.promote_types(dh_RH.dtype, torch.float32))
        if w.b_down_EO is not None:
            dweights_R += rows.products_with(grad_RO, w.b_down_EO)
        found.weights = at_copies(dweights_R.unsqueeze(1), rows).view_as(weights_NK).to(weights_NK.dtype)
    if needs.down:
        found.down = rows.outer(grad_RO, (h_RH * weights_R1).to(grad_RO.dtype))
    if needs.b_down:
        found.b_down = rows.sums((grad_RO * weights_R1).to(grad_RO.dtype))
    del grad_RO, h_RH  # what follows is the peak of memory
    if not (needs.x or needs.gate or needs.up or needs.b_gate or needs.b_up):
        return found
    dpre_RP = to_pre(dh_RH.mul_(weights_R1))
    if w.gate_EHD is None:
        if needs.up:
            found.up = rows.outer(dpre_RP, x_RD)
        if needs.b_up:
            found.b_up = rows.sums(dpre_RP)
        dx_RD = rows.product(dpre_RP, w.up_EPD) if needs.x else None
    else:
        dgate_RH, dup_RH = (half.contiguous() for half in dpre_RP.chunk(2, dim=1))
        found.gate = rows.outer(dgate_RH, x_RD) if needs.gate else None
        found.up = rows.outer(dup_RH, x_RD) if needs.up else None
        found.b_gate = rows.sums(dgate_RH) if needs.b_gate else None
        found.b_up = rows.sums(dup_RH) if needs.b_up else None
        dx_RD = rows.product(dgate_RH, w.gate_EHD).add_(rows.product(dup_RH, w.up_EPD)) if needs.x else None
    if dx_RD is not None:
        found.x = combine(dx_RD, rows)
    return found


def linear_forward(x: Tensor, w_EPD: Tensor, plan: RoutingPlan, by_token: bool) -> Tensor:
    """`[S, P]` at copies, from the row of each copy or of its token; 0 for nobody."""
    rows = lay_out(plan)
    x_RD = rows.of_tokens(x) if by_token else rows.of_copies(x)
    return at_copies(rows.product(x_RD, w_EPD.transpose(1, 2)), rows)


def linear_backward(
    grad_SP: Tensor, x: Tensor, w_EPD: Tensor, plan: RoutingPlan, by_token: bool, needs_x: bool, needs_w: bool
) -> tuple[Tensor | None, Tensor | None]:
    rows = lay_out(plan)
    grad_RP = rows.of_copies(grad_SP)
    dx = dw_EPD = None
    if needs_x:
        dx_RD = rows.product(grad_RP, w_EPD)
        dx = combine(dx_RD, rows) if by_token else at_copies(dx_RD, rows)
    if needs_w:
        dw_EPD = rows.outer(grad_RP, rows.of_tokens(x) if by_token else rows.of_copies(x))
    return dx, dw_EPD


def at_copies(y_RO: Tensor, rows: Places) -> Tensor:
    """From rows back to copies; 0 for copies that nobody here computed."""
    return _with_nobodys(y_RO, rows.plan).index_select(0, rows.position_S)


def combine(y_RO: Tensor, rows: Places, weights_NK: Tensor | None = None) -> Tensor:
    """`[N, O]`: the (weighted) sum over a token's copies. In float32 at least.

    Choice by choice, each gathered, weighted and added in one go: all copies are never laid out side by side.
    """
    y_RO = _with_nobodys(y_RO, rows.plan)
    wide = torch.promote_types(y_RO.dtype, torch.float32)
    out_NO = None
    for k, position_N in enumerate(rows.position_S.view(-1, rows.plan.num_selected).unbind(1)):
        y_NO = y_RO.index_select(0, position_N).to(wide)
        weight_N1 = None if weights_NK is None else weights_NK[:, k : k + 1].to(wide)
        if out_NO is None:
            out_NO = y_NO if weight_N1 is None else y_NO.mul_(weight_N1)
        else:
            out_NO = out_NO.add_(y_NO) if weight_N1 is None else out_NO.addcmul_(y_NO, weight_N1)
    assert out_NO is not None  # a plan has one choice at least
    return out_NO.to(y_RO.dtype)


def _with_nobodys(rows_RO: Tensor, plan: RoutingPlan) -> Tensor:
    """With rows of zeros for the copies that nobody here computes."""
    missing = len(plan.order_S) - plan.num_placed
    return torch.cat([rows_RO, rows_RO.new_zeros(missing, rows_RO.shape[1])]) if missing else rows_RO


def _first_layer(x_RD: Tensor, w: ExpertWeights, rows: Places) -> Tensor:
    if w.gate_EHD is None:
        return _linear(x_RD, w.up_EPD, w.b_up_EP, rows)
    gate_RH = _linear(x_RD, w.gate_EHD, w.b_gate_EH, rows)
    return torch.cat([gate_RH, _linear(x_RD, w.up_EPD, w.b_up_EP, rows)], dim=1)


def _linear(x_RD: Tensor, w_EPD: Tensor, b_EP: Tensor | None, rows: Places) -> Tensor:
    y_RP = rows.product(x_RD, w_EPD.transpose(1, 2))
    return y_RP if b_EP is None else rows.add(y_RP, b_EP)


def _torch_takes(*operands: Tensor) -> bool:
    """Whether torch's grouped product takes them: not float64, dense one way, a multiple of 16 bytes the other."""
    for t in operands:
        strides = list(t.stride())
        if t.dtype == torch.float64 or t.data_ptr() % 16 or 1 not in strides[-2:]:
            return False
        strides.remove(1)
        if any(stride * t.itemsize % 16 for stride in strides):
            return False
    return True
