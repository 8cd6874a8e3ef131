"""MixLoRA (Li et al., "MixLoRA: Enhancing Large Language Models Fine-Tuning with LoRA-based Mixture of Experts", 2024,
arXiv 2404.15159).

    y = sum_k w_k FFN_{e_k}(x),      w, e = the K largest of softmax(W_r x), renormalised
    FFN_e(x) = W'_down (act(W'_gate x) * W'_up x),      W' = W_0 + s B_e A_e

A router chooses, token by token, among experts that share the weights of a frozen feed-forward block and have low-rank
pairs of their own; other targets, as those of the attention, have a plain LoRA. A loss of `E sum_e f_e p_e` evens out
the experts' use, `f_e` the share of routed copies and `p_e` the mean score of an expert, both without padding, averaged
over layers.

What is shared is computed once per token, not once per routed copy: `W_gate x` and `W_up x`, and `W_down` of the
weighted sum of what the copies' activations give. The copies themselves pay for the low-rank pairs and the activation.

Shapes: `N` tokens, `M` of them that are no padding, `D` width, `H` hidden width, `R` ranks, `E` experts, `K` of them
chosen per token, `S = N K` routed copies.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..ops import RoutingPlan, expert_combine, expert_linear, make_plan, route
from ..ops.hidden import expert_hidden
from ._base import (
    EXACT_DTYPES,
    RankAdapter,
    RankConfig,
    RankLayer,
    Record,
    at_least_float32,
    down_projection,
    up_projection,
)
from ._tuner import register

WHY_NOT_MERGED = "a router chooses its experts token by token"
# The parts of feed-forward blocks, by name: gate (or none), up, down, activation. They must be all that a block holds.
BLOCKS = (
    ("gate_proj", "up_proj", "down_proj", "act_fn"),  # Llama, Qwen, Mistral, Gemma
    (None, "fc1", "fc2", "activation_fn"),  # Phi, CLIP, SigLIP
)


# So many ranks of all experts together at most are one product with all tokens, on a CPU: more is multiplied, but no
# token is copied for its experts.
FEW_RANKS = 128


class Block(NamedTuple):
    """A feed-forward block, taken apart: modules in the order in which they compute, the gate before `up`."""

    first: list[nn.Module]
    down: nn.Module
    activation: Callable[[Tensor], Tensor]

    def hidden(self, first: list[Tensor]) -> Tensor:
        """What enters `down`."""
        if len(first) == 1:
            return self.activation(first[0])
        gate, up = first
        return self.activation(gate) * up


def taken_apart(module: nn.Module) -> Block | None:
    """None of what is no feed-forward block of a known kind."""
    for gate, up, down, activation in BLOCKS:
        names = [name for name in (gate, up) if name] + [down]
        held = {name for name, _ in module.named_children()} - {activation}
        if held == set(names) and callable(getattr(module, activation, None)):
            first = [module.get_submodule(name) for name in names[:-1]]
            return Block(first, module.get_submodule(down), getattr(module, activation))
    return None


def _trains(activation: Any) -> bool:
    """Whether an activation has parameters of its own that are trained, which a tile gives no gradient."""
    return isinstance(activation, nn.Module) and any(p.requires_grad for p in activation.parameters())


def _on_cpu(t: Tensor) -> bool:
    """Whether loops over experts may look at the data."""
    return t.device.type == "cpu" and not torch.compiler.is_compiling()


def _few(ranks_ERD: Tensor) -> bool:
    return _on_cpu(ranks_ERD) and ranks_ERD.shape[0] * ranks_ERD.shape[1] <= FEW_RANKS


class PlainLora(RankAdapter):
    """Of targets that are no feed-forward block."""

    depends_on_input: ClassVar[str | None] = WHY_NOT_MERGED

    def __init__(self, in_features: int, out_features: int, config: "MixLoraConfig"):
        super().__init__(in_features, out_features, config)
        self.a_RD = down_projection(config.r, in_features)
        self.b_OP = up_projection(out_features, config.r, config)


class MixLora(RankAdapter):
    """Of a feed-forward block.

    Differs from the official code in: the down-projection computes once per token, not once per expert; experts share
    one dropout; the balance is of each layer by itself.
    """

    depends_on_input: ClassVar[str | None] = WHY_NOT_MERGED
    counts_tokens: ClassVar[bool] = True

    def __init__(self, in_features: int, hidden: int, out_features: int, gated: bool, config: "MixLoraConfig"):
        super().__init__(in_features, out_features, config)
        self.router_ED = nn.Parameter(torch.randn(config.num_experts, in_features) * config.router_std)
        sizes = {"gate": (in_features, hidden), "up": (in_features, hidden), "down": (hidden, out_features)}
        self.names = list(sizes)[0 if gated else 1 :]
        for name in self.names:
            width, out = sizes[name]
            a_PD = down_projection(config.num_experts * config.r, width).data
            b_QR = up_projection(config.num_experts * out, config.r, config).data
            self.register_parameter(f"a_{name}_ERD", nn.Parameter(a_PD.unflatten(0, (config.num_experts, -1))))
            self.register_parameter(f"b_{name}_EOR", nn.Parameter(b_QR.unflatten(0, (config.num_experts, -1))))

    def of_block(
        self, x: Tensor, block: Block, record: Record | None = None, counted_M: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The output, `[..., D]`, and the loss that evens out the experts' use by the tokens that are counted."""
        x_ND = x.flatten(0, -2)
        first = [linear(x_ND) for linear in block.first]
        x_ND = x_ND.to(first[0].dtype)
        logits_NE = at_least_float32(nn.functional.linear(x_ND, self.router_ED.to(x_ND.dtype)))
        indices_NK, weights_NK = route(logits_NE, self.config.num_selected, renormalise=True)
        if record is not None:
            self.record(record, {"tokens": torch.zeros_like(logits_NE).scatter(1, indices_NK, weights_NK.detach())})
        experts = len(self.router_ED)
        plan = make_plan(indices_NK, experts)

        a_EPD = torch.cat([self._of("a_{}_ERD", name, x_ND) for name in self.names[:-1]], dim=1)
        down_SP = self._down(self._dropped(x_ND), a_EPD, plan).flatten(0, 1) * self.config.scale
        shared_NH, down_NKR = self._hidden(block, first, down_SP.split(self.config.r, dim=1), plan, weights_NK)
        y_ND = block.down(shared_NH)  # the weights sum to 1, so that a bias counts once
        y_ND = y_ND + self._up(down_NKR, self._of("b_{}_EOR", "down", down_NKR), plan, weights_NK)

        if counted_M is not None:
            logits_NE, indices_NK = logits_NE.index_select(0, counted_M), indices_NK.index_select(0, counted_M)
            plan = make_plan(indices_NK, experts)
        used_E = plan.counts_E / max(1, indices_NK.numel())
        loss = experts * (used_E * logits_NE.softmax(-1).mean(0)).sum() if len(logits_NE) else logits_NE.sum()
        return y_ND.view(*x.shape[:-1], y_ND.shape[-1]), loss

    def _hidden(
        self, block: Block, first: list[Tensor], down: Sequence[Tensor], plan: RoutingPlan, weights_NK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What enters the shared last layer, `[N, H]`; and of each copy what its expert takes it down to."""
        sizes, like, scale = plan.indices_NK.shape, first[0], self.config.scale
        b = [self._of("b_{}_EOR", name, like) for name in self.names[:-1]]
        a_ERH = self._of("a_{}_ERD", "down", like)
        if _on_cpu(like) and not _trains(block.activation):
            z = [down_SR.unflatten(0, sizes) for down_SR in down]
            dropout = self.config.dropout if self.training else 0.0
            shared_NH, down_NKR = expert_hidden(first, z, b, a_ERH, block.activation, plan, weights_NK, dropout)
            return shared_NH, down_NKR * scale
        copies = make_plan(plan.indices_NK.flatten().unsqueeze(1), plan.num_experts)
        added = []
        for y_NH, down_SR, b_EHR in zip(first, down, b, strict=True):
            up_S1H = expert_linear(down_SR, b_EHR, copies)
            added.append(y_NH.unsqueeze(1) + up_S1H.flatten(1).unflatten(0, sizes))
        hidden_NKH = block.hidden(added)
        shared_NH = (hidden_NKH * weights_NK.unsqueeze(-1)).sum(1).to(hidden_NKH.dtype)
        down_S1R = expert_linear(self._dropped(hidden_NKH.flatten(0, 1)), a_ERH, copies) * scale
        return shared_NH, down_S1R.flatten(1).unflatten(0, sizes)

    def _down(self, x_ND: Tensor, a_EPD: Tensor, plan: RoutingPlan) -> Tensor:
        """`[N, K, P]`."""
        if not _few(a_EPD):
            return expert_linear(x_ND, a_EPD, plan)
        all_NEP = nn.functional.linear(x_ND, a_EPD.flatten(0, 1)).unflatten(1, a_EPD.shape[:2])
        return all_NEP.gather(1, plan.indices_NK.unsqueeze(-1).expand(-1, -1, a_EPD.shape[1]))

    def _up(self, down_NKR: Tensor, b_EOR: Tensor, plan: RoutingPlan, weights_NK: Tensor) -> Tensor:
        """`[N, O]`."""
        turned_ERO = b_EOR.transpose(1, 2)
        if not _few(turned_ERO):
            return expert_combine(down_NKR, b_EOR, plan, weights_NK)
        weighted_NKR = (down_NKR * weights_NK.unsqueeze(-1)).to(down_NKR.dtype)
        index_NKR = plan.indices_NK.unsqueeze(-1).expand_as(weighted_NKR)
        of_all_NER = weighted_NKR.new_zeros(len(weighted_NKR), *turned_ERO.shape[:2]).scatter(
            1, index_NKR, weighted_NKR
        )
        return of_all_NER.flatten(1) @ turned_ERO.flatten(0, 1)

    def num_active(self) -> int:
        of_experts = self.num_trained() - self.router_ED.numel()
        return self.router_ED.numel() + of_experts // len(self.router_ED) * self.config.num_selected

    def _of(self, pattern: str, name: str, like: Tensor) -> Tensor:
        return self.get_parameter(pattern.format(name)).to(like.dtype)

    def _dropped(self, t: Tensor) -> Tensor:
        return nn.functional.dropout(t, self.config.dropout) if self.config.dropout and self.training else t


class MixLayer(RankLayer):
    """A feed-forward block with its adapters."""

    def _read_sizes(self) -> None:
        block = self._block()
        first: Any = block.first[0]
        down: Any = block.down
        self.in_features, self.hidden, self.out_features = first.in_features, first.out_features, down.out_features
        self._check(block, first.weight)

    @torch.no_grad()
    def _check(self, block: Block, weight: Tensor) -> None:
        """Its own forward must be the one that its parts are known for: there are blocks that do more."""
        if weight.is_meta or not weight.numel():
            return
        dtype = weight.dtype if weight.dtype in EXACT_DTYPES else torch.get_default_dtype()
        x_1D = torch.linspace(-1, 1, self.in_features, device=weight.device).to(dtype).unsqueeze(0)
        expected = block.down(block.hidden([linear(x_1D) for linear in block.first]))
        if not torch.allclose(self.base_layer(x_1D), expected, rtol=1e-2, atol=1e-4, equal_nan=True):
            raise ValueError(
                f"target_modules: expected a feed-forward block that computes down(act(gate(x)) * up(x)), found "
                f"{self.name} of type {type(self.base_layer).__name__}, which does more"
            )

    def _block(self) -> Block:
        return cast(Block, taken_apart(self.get_base_layer()))

    def new_adapter(self, config: Any) -> RankAdapter:
        gated = len(self._block().first) == 2
        return MixLora(self.in_features, self.hidden, self.out_features, gated, config)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> Any:
        return super()._get_base_layer_device_and_dtype(self._block().down)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = [name for name in self.active_adapters if name in self.moe_adapters]
        if self.disable_adapters or not names:
            return self.base_layer(x, *args, **kwargs)
        if len(names) > 1:
            raise ValueError(f"adapters: expected one active in a feed-forward block, found {', '.join(names)}")
        adapter = cast(MixLora, self.adapter(names[0]))
        balances = self.training and adapter.config.balance_coef > 0
        counted_M = self.current_tasks.counted(x) if balances else None
        y, loss = adapter.of_block(x, self._block(), self._record(), counted_M)
        if balances:
            y = self.current_tasks.losses.add(adapter.config.balance_coef * loss, y)
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Always a NotImplementedError."""
        for name in self.moe_adapters:
            self.lora_of(name, None)


@register("MIXLORA", PlainLora)
@dataclass
class MixLoraConfig(RankConfig):
    """MixLoRA.

    Attributes:
        target_modules: feed-forward blocks, as `mlp`, and linear layers outside of them; by default those that PEFT's
            LoRA would take and all feed-forward blocks.
        num_experts: `E`.
        num_selected: `K`.
        balance_coef: weight of the loss that evens out the experts' use. It is added in training to the loss that the
            model returns; where it returns none, nothing is added.
        router_std: standard deviation of the router's weights at the start.
    """

    r: int = 16
    alpha: float = 32.0
    num_experts: int = 8
    num_selected: int = 2
    balance_coef: float = 1e-3
    router_std: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_experts < 1:
            raise ValueError(f"num_experts: expected at least 1, found {self.num_experts}")
        if not 1 <= self.num_selected <= self.num_experts:
            raise ValueError(f"num_selected: expected 1 to {self.num_experts}, the experts, found {self.num_selected}")
        for name in ("balance_coef", "router_std"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected 0 or more, found {getattr(self, name)}")

    def layer_class(self, base: nn.Module) -> type[RankLayer] | None:
        return MixLayer if taken_apart(base) else super().layer_class(base)

    def default_targets(self, model: nn.Module, targets: set[str]) -> set[str]:
        blocks = [name for name, module in model.named_modules() if taken_apart(module)]
        inside = {name.rpartition(".")[2] for block in blocks for name, _ in model.get_submodule(block).named_modules()}
        return (targets - inside) | {name.rpartition(".")[2] for name in blocks}

    def check_targets(self, model: nn.Module, names: list[str]) -> None:
        modules = {name: model.get_submodule(name) for name in names}
        blocks = [name for name, module in modules.items() if taken_apart(module) or isinstance(module, MixLayer)]
        if names and not blocks:
            raise ValueError(
                f"target_modules: expected a feed-forward block such as mlp among them, found {', '.join(names[:3])}"
            )
        for block, name in itertools.product(blocks, names):
            if name.startswith(f"{block}.") and ".base_layer" not in name:
                raise ValueError(f"target_modules: expected the block {block} or its part {name}, found both")
