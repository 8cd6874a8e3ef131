"""Experts and a memory between a backbone and its heads: TaskExpert's decoder.

Shapes: `T` tasks, `B` images, `L` tokens of an image, `D` width of the backbone, `C` channels of the decoder, `E`
experts, `H`, `W` rows and columns of patches.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from ..outputs import Routing
from .heads import map_tokens, patch_map
from .vit import Computed


class ConvExperts(nn.Module):
    """`E` networks of one convolution, `gelu(W_e * x + b_e)` with 3 x 3 kernels, all of them computed.

    Args:
        num_experts: `E`.
        dim: `C`.
    """

    def __init__(self, num_experts: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, dim, dim, 3, 3))
        self.bias = nn.Parameter(torch.empty(num_experts, dim))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """`[B, C, H, W]` -> `[B, E, C, H, W]`."""
        maps = F.conv2d(x_BCHW, self.weight.flatten(0, 1), self.bias.flatten(), padding=1)
        return F.gelu(maps).unflatten(1, self.bias.shape)

    def initialise(self, std: float) -> None:
        init.normal_(self.weight, std=(2 / (9 * self.bias.shape[1])) ** 0.5)
        init.zeros_(self.bias)

    def extra_repr(self) -> str:
        return "experts={}, channels={}".format(*self.bias.shape)


class MemoryGates(nn.Module):
    """Per task and patch the weights of the experts and of the memory: softmax over `E + 1` of a linear map.

    Args:
        num_experts: `E`.
        dim: `C`.
        tasks: names.
    """

    def __init__(self, num_experts: int, dim: int, tasks: Sequence[str]):
        super().__init__()
        self.gates = nn.ParameterDict({task: torch.empty(num_experts + 1, dim) for task in tasks})

    def forward(self, x_BCHW: Tensor, task: str) -> Tensor:
        """`[B, C, H, W]` -> `[B, E + 1, H, W]`, the memory last."""
        logits = F.conv2d(x_BCHW, self.gates[task][..., None, None])
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        return logits.softmax(1)

    def initialise(self, std: float) -> None:
        for gate in self.gates.values():
            init.trunc_normal_(gate, std=std)


class MemoryLevel(nn.Module):
    """One level: experts take a backbone's feature apart, each task's gates put it together again, with its memory.

        F_t = sum_n G_tn E_n + G_t,N+1 M_t,      M_t <- M_t + conv_t(F_t)

    Args:
        layer: its name in records.
        dim: `D`.
        decoder_dim: `C`.
        num_experts: `E`.
        tasks: names.
        grid: rows and columns of patches.
        eps: of the layer norm.
    """

    def __init__(
        self,
        layer: str,
        dim: int,
        decoder_dim: int,
        num_experts: int,
        tasks: Sequence[str],
        grid: tuple[int, int],
        eps: float,
    ):
        super().__init__()
        self.layer, self.grid = layer, grid
        self.norm = nn.LayerNorm(dim, eps)
        self.projection = nn.Linear(dim, decoder_dim)
        self.experts = ConvExperts(num_experts, decoder_dim)
        self.router = MemoryGates(num_experts, decoder_dim, tasks)
        self.writes = nn.ModuleDict({task: nn.Conv2d(decoder_dim, decoder_dim, 3, padding=1) for task in tasks})

    def forward(
        self, x_BLD: Tensor, memories: dict[str, Tensor], record: bool
    ) -> tuple[dict[str, Tensor], tuple[Routing, ...]]:
        """The memories `[B, C, H, W]` of the tasks after this level, and its record."""
        x_BCHW = patch_map(self.projection(self.norm(x_BLD)), self.grid)
        experts_BECHW = self.experts(x_BCHW)
        written, weights = {}, {}
        for task, memory in memories.items():
            gates = self.router(x_BCHW, task)
            weights[task] = gates.flatten(2).transpose(1, 2).flatten(0, 1).detach()
            gates = gates.to(x_BCHW.dtype).unsqueeze(2)
            feature = (gates[:, :-1] * experts_BECHW).sum(1) + gates[:, -1] * memory
            written[task] = memory + self.writes[task](feature)
        if not record:
            return written, ()
        names = (*(f"experts.{e}" for e in range(experts_BECHW.shape[1])), "memory")
        return written, (Routing(self.layer, weights, dict.fromkeys(memories, names), grid=self.grid),)


class MemoryDecoder(nn.Module):
    """Levels from first to last, between which every task carries its memory; heads read the last one.

    Args:
        levels: after how many blocks each level reads the tokens.
        dim: `D`.
        decoder_dim: `C`.
        num_experts: `E` of each level.
        tasks: names.
        grid: rows and columns of patches.
        eps: of layer norms.
    """

    def __init__(
        self,
        levels: Sequence[int],
        dim: int,
        decoder_dim: int,
        num_experts: int,
        tasks: Sequence[str],
        grid: tuple[int, int],
        eps: float,
    ):
        super().__init__()
        self.reads, self.grid = list(levels), grid
        self.norm = nn.LayerNorm(dim, eps)
        self.starts = nn.ModuleDict({task: nn.Linear(dim, decoder_dim) for task in tasks})
        self.levels = nn.ModuleList(
            MemoryLevel(f"decoder.levels.{i}", dim, decoder_dim, num_experts, tasks, grid, eps)
            for i in range(len(levels))
        )

    def forward(self, hidden: Sequence[Tensor], tasks: Sequence[str], record: bool) -> Computed:
        """Tokens `[1, B, L, D]` before and after each block -> memories `[T, B, L, C]`."""
        first_BLD = self.norm(hidden[self.reads[0]][0])
        memories = {task: patch_map(self.starts[task](first_BLD), self.grid) for task in tasks}
        routing: tuple[Routing, ...] = ()
        for blocks, level in zip(self.reads, self.levels, strict=True):
            memories, found = level(hidden[blocks][0], memories, record)
            routing += found
        return Computed(torch.stack([map_tokens(memories[task]) for task in tasks]), (), routing)
