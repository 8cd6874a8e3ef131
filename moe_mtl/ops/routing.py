"""Which expert computes which token: top-k routing, and the plan that lays the copies of tokens out by expert.

Shapes: `N` tokens, `E` experts, `K` experts chosen per token, `S = N K` routed copies; copy `s = n K + k`.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

Scores = Literal["softmax", "softmax_selected", "sigmoid"]
Backend = Literal["torch", "grouped", "triton"]


def route(
    logits_NE: Tensor,
    num_selected: int,
    *,
    scores: Scores = "softmax",
    bias_E: Tensor | None = None,
    renormalise: bool = False,
) -> tuple[Tensor, Tensor]:
    """Chooses `K` experts per token.

    Args:
        logits_NE: of the router, any float dtype; scores are taken in float32 at least.
        num_selected: `K`, from 1 to `E`.
        scores: `softmax` over all experts, of which the chosen keep theirs (Fedus et al., JMLR 2022, for K = 1);
            `softmax_selected`, over the chosen logits alone (Shazeer et al., ICLR 2017, equations 3 to 5, without
            noise); `sigmoid` of each (DeepSeek-V3, 2024, equations 13 to 16).
        bias_E: added to the scores for the choice alone, never to the weights (DeepSeek-V3, equation 16).
        renormalise: divide a token's weights by their sum.

    Returns:
        indices `[N, K]` int64, in descending order of the score, the lower number first among equals; and weights
        `[N, K]`, differentiable.

    Raises:
        ValueError: arguments that do not fit; raised before anything is computed.
    """
    if logits_NE.dim() != 2 or not logits_NE.is_floating_point():
        raise ValueError(
            f"logits: expected floats of shape [N, E], found {logits_NE.dtype} of shape {list(logits_NE.shape)}"
        )
    num_experts = logits_NE.shape[1]
    if not 1 <= num_selected <= num_experts:
        raise ValueError(f"num_selected: expected 1 to {num_experts}, found {num_selected}")
    if bias_E is not None and bias_E.shape != (num_experts,):
        raise ValueError(f"bias: expected shape [{num_experts}], found {list(bias_E.shape)}")
    if logits_NE.dtype in (torch.float16, torch.bfloat16):
        logits_NE = logits_NE.float()
    if scores == "softmax":
        scores_NE = logits_NE.softmax(-1)
    elif scores == "sigmoid":
        scores_NE = logits_NE.sigmoid()
    elif scores == "softmax_selected":
        scores_NE = logits_NE
    else:
        raise ValueError(f"scores: expected softmax, softmax_selected or sigmoid, found {scores!r}")
    choice_NE = scores_NE.detach() if bias_E is None else scores_NE.detach() + bias_E
    # A stable sort, not topk: which of equal scores topk takes depends on the device.
    indices_NK = choice_NE.sort(dim=-1, descending=True, stable=True).indices[:, :num_selected]
    weights_NK = scores_NE.gather(1, indices_NK)
    if scores == "softmax_selected":
        weights_NK = weights_NK.softmax(-1)
    elif renormalise:
        weights_NK = weights_NK / weights_NK.sum(-1, keepdim=True)
    return indices_NK, weights_NK


@dataclass(frozen=True)
class RoutingPlan:
    """The routed copies laid out by expert. Made without a look at the data from the host, so that a graph can hold it.

    Attributes:
        indices_NK: the chosen experts, contiguous. `E`, "nobody here", marks a copy that no expert here computes.
        order_S: copies in the order of their experts, and of their tokens within an expert: int64.
        position_S: of each copy its place in that order: int64.
        offsets: expert `e` has the places from `offsets[e]` to `offsets[e + 1]`: int64 `[E + 1]`. Copies for nobody
            stand behind the last.
    """

    indices_NK: Tensor
    order_S: Tensor
    position_S: Tensor
    offsets: Tensor
    # How its rows are laid out for products on a CPU, by `layout`: found in the forward, asked for in the backward.
    layouts: dict[tuple[int, bool, bool], Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def num_experts(self) -> int:
        return self.offsets.shape[0] - 1

    @property
    def num_selected(self) -> int:
        return self.indices_NK.shape[1]

    @cached_property
    def tokens_S(self) -> Tensor:
        """Of each place the token that stands there."""
        return self.order_S // self.num_selected

    @cached_property
    def ends_E(self) -> Tensor:
        """Where each expert's copies end, as torch's grouped products want it: int32."""
        return self.offsets[1:].to(torch.int32)

    @cached_property
    def num_placed(self) -> int:
        """Copies that an expert here computes. The host waits for the device to know it."""
        return int(self.offsets[-1])

    @cached_property
    def counts_E(self) -> Tensor:
        """Copies of each expert: int64."""
        return self.offsets.diff()

    def tiles(self, rows: int, backend: Backend = "torch") -> tuple[Tensor, Tensor]:
        """Cuts each expert's places into tiles of up to `rows`, none of which crosses two experts.

        Returns:
            of each tile its expert (int32) and its first place (int64). How many tiles there are the host does not
            know, but how many there can be: `S // rows + min(E, S)`. The expert of those too many is `E`.
        """
        if backend == "triton":
            from . import triton_routing

            return triton_routing.tiles(self.offsets, len(self.order_S), rows)
        copies, experts = self.order_S.shape[0], self.num_experts
        tiles_E = (self.counts_E + rows - 1) // rows
        ends_E = tiles_E.cumsum(0)
        tile_T = torch.arange(copies // rows + min(experts, copies), device=self.offsets.device)
        expert_T = torch.searchsorted(ends_E, tile_T, right=True)
        known_T = expert_T.clamp_max(experts - 1)
        start_T = self.offsets[known_T] + (tile_T - (ends_E - tiles_E)[known_T]) * rows
        return expert_T.to(torch.int32), torch.where(expert_T < experts, start_T, 0)


def make_plan(indices_NK: Tensor, num_experts: int, backend: Backend = "torch") -> RoutingPlan:
    """Sorts the copies by expert.

    Args:
        indices_NK: int32 or int64, each in `[0, E]`; `E` marks a copy that no expert here computes, as transformers'
            expert parallelism does. The range is checked on a CPU only: elsewhere that would wait for the device, and
            what is out of range is nobody's.
        num_experts: `E`.
        backend: `triton` counts, scans and scatters; the others sort. The same plan.

    Raises:
        ValueError: indices of another shape or dtype, or out of range.
    """
    if indices_NK.dim() != 2 or indices_NK.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"indices: expected int64 of shape [N, K], found {indices_NK.dtype} of shape {list(indices_NK.shape)}"
        )
    indices_NK = indices_NK.contiguous()
    flat_S = indices_NK.flatten()
    if flat_S.device.type == "cpu":
        if not torch.compiler.is_compiling() and flat_S.numel():
            low, high = (int(bound) for bound in flat_S.aminmax())
            if low < 0 or high > num_experts:
                raise ValueError(f"indices: expected numbers in [0, {num_experts}], found {low} to {high}")
    else:
        indices_NK = torch.where((indices_NK < 0) | (indices_NK > num_experts), num_experts, indices_NK)
        flat_S = indices_NK.flatten()
    if backend == "triton":
        from . import triton_routing

        return RoutingPlan(indices_NK, *triton_routing.plan(flat_S, num_experts))
    sorted_S, order_S = flat_S.sort(stable=True)
    place_S = torch.arange(order_S.shape[0], device=order_S.device)
    position_S = torch.empty_like(order_S).scatter_(0, order_S, place_S)
    bounds = torch.arange(num_experts + 1, device=flat_S.device, dtype=flat_S.dtype)
    return RoutingPlan(indices_NK, order_S, position_S, torch.searchsorted(sorted_S, bounds))
