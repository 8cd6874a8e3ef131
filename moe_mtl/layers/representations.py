"""Representations of one image by several paths, and routers that mix them for a task: SAK's decoder.

Shapes: `T` tasks, `B` images, `L` tokens of an image, `D` width of the backbone, `C` channels of the decoder, `M`
teachers, so that there are `M + 1` representations, the stem's first.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from ..outputs import Routing
from .vit import Computed


class Adapter(nn.Module):
    """`s W2 gelu(W1 x)`: a bottleneck with a learnt scale (Houlsby et al., ICML 2019, section 2.1).

    Args:
        dim: `D`.
        bottleneck: width between.
    """

    def __init__(self, dim: int, bottleneck: int):
        super().__init__()
        self.down = nn.Linear(dim, bottleneck)
        self.up = nn.Linear(bottleneck, dim)
        self.scale = nn.Parameter(torch.empty(()))

    def forward(self, x_BLD: Tensor) -> Tensor:
        """`[B, L, D]` -> the same shape, without the residual."""
        return self.scale * self.up(F.gelu(self.down(x_BLD)))

    def initialise(self, std: float) -> None:
        init.ones_(self.scale)


class RepresentationRouter(nn.Module):
    """Per task and image the weights of the representations: softmax of the mean over tokens of
    `W2 gelu(LN(W1 x))`, dense, with noise on the logits in training (Shazeer et al., ICLR 2017, equation 4).

    `W2` also gives the noise's width, `softplus(.) + 0.01`, for each representation.

    Args:
        dim: `D`; `W1` halves it.
        num_representations: `M + 1`.
        tasks: names.
        noisy: whether there is noise in training.
        eps: of the layer norm.
    """

    def __init__(self, dim: int, num_representations: int, tasks: Sequence[str], noisy: bool, eps: float):
        super().__init__()
        self.noisy = noisy
        half = max(dim // 2, 1)
        self.gates = nn.ModuleDict(
            {
                task: nn.Sequential(
                    nn.Linear(dim, half),
                    nn.LayerNorm(half, eps),
                    nn.GELU(),
                    nn.Linear(half, 2 * num_representations if noisy else num_representations),
                )
                for task in tasks
            }
        )

    def forward(self, x_BLD: Tensor, task: str) -> Tensor:
        """`[B, L, D]` -> `[B, M + 1]`."""
        told = self.gates[task](x_BLD).mean(1)
        if told.dtype in (torch.float16, torch.bfloat16):
            told = told.float()
        if not self.noisy:
            return told.softmax(-1)
        logits, width = told.chunk(2, dim=-1)
        if self.training:
            logits = logits + torch.randn_like(logits) * (F.softplus(width) + 0.01)
        return logits.softmax(-1)


class RepresentationDecoder(nn.Module):
    """The paths along the stem, and at each level the mixture of each task.

    The path of teacher `m` adds to the stem's tokens `x^l` after block `l` what its adapters found so far:
    `r^l = u + adapter^l(u)` with `u = x^l + (r^(l-1) - x^(l-1))` and `r^0 = x^0`. A task's level is
    `sum_m w_m r_m^l`, projected; its levels are added up.

    Args:
        levels: after how many blocks each level reads the tokens; the last one is the number of blocks.
        dim: `D`.
        bottleneck: of an adapter.
        decoder_dim: `C`.
        teachers: names, `M` of them.
        tasks: names.
        grid: rows and columns of patches.
        noisy: whether routers have noise in training.
        eps: of layer norms.
    """

    def __init__(
        self,
        levels: Sequence[int],
        dim: int,
        bottleneck: int,
        decoder_dim: int,
        teachers: Sequence[str],
        tasks: Sequence[str],
        grid: tuple[int, int],
        noisy: bool,
        eps: float,
    ):
        super().__init__()
        self.reads, self.grid, self.teachers = list(levels), grid, list(teachers)
        self.adapters = nn.ModuleDict(
            {name: nn.ModuleList(Adapter(dim, bottleneck) for _ in range(levels[-1])) for name in teachers}
        )
        self.routers = nn.ModuleList(
            RepresentationRouter(dim, len(self.teachers) + 1, tasks, noisy, eps) for _ in levels
        )
        self.projections = nn.ModuleList(
            nn.ModuleDict({task: nn.Linear(dim, decoder_dim) for task in tasks}) for _ in levels
        )

    def forward(self, hidden: Sequence[Tensor], tasks: Sequence[str], record: bool) -> Computed:
        """Tokens `[1, B, L, D]` before and after each block -> `[T, B, L, C]`."""
        paths = {name: self.path(name, hidden) for name in self.teachers}
        names = ("stem", *self.teachers)
        sums: dict[str, Tensor] = {}
        routing = []
        for i, (blocks, router) in enumerate(zip(self.reads, self.routers, strict=True)):
            projections: Any = self.projections[i]
            stem_BLD = hidden[blocks][0]
            all_BMLD = torch.stack([stem_BLD, *(paths[name][blocks - 1] for name in self.teachers)], dim=1)
            weights = {task: router(stem_BLD, task) for task in tasks}
            for task in tasks:
                mixed_BLD = torch.einsum("bm,bmld->bld", weights[task].to(all_BMLD.dtype), all_BMLD)
                found = projections[task](mixed_BLD[:, mixed_BLD.shape[1] - self.grid[0] * self.grid[1] :])
                sums[task] = sums[task] + found if task in sums else found
            if record:
                detached = {task: w_BM.detach() for task, w_BM in weights.items()}
                routing.append(Routing(f"decoder.routers.{i}", detached, dict.fromkeys(tasks, names)))
        return Computed(torch.stack([sums[task] for task in tasks]), (), tuple(routing))

    def path(self, teacher: str, hidden: Sequence[Tensor]) -> list[Tensor]:
        """The representation `[B, L, D]` of a teacher's path after each block: what its distillation would match."""
        found = []
        added_BLD: Tensor | float = 0.0
        adapters: Any = self.adapters[teacher]
        for x_TBLD, adapter in zip(hidden[1:], adapters, strict=True):
            added_BLD = added_BLD + adapter(x_TBLD[0] + added_BLD)
            found.append(x_TBLD[0] + added_BLD)
        return found
