"""A vision transformer's parts: patches, attention, MLP, and the block that joins them.

Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, section 3.1, equations 1 to 3 (pre-norm). These are not
transformers' own layers because what an expert layer computes depends on the task: every part here takes the tasks of a
call along with the tokens, and tokens have a dimension of tasks once an expert layer told them apart.

Shapes: `T` tasks (1 while the tokens are the same for all), `B` images, `L` tokens of an image, `D` width, `A` heads,
`P` width of a task's condition, `H`, `W` height and width in pixels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from ..outputs import Routing


class Computed(NamedTuple):
    """What a layer makes of the tokens.

    Attributes:
        hidden: `[T, B, L, D]`.
        auxiliary: what its balance adds to the loss, a scalar, in training.
        routing: who used which expert, if asked for.
    """

    hidden: Tensor
    auxiliary: tuple[Tensor, ...] = ()
    routing: tuple[Routing, ...] = ()


class PatchEmbedding(nn.Module):
    """Pixels to tokens (equation 1): a class token first, then the patches row by row, each with its position.

    Args:
        image_size: height and width in pixels.
        patch_size: side of a patch in pixels.
        num_channels: of the pixels.
        dim: `D`.
        cls_token: whether there is one.
    """

    def __init__(self, image_size: Sequence[int], patch_size: int, num_channels: int, dim: int, cls_token: bool = True):
        super().__init__()
        self.image_size, self.patch_size, self.num_channels = tuple(image_size), patch_size, num_channels
        self.grid = (image_size[0] // patch_size, image_size[1] // patch_size)
        self.projection = nn.Conv2d(num_channels, dim, patch_size, patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim)) if cls_token else None
        self.position = nn.Parameter(torch.empty(1, self.grid[0] * self.grid[1] + cls_token, dim))

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """`[B, C, H, W]` -> `[B, L, D]`."""
        x_BLD = self.projection(pixels_BCHW).flatten(2).transpose(1, 2)
        if self.cls_token is not None:
            x_BLD = torch.cat([self.cls_token.expand(len(x_BLD), -1, -1), x_BLD], dim=1)
        return x_BLD + self.position

    def initialise(self, std: float) -> None:
        for parameter in (self.cls_token, self.position):
            if parameter is not None:
                init.trunc_normal_(parameter, std=std)

    def check(self, pixels_BCHW: Tensor) -> None:
        """Raises ValueError for what is no batch of images of this size, before anything is computed."""
        expected = f"[B, {self.num_channels}, {self.image_size[0]}, {self.image_size[1]}]"
        if not isinstance(pixels_BCHW, Tensor) or not pixels_BCHW.is_floating_point():
            found = pixels_BCHW.dtype if isinstance(pixels_BCHW, Tensor) else type(pixels_BCHW).__name__
            raise ValueError(f"pixel_values: expected floats of shape {expected}, found {found}")
        if pixels_BCHW.dim() != 4 or pixels_BCHW.shape[1:] != (self.num_channels, *self.image_size):
            raise ValueError(f"pixel_values: expected shape {expected}, found {list(pixels_BCHW.shape)}")
        if not len(pixels_BCHW):
            raise ValueError("pixel_values: expected at least one image, found an empty batch")
        has_values = not torch.compiler.is_compiling() and not pixels_BCHW.is_meta
        if has_values and not bool(pixels_BCHW.isfinite().all()):
            raise ValueError("pixel_values: expected finite numbers, found NaN or infinity")


class SelfAttention(nn.Module):
    """Multi-head self-attention, dense: the same for all tasks.

    Args:
        dim: `D`.
        num_heads: `A`.
        qkv_bias: whether the projections of query, key and value have biases.
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.out = nn.Linear(dim, dim)

    def forward(self, x_TBLD: Tensor, tasks: Sequence[str], condition_TP: Tensor | None, record: bool) -> Computed:
        qkv = self.qkv(x_TBLD.flatten(0, 1)).unflatten(-1, (3, self.num_heads, -1))  # [TB, L, 3, A, D / A]
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return Computed(self.out(mixed.transpose(1, 2).flatten(2)).unflatten(0, x_TBLD.shape[:2]))


class MLP(nn.Module):
    """Two linear layers with GELU between, dense: the same for all tasks.

    Args:
        dim: `D`.
        hidden_dim: width between.
    """

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.up = nn.Linear(dim, hidden_dim)
        self.down = nn.Linear(hidden_dim, dim)

    def forward(self, x_TBLD: Tensor, tasks: Sequence[str], condition_TP: Tensor | None, record: bool) -> Computed:
        return Computed(self.down(F.gelu(self.up(x_TBLD))))


class Block(nn.Module):
    """`x <- x + attention(LN(x))`, then `x <- x + mlp(LN(x))` (equations 2 and 3).

    Args:
        attention, mlp: parts with the interface of `SelfAttention`; dense or of experts.
        dim: `D`.
        eps: of the layer norms.
        dropout: after attention and after the MLP.
        drop_path: probability of leaving a whole branch out for an image, in training (Huang et al., ECCV 2016).
        layer_scale: first value of a factor per channel on each branch (Touvron et al., ICCV 2021); None for none.
    """

    def __init__(
        self,
        attention: nn.Module,
        mlp: nn.Module,
        dim: int,
        eps: float = 1e-6,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
    ):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)
        self.attention, self.mlp = attention, mlp
        self.dropout, self.drop_path, self.first_scale = dropout, drop_path, layer_scale
        scales = None if layer_scale is None else nn.ParameterList(torch.empty(dim) for _ in range(2))
        self.scales = scales

    def forward(
        self, x_TBLD: Tensor, tasks: Sequence[str], condition_TP: Tensor | None = None, record: bool = False
    ) -> Computed:
        """`[T, B, L, D]` -> the same, with as many tasks as `tasks` behind the first layer of experts."""
        auxiliary: tuple[Tensor, ...] = ()
        routing: tuple[Routing, ...] = ()
        for i, (norm, part) in enumerate(((self.norm1, self.attention), (self.norm2, self.mlp))):
            found = part(norm(x_TBLD), tasks, condition_TP, record)
            y_TBLD = found.hidden if self.scales is None else found.hidden * self.scales[i]
            x_TBLD = x_TBLD + self._dropped(y_TBLD)
            auxiliary, routing = auxiliary + found.auxiliary, routing + found.routing
        return Computed(x_TBLD, auxiliary, routing)

    def _dropped(self, y_TBLD: Tensor) -> Tensor:
        if not self.training:
            return y_TBLD
        y_TBLD = F.dropout(y_TBLD, self.dropout)
        if self.drop_path:
            # One draw per image for all tasks: the tasks of an image keep going through the same layers.
            kept_B = torch.rand(y_TBLD.shape[1], device=y_TBLD.device) >= self.drop_path
            y_TBLD = y_TBLD * (kept_B.to(y_TBLD.dtype) / (1 - self.drop_path)).reshape(-1, 1, 1)
        return y_TBLD

    def initialise(self, std: float) -> None:
        for scale in self.scales or ():
            init.constant_(scale, self.first_scale or 0.0)
