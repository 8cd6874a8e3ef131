"""What answers one task from the tokens of an image: a map the size of the image, or one answer per image.

Shapes: `B` images, `L` tokens of an image, `D` width, `C` outputs of a task, `H`, `W` height and width in pixels.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class UpHead(nn.Module):
    """A map from patches by convolutions and steps of bilinear up-sampling: SETR-PUP (Zheng et al., CVPR 2021,
    section 3.2), as M3ViT's decoder has it.

    A layer norm; `num_stages` times a 3 x 3 convolution with batch norm and ReLU, each but the last followed by twofold
    up-sampling; a 1 x 1 convolution to `C`; up-sampling to the image.

    Args:
        dim: `D`.
        decoder_dim: channels of the convolutions.
        num_stages: how many there are; `2 ** num_stages` is the patch size in the papers.
        num_outputs: `C`.
        grid: rows and columns of patches.
        image_size: height and width of the map.
        eps: of the layer norm.

    Differs from the official code in: batch norm, not its version over processes, which
    `torch.nn.SyncBatchNorm.convert_sync_batchnorm` makes of it; and in the place of the last convolution, which stands
    before the last up-sampling, where M3ViT's published operation counts have it.
    """

    def __init__(
        self,
        dim: int,
        decoder_dim: int,
        num_stages: int,
        num_outputs: int,
        grid: Sequence[int],
        image_size: Sequence[int],
        eps: float = 1e-6,
    ):
        super().__init__()
        self.grid, self.image_size = tuple(grid), tuple(image_size)
        self.norm = nn.LayerNorm(dim, eps)
        widths = [dim, *[decoder_dim] * num_stages]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm2d(decoder_dim) for _ in range(num_stages))
        self.out = nn.Conv2d(decoder_dim, num_outputs, 1)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """`[B, L, D]`, patches last -> `[B, C, H, W]`."""
        maps = self.norm(x_BLD[:, x_BLD.shape[1] - self.grid[0] * self.grid[1] :])
        maps = patch_map(maps, self.grid)
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            maps = F.relu(norm(conv(maps)), inplace=True)
            if i + 1 < len(self.convs):
                maps = _resized(maps, (2 * maps.shape[2], 2 * maps.shape[3]))
        return _resized(self.out(maps), self.image_size)


class ClassHead(nn.Module):
    """One answer per image: layer norm and a linear layer over the class token, or over the mean of the patches.

    Args:
        dim: `D`.
        num_outputs: `C`.
        cls_token: whether the first token is one.
        eps: of the layer norm.
    """

    def __init__(self, dim: int, num_outputs: int, cls_token: bool, eps: float = 1e-6):
        super().__init__()
        self.cls_token = cls_token
        self.norm = nn.LayerNorm(dim, eps)
        self.out = nn.Linear(dim, num_outputs)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """`[B, L, D]` -> `[B, C]`."""
        pooled_BD = x_BLD[:, 0] if self.cls_token else x_BLD.mean(1)
        return self.out(self.norm(pooled_BD))


def patch_map(x_BLD: Tensor, grid: Sequence[int]) -> Tensor:
    """Tokens `[B, L, D]`, patches last, as a map of the patches `[B, D, rows, columns]`."""
    return x_BLD[:, x_BLD.shape[1] - grid[0] * grid[1] :].transpose(1, 2).unflatten(2, tuple(grid))


def map_tokens(maps_BDHW: Tensor) -> Tensor:
    """A map of the patches as tokens `[B, L, D]`."""
    return maps_BDHW.flatten(2).transpose(1, 2)


def _resized(maps: Tensor, size: Any) -> Tensor:
    if maps.shape[2:] == tuple(size):
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
