"""MTLoRA (Agiza et al., "MTLoRA: A Low-Rank Adaptation Approach for Efficient Multi-Task Learning", CVPR 2024).

    y_t = W_0 x + s B A x + s_t B_t A_t x

A pair that all tasks share, and in some layers a pair per task. A sample has one task, and only its pair computes: the
time does not grow with the number of tasks.

Shapes: `N` tokens, `D` width, `R` ranks of a pair, `O` output width, `T` tasks, `B` samples.
"""

import copy
import re
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..ops import expert_combine, expert_linear, make_plan
from ..ops.runs import run_pairs
from ._base import SCALINGS, RankAdapter, RankConfig, at_least_float32, down_projection, up_projection
from ._tuner import register

# Of runs shorter than the ranks, as tasks per token are, the gathered matrices are more than the tokens themselves. Yet
# of a few tokens, as in generation, nothing is faster.
FEW_TOKENS = 1024


class MTLoRA(RankAdapter):
    """Differs from the official code in: a sample has one task from the first layer on, where the official code sends
    each image through the shared stream and, at the end of a stage, through one stream per task. So its mode `matrixv2`
    is `shared_in_tasks`, its mode `matrix` leaves the shared pair out of layers that have pairs of tasks, and its mode
    `addition`, which sums over the streams of all tasks, is none of ours."""

    by_task: ClassVar[bool] = True

    def __init__(self, in_features: int, out_features: int, config: "MTLoRAConfig"):
        super().__init__(in_features, out_features, config)
        tasks = config.tasks or ()
        self.has_pairs = config.task_rank > 0
        self.has_shared = config.shared_in_tasks or not self.has_pairs
        if self.has_shared:
            self.a_RD = down_projection(config.r, in_features)
            self.b_OP = up_projection(out_features, config.r, config)
        if self.has_pairs:
            a = [down_projection(config.task_rank, in_features).data for _ in tasks]
            b = [up_projection(out_features, config.task_rank, config).data for _ in tasks]
            self.a_TRD, self.b_TOR = nn.Parameter(torch.stack(a)), nn.Parameter(torch.stack(b))

    def add(self, x_ND: Tensor, base_NO: Tensor, told: Tensor | None, options: dict[str, Any]) -> Tensor:
        if not self.has_pairs:
            return super().add(x_ND, base_NO, told, options)
        assert told is not None
        shared = (self.a_RD, self.b_OP, self.config.scale) if self.has_shared else None
        scale = self.config.task_scale
        ranks = self.a_TRD.shape[1] + (len(self.a_RD) if self.has_shared else 0)
        if len(told) * ranks <= max(len(x_ND), FEW_TOKENS):
            return run_pairs(x_ND, base_NO, self.a_TRD, self.b_TOR, told, scale=scale, shared=shared)
        if self.has_shared:
            base_NO = super().add(x_ND, base_NO, told, options)
        plan = make_plan(told.repeat_interleave(len(x_ND) // max(1, len(told))).unsqueeze(1), len(self.a_TRD))
        h_N1R = expert_linear(x_ND, self.a_TRD.to(x_ND.dtype), plan)
        scale_N1 = torch.full_like(h_N1R[..., 0], scale)
        return base_NO + expert_combine(h_N1R, self.b_TOR.to(h_N1R.dtype), plan, scale_N1)

    def num_active(self) -> int:
        of_tasks = self.a_TRD.numel() + self.b_TOR.numel() if self.has_pairs else 0
        return self.num_trained() - of_tasks + of_tasks // len(self.config.tasks)

    def as_lora(self, told: Any) -> tuple[Tensor, Tensor]:
        pairs = [(self.a_RD, self.b_OP)] if self.has_shared else []
        if self.has_pairs:
            ratio = self.config.task_scale / self.config.scale
            pairs.append((self.a_TRD[told], at_least_float32(self.b_TOR[told]) * ratio))
        a_RD, b_OR = (
            torch.cat([at_least_float32(t) for t in side], d) for d, side in enumerate(zip(*pairs, strict=True))
        )
        return a_RD, b_OR


@register("MTLORA", MTLoRA)
@dataclass
class MTLoRAConfig(RankConfig):
    """MTLoRA.

    Attributes:
        r: of the pair that all tasks share.
        alpha: as published it is the scale itself, whatever the rank; see `scaling`.
        task_rank: of a task's own pair.
        task_alpha: the numerator of a task's scale, by default `alpha`.
        task_modules: names, or a pattern, of the targets that have a pair per task; by default all. In the paper they
            are in the last block of each stage.
        shared_in_tasks: whether the shared pair computes too where tasks have their own.
    """

    r: int = 16
    alpha: float = 4.0
    scaling: str = "alpha"
    task_rank: int = 4
    task_alpha: float | None = None
    task_modules: list[str] | str | None = None
    shared_in_tasks: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task_rank < 1:
            raise ValueError(f"task_rank: expected at least 1, found {self.task_rank}")
        if not self.alpha:
            raise ValueError(f"alpha: expected another number than 0, found {self.alpha}")

    @property
    def task_scale(self) -> float:
        """`s_t`."""
        alpha = self.alpha if self.task_alpha is None else self.task_alpha
        return alpha / SCALINGS[self.scaling](self.task_rank)

    def has_pairs(self, name: str) -> bool:
        """Whether the layer of that name has a pair per task; matched as PEFT matches `target_modules`."""
        if self.task_modules is None:
            return True
        if isinstance(self.task_modules, str):
            return re.fullmatch(self.task_modules, name) is not None
        return any(name == listed or name.endswith(f".{listed}") for listed in self.task_modules)

    def for_layer(self, name: str) -> RankConfig:
        config = copy.copy(self)
        config.task_rank = self.task_rank if self.has_pairs(name) else 0
        return config

    def check_targets(self, model: nn.Module, names: list[str]) -> None:
        if names and not any(map(self.has_pairs, names)):
            raise ValueError(
                f"task_modules: expected some of the targets, such as {names[0]}, found {self.task_modules!r}, "
                "which fits none"
            )
