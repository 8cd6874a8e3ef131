"""Mixtures of low-rank convolutions, chosen by image and task: MLoRE's decoder.

Shapes: `T` tasks (1 while the maps are the same for all), `B` images, `S = T B` maps, `L` tokens of an image, `D` width
of the backbone, `C` channels of the decoder, `E` experts, `K` experts chosen per image, `R` rank, `H`, `W` rows and
columns of patches.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from ..outputs import Routing
from .heads import map_tokens, patch_map
from .moe import Choice, TaskRouter
from .vit import Computed


class LowRankConv(nn.Module):
    """A 3 x 3 convolution of rank `R` without bias: to `R` channels by 3 x 3, from there by 1 x 1. Linear.

    Args:
        dim: `C`.
        rank: `R`.
    """

    def __init__(self, dim: int, rank: int):
        super().__init__()
        self.down = nn.Conv2d(dim, rank, 3, padding=1, bias=False)
        self.up = nn.Conv2d(rank, dim, 1, bias=False)

    def forward(self, x_SCHW: Tensor) -> Tensor:
        """`[S, C, H, W]` -> the same shape."""
        return self.up(self.down(x_SCHW))


def kernel_of(convs: Sequence[LowRankConv], weights_K: Tensor) -> Tensor:
    """The kernel `[C, C, 3, 3]` of `sum_k w_k conv_k`: one product, as wide as the ranks together."""
    up_CR = torch.cat([conv.up.weight.flatten(1) * w for conv, w in zip(convs, weights_K, strict=True)], dim=1)
    down_RCKK = torch.cat([conv.down.weight for conv in convs])
    return (up_CR @ down_RCKK.flatten(1)).unflatten(1, down_RCKK.shape[1:])


class LowRankMixture(nn.Module):
    """`y_t = gelu(BN_t(W x_t + B_t A_t x_t + sum_k g_tk B_e A_e x_t))`: a convolution for all tasks, one of low rank
    for each, and the `K` experts that the task's gate chose for the image, `g = softmax(W_t mean(x_t))` over all.

    Every path is linear. `fold` merges what no image changes, `W + B_t A_t` and the batch norm, into one convolution
    per task; the experts' sum then joins that kernel image by image.

    Args:
        layer: its name in records.
        dim: `C`.
        ranks: of each expert, `E` of them.
        num_selected: `K`.
        task_rank: of a task's own path.
        tasks: names.
        balance_weight: of the balance loss.
        latency_aware: whether the balance makes even what experts cost, which is as their ranks, not their images.
        folded: whether this is already merged.

    Differs from the official code in: experts that no image chose are not computed; the code computes all and masks.
    """

    def __init__(
        self,
        layer: str,
        dim: int,
        ranks: Sequence[int],
        num_selected: int,
        task_rank: int,
        tasks: Sequence[str],
        balance_weight: float = 0.0,
        latency_aware: bool = False,
        folded: bool = False,
    ):
        super().__init__()
        self.layer, self.folded, self.tasks = layer, folded, list(tasks)
        costs = ranks if latency_aware else None
        self.router = TaskRouter(dim, len(ranks), num_selected, tasks, balance_weight=balance_weight, costs=costs)
        self.experts = nn.ModuleList(LowRankConv(dim, rank) for rank in ranks)
        if folded:
            self.merged = nn.ModuleDict({task: nn.Conv2d(dim, dim, 3, padding=1) for task in tasks})
            self.scales = nn.ParameterDict({task: torch.empty(dim) for task in tasks})
        else:
            self.shared = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
            self.own = nn.ModuleDict({task: LowRankConv(dim, task_rank) for task in tasks})
            self.norms = nn.ModuleDict({task: nn.BatchNorm2d(dim) for task in tasks})

    def forward(self, x_TBCHW: Tensor, tasks: Sequence[str], record: bool) -> Computed:
        """`[1 or T, B, C, H, W]` -> `[T, B, C, H, W]`."""
        choice = self.router(x_TBCHW.mean((-2, -1)), tasks)
        x_of = dict(zip(tasks, x_TBCHW.expand(len(tasks), -1, -1, -1, -1), strict=True))
        _, _, channels, rows, columns = x_TBCHW.shape
        if not self.folded:
            shared = self.shared(x_TBCHW.flatten(0, 1)).unflatten(0, x_TBCHW.shape[:2])
            sums = shared + self._mixed(x_TBCHW, choice)
            y = [self.norms[task](sums[t] + self.own[task](x_of[task])) for t, task in enumerate(tasks)]
        elif 9 * channels <= 10 * rows * columns:
            # Making a kernel of rank R takes 9 C C R multiply-adds, the R channels on the map 10 C R H W.
            y = [self._by_kernel(x_of[task], choice, t, task) for t, task in enumerate(tasks)]
        else:
            mixed = self._mixed(x_TBCHW, choice)
            scales = [self.scales[task][:, None, None] for task in tasks]
            y = [self.merged[task](x_of[task]) + scales[t] * mixed[t] for t, task in enumerate(tasks)]
        routing = (self.router.routing(self.layer, choice, tasks, None),) if record else ()
        return Computed(F.gelu(torch.stack(y)), choice.auxiliary, routing)

    def _mixed(self, x_TBCHW: Tensor, choice: Choice) -> Tensor:
        """The chosen experts' weighted sum: `[T, B, C, H, W]`. On the meta device, where no choice is known, of all."""
        if x_TBCHW.is_meta:
            x_SCHW = x_TBCHW.expand(len(choice.indices_TNK), -1, -1, -1, -1).flatten(0, 1)
            maps = torch.stack([expert(x_SCHW) for expert in self.experts]).sum(0)
            return maps.unflatten(0, choice.indices_TNK.shape[:2])
        indices_SK, weights_SK = choice.indices_TNK.flatten(0, 1), choice.weights_TNK.flatten(0, 1)
        x_SCHW = x_TBCHW.flatten(0, 1)
        mixed = x_SCHW.new_zeros(len(indices_SK), *x_SCHW.shape[1:])
        for e, expert in enumerate(self.experts):
            maps, places = (indices_SK == e).nonzero(as_tuple=True)
            # In training an expert that nobody chose runs over nothing, so that its gradient is 0, not missing.
            if len(maps) or self.training:
                y = expert(x_SCHW[maps % len(x_SCHW)])
                mixed = mixed.index_add(0, maps, (y * weights_SK[maps, places, None, None, None]).to(mixed.dtype))
        return mixed.unflatten(0, choice.indices_TNK.shape[:2])

    def _by_kernel(self, x_BCHW: Tensor, choice: Choice, t: int, task: str) -> Tensor:
        """One convolution per image, whose kernel holds the experts that the task chose for it.

        Raises:
            ValueError: on the meta device, as only the choice tells which kernels are made.
        """
        if x_BCHW.is_meta:
            raise ValueError(f"{self.layer}: expected a folded model with values, found one on the meta device")
        merged: Any = self.merged[task]
        scale = self.scales[task][:, None, None, None]
        y = []
        for b, experts in enumerate(choice.indices_TNK[t].tolist()):
            kernel = kernel_of([self.experts[e] for e in experts], choice.weights_TNK[t, b])
            y.append(F.conv2d(x_BCHW[b : b + 1], merged.weight + scale * kernel, merged.bias, padding=1))
        return torch.cat(y)

    @torch.no_grad()
    def fold(self) -> None:
        """Merges the shared path, the tasks' own and the batch norms, in place; nothing is left to do for it twice."""
        if self.folded:
            return
        merged, scales = nn.ModuleDict(), nn.ParameterDict()
        for task in self.tasks:
            norm: Any = self.norms[task]
            own: Any = self.own[task]
            scale_C = norm.weight * (norm.running_var + norm.eps).rsqrt()
            one = torch.ones(1, dtype=scale_C.dtype, device=scale_C.device)
            conv = nn.Conv2d(len(scale_C), len(scale_C), 3, padding=1, device=scale_C.device, dtype=scale_C.dtype)
            conv.weight.copy_(scale_C[:, None, None, None] * (self.shared.weight + kernel_of([own], one)))
            assert conv.bias is not None
            conv.bias.copy_(norm.bias - scale_C * norm.running_mean)
            merged[task], scales[task] = conv, nn.Parameter(scale_C)
        del self.shared, self.own, self.norms
        self.merged, self.scales, self.folded = merged, scales, True

    def initialise(self, std: float) -> None:
        for scale in self.scales.values() if self.folded else ():
            init.ones_(scale)


