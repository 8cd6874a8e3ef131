"""What is measured: the shape of a model, and the matrix products that no implementation of it can do without.

Shapes: `B` rows, `D` width of the encoded row, `E` experts, `H` expert output width, `T` tasks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """A model to build in every library.

    Attributes:
        levels: 0 for MMoE, 1 or more for PLE.
        num_tasks: binary tasks, `T`.
        num_numeric: numeric columns, read as they are.
        categories: number of categories of each categorical column.
        embedding_dim: width of each one's embedding.
        num_experts: of MMoE.
        num_specific, num_shared: experts per task, and shared ones, at each level of PLE.
        expert_dims: widths of an expert's layers.
        tower_dims: widths of a tower's hidden layers.
    """

    levels: int
    num_tasks: int
    num_numeric: int
    categories: tuple[int, ...] = ()
    embedding_dim: int = 8
    num_experts: int = 8
    num_specific: int = 3
    num_shared: int = 2
    expert_dims: tuple[int, ...] = (64,)
    tower_dims: tuple[int, ...] = (32,)

    @property
    def name(self) -> str:
        return f"ple-{self.levels}" if self.levels else "mmoe"

    @property
    def input_dim(self) -> int:
        return self.num_numeric + self.embedding_dim * len(self.categories)

    @property
    def task_names(self) -> list[str]:
        return [f"task{i}" for i in range(self.num_tasks)]

    def gemms(self) -> list["Gemm"]:
        """Products of experts, gates and towers, one row's worth each; mixing and embedding are left out."""
        found: list[Gemm] = []
        if not self.levels:
            found += _experts([self.num_experts], self.input_dim, self.expert_dims)
            found.append(Gemm(self.num_tasks, self.input_dim, self.num_experts, True))
        everyone = self.num_tasks * self.num_specific + self.num_shared
        for level in range(self.levels):
            width = self.expert_dims[-1] if level else self.input_dim
            # The first level's experts all read the encoded row; above it, each group reads its own stream.
            groups = [self.num_specific] * self.num_tasks + [self.num_shared] if level else [everyone]
            found += _experts(groups, width, self.expert_dims)
            found.append(Gemm(self.num_tasks, width, self.num_specific + self.num_shared, level == 0))
            if level < self.levels - 1:
                found.append(Gemm(1, width, everyone, True))
        widths = [self.expert_dims[-1], *self.tower_dims, 1]
        return found + [Gemm(self.num_tasks, inner, outer, False) for inner, outer in pairwise(widths)]

    def multiply_adds(self) -> int:
        """Per row, forward."""
        return sum(gemm.count * gemm.inner * gemm.outer for gemm in self.gemms())


@dataclass(frozen=True)
class Gemm:
    """`count` products `[B, inner] x [inner, outer]`, of one input or of `count` different ones."""

    count: int
    inner: int
    outer: int
    one_input: bool


def _experts(groups: list[int], input_dim: int, dims: tuple[int, ...]) -> list[Gemm]:
    first = [Gemm(size, input_dim, dims[0], True) for size in groups]
    return first + [Gemm(sum(groups), inner, outer, False) for inner, outer in pairwise(dims)]


def floor_calls(shape: Shape, batch: int) -> dict[str, Callable[[], object]]:
    """The bare products, outputs allocated beforehand, in the two ways to run them: the faster one is the floor.

    Args:
        shape: of the model.
        batch: `B`.

    Returns:
        `separate` (one product per weight matrix) and `fused` (one product per input, or a batched one).
    """
    separate: list[tuple[Tensor, Tensor, Tensor]] = []
    fused: list[tuple[Tensor, Tensor, Tensor]] = []
    for gemm in shape.gemms():
        inputs = torch.randn(1 if gemm.one_input else gemm.count, batch, gemm.inner)
        weights = torch.randn(gemm.count, gemm.outer, gemm.inner)
        for i in range(gemm.count):
            x = inputs[0 if gemm.one_input else i]
            separate.append((x, weights[i].t(), torch.empty(batch, gemm.outer)))
        if gemm.one_input:
            flat = weights.flatten(0, 1).t()
            fused.append((inputs[0], flat, torch.empty(batch, flat.shape[1])))
        else:
            fused.append((inputs, weights.transpose(1, 2), torch.empty(gemm.count, batch, gemm.outer)))

    def run(products: list[tuple[Tensor, Tensor, Tensor]]) -> Callable[[], None]:
        def call() -> None:
            for a, b, out in products:
                torch.matmul(a, b, out=out)

        return call

    return {"separate": run(separate), "fused": run(fused)}
