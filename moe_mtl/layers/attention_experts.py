"""A mixture of attention heads: each token chooses which heads attend for it.

Shapes: `T` tasks (1 while the tokens are the same for all), `B` images, `L` tokens of an image, `N = T B L` tokens,
`D` width, `E` experts, `K` experts chosen per token, `H` width of a head.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .. import ops
from .moe import TaskRouter
from .vit import Computed


class HeadExperts(nn.Module):
    """`E` attention heads: of each the projection of its query, `[E, H, D]`, and of its output, `[E, D, H]`.

    Args:
        num_experts: how many are stored.
        dim: `D`.
        head_dim: `H`.

    Attributes:
        backend: of `ops.expert_linear`; None for what suits the device.
    """

    backend: ops.Backend | None = None

    def __init__(self, num_experts: int, dim: int, head_dim: int):
        super().__init__()
        self.w_query = nn.Parameter(torch.empty(num_experts, head_dim, dim))
        self.w_out = nn.Parameter(torch.empty(num_experts, dim, head_dim))

    def forward(self, x_ND: Tensor, key: Tensor, value: Tensor, indices_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """Each token through the heads that it chose, and their weighted sum.

        Args:
            x_ND: tokens of `B` images, those of one image together.
            key, value: `[B, L, H]`, the same for all heads.
            indices_NK, weights_NK: the chosen heads and their weights.

        Returns:
            `[N, D]`.
        """
        plan = ops.make_plan(indices_NK, len(self.w_query))
        query_NKH = ops.expert_linear(x_ND, self.w_query, plan, backend=self.backend, fallback=True)
        mixed_NKH = attend(query_NKH, key, value)
        return ops.expert_combine(mixed_NKH, self.w_out, plan, weights_NK, backend=self.backend, fallback=True)

    def initialise(self, std: float) -> None:
        for weight in self.parameters():
            init.trunc_normal_(weight, std=std)

    def extra_repr(self) -> str:
        experts, head, dim = self.w_query.shape
        return f"experts={experts}, dim={dim}, head={head}"


def attend(query_NKH: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What each query finds in its image, whose key and value are `[B, L, H]`: `[N, K, H]`."""
    # All heads read one key and one value, so that the K queries of a token are K rows of one head.
    rows = query_NKH.reshape(len(key), 1, -1, key.shape[-1])
    return F.scaled_dot_product_attention(rows, key.unsqueeze(1), value.unsqueeze(1)).reshape(query_NKH.shape)


class SparseAttention(nn.Module):
    """The attention of a block made of experts: `y_n = sum_k p_nk Wo_e softmax(q_nk K^T / sqrt(H)) V` with
    `q_nk = Wq_e x_n`, `e` the k-th expert that the task's gate chose for token `n`, and `K, V = W_kv x` shared by all.

    Zhang et al., "Mixture of Attention Heads", EMNLP 2022; Mod-Squad (Chen et al., CVPR 2023, section 3.2).

    Args:
        layer: its name in records.
        router: chooses.
        experts: compute.
        dim: `D`.
        head_dim: `H`.
        grid: rows and columns of patches, for records.

    Differs from the official code in: the experts are in the model's dtype; Mod-Squad's code casts them to float16.
    """

    def __init__(
        self,
        layer: str,
        router: TaskRouter,
        experts: HeadExperts,
        dim: int,
        head_dim: int,
        grid: tuple[int, int] | None = None,
    ):
        super().__init__()
        self.layer, self.grid = layer, grid
        self.router, self.experts = router, experts
        self.kv = nn.Linear(dim, 2 * head_dim, bias=False)

    def forward(self, x_TBLD: Tensor, tasks: Sequence[str], condition_TP: Tensor | None, record: bool) -> Computed:
        """`[1 or T, B, L, D]` -> `[T, B, L, D]`."""
        sizes = (len(tasks), *x_TBLD.shape[1:3])
        choice = self.router(x_TBLD.flatten(1, 2), tasks, condition_TP)
        key, value = self.kv(x_TBLD).expand(len(tasks), -1, -1, -1).flatten(0, 1).chunk(2, dim=-1)
        tokens_ND = x_TBLD.expand(len(tasks), -1, -1, -1).flatten(0, 2)
        y_ND = self.experts(tokens_ND, key, value, choice.indices_TNK.flatten(0, 1), choice.weights_TNK.flatten(0, 1))
        routing = (self.router.routing(self.layer, choice, tasks, self.grid),) if record else ()
        return Computed(y_ND.unflatten(0, sizes), choice.auxiliary, routing)
