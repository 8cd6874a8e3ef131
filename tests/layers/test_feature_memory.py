"""TaskExpert's decoder held to its equations, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_mtl.layers.feature_memory import MemoryDecoder, MemoryLevel
from moe_mtl.layers.heads import map_tokens, patch_map

B, D, C, E = 2, 6, 4, 3
GRID = (2, 3)
TASKS = ["edges", "depth"]


def filled(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.double().parameters():
        torch.nn.init.normal_(parameter, std=0.4, generator=generator)
    return module


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def level_reference(level: MemoryLevel, x_BLD: Tensor, memory: Tensor, task: str) -> tuple[Tensor, Tensor]:
    normed = F.layer_norm(x_BLD[:, 1:], (D,), level.norm.weight, level.norm.bias, level.norm.eps)
    x = (normed @ level.projection.weight.T + level.projection.bias).reshape(B, *GRID, C).permute(0, 3, 1, 2)
    experts = [gelu(F.conv2d(x, level.experts.weight[e], level.experts.bias[e], padding=1)) for e in range(E)]
    rows = []
    gates = torch.zeros(B, *GRID, E + 1, dtype=torch.float64)
    for b in range(B):
        for i in range(GRID[0]):
            for j in range(GRID[1]):
                g = (level.router.gates[task] @ x[b, :, i, j]).exp()
                g = g / g.sum()
                gates[b, i, j] = g.detach()
                told = [*(one[b, :, i, j] for one in experts), memory[b, :, i, j]]
                rows.append(sum(g[n] * told[n] for n in range(E + 1)))
    feature = torch.stack(rows).reshape(B, *GRID, C).permute(0, 3, 1, 2)
    write = level.writes[task]
    return memory + F.conv2d(feature, write.weight, write.bias, padding=1), gates


def test_a_level_is_the_papers_equations() -> None:
    level = filled(MemoryLevel("decoder.levels.0", D, C, E, TASKS, GRID, 1e-6))
    x_BLD = drawn(B, 1 + 6, D).requires_grad_()
    memories = {task: drawn(B, C, *GRID, seed=i + 1) for i, task in enumerate(TASKS)}
    found, (record,) = level(x_BLD, memories, True)
    expected = {}
    for task in TASKS:
        expected[task], gates = level_reference(level, x_BLD, memories[task], task)
        torch.testing.assert_close(found[task], expected[task], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(record.weights[task], gates.reshape(-1, E + 1))
        assert record.experts[task][-1] == "memory"
    leaves = [x_BLD, *level.parameters()]
    ours = torch.autograd.grad(sum(m.square().sum() for m in found.values()), leaves)
    theirs = torch.autograd.grad(sum(m.square().sum() for m in expected.values()), leaves)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_a_task_carries_its_memory_from_level_to_level() -> None:
    decoder = filled(MemoryDecoder([2, 3], D, C, E, TASKS, GRID, 1e-6))
    hidden = [drawn(1, B, 1 + 6, D, seed=i) for i in range(4)]
    found = decoder(hidden, TASKS, False).hidden
    for t, task in enumerate(TASKS):
        start = decoder.starts[task]
        normed = F.layer_norm(hidden[2][0], (D,), decoder.norm.weight, decoder.norm.bias, 1e-6)
        memory = (normed[:, 1:] @ start.weight.T + start.bias).reshape(B, *GRID, C).permute(0, 3, 1, 2)
        for level, blocks in zip(decoder.levels, (2, 3), strict=True):
            memory, _ = level_reference(level, hidden[blocks][0], memory, task)
        torch.testing.assert_close(found[t], memory.reshape(B, C, 6).transpose(1, 2), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("extra", [0, 1])
def test_patches_and_maps(extra: int) -> None:
    x_BLD = drawn(B, extra + 6, D)
    maps = patch_map(x_BLD, GRID)
    assert torch.equal(maps[1, :, 1, 2], x_BLD[1, extra + 5])
    assert torch.equal(map_tokens(maps), x_BLD[:, extra:])