class LowRankDecoder(nn.Module):
    """Levels from first to last: each adds the projected tokens of its layer to what a task has so far, and mixes.

    Args:
        levels: after how many blocks each level reads the tokens.
        dim: `D`.
        decoder_dim: `C`.
        grid: rows and columns of patches.
        eps: of layer norms.
        mixture: further arguments of `LowRankMixture`.
    """

    def __init__(
        self, levels: Sequence[int], dim: int, decoder_dim: int, grid: tuple[int, int], eps: float, **mixture: object
    ):
        super().__init__()
        self.reads, self.grid = list(levels), grid
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps) for _ in levels)
        self.projections = nn.ModuleList(nn.Linear(dim, decoder_dim) for _ in levels)
        self.levels = nn.ModuleList(
            LowRankMixture(f"decoder.levels.{i}", decoder_dim, **mixture)  # type: ignore[arg-type]
            for i in range(len(levels))
        )

    def forward(self, hidden: Sequence[Tensor], tasks: Sequence[str], record: bool) -> Computed:
        """Tokens `[1, B, L, D]` before and after each block -> `[T, B, L, C]`."""
        auxiliary: tuple[Tensor, ...] = ()
        routing: tuple[Routing, ...] = ()
        y_TBCHW: Tensor | None = None
        for blocks, norm, projection, level in zip(self.reads, self.norms, self.projections, self.levels, strict=True):
            x_TBCHW = patch_map(projection(norm(hidden[blocks][0])), self.grid).unsqueeze(0)
            found = level(x_TBCHW if y_TBCHW is None else x_TBCHW + y_TBCHW, tasks, record)
            y_TBCHW = found.hidden
            auxiliary, routing = auxiliary + found.auxiliary, routing + found.routing
        assert y_TBCHW is not None
        return Computed(torch.stack([map_tokens(y) for y in y_TBCHW]), auxiliary, routing)
