"""A sparse mixture of any size, and its equation: token by token, as written."""

from collections.abc import Callable

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
HALVES = {"swiglu", "geglu", "reglu"}


def make(
    tokens: int, width: int, hidden: int, experts: int, chosen: int, activation: str = "swiglu", out: int | None = None
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(tokens + 7 * width)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64) / max(shape[-1], 1) ** 0.5

    wide = hidden * (2 if activation in HALVES else 1)
    order = torch.rand(tokens, experts, generator=g).argsort(dim=1)
    return {
        "x_ND": draw(tokens, width) * width**0.5,
        "w_up_EPD": draw(experts, wide, width),
        "w_down_EOH": draw(experts, out or width, hidden),
        "indices_NK": order[:, :chosen],
        "weights_NK": draw(tokens, chosen).softmax(-1),
        "b_up_EP": draw(experts, wide),
        "b_down_EO": draw(experts, out or width),
    }


def equation(
    activation: str, x_ND, w_up_EPD, w_down_EOH, indices_NK, weights_NK, b_up_EP=None, b_down_EO=None
) -> Tensor:
    plain: dict[str, Callable] = {
        "relu": lambda z: z.clamp_min(0),
        "relu2": lambda z: z.clamp_min(0) ** 2,
        "gelu": lambda z: z * (1 + torch.erf(z / 2**0.5)) / 2,
        "gelu_tanh": lambda z: z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3))) / 2,
        "silu": lambda z: z / (1 + torch.exp(-z)),
    }
    halves = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}
    if not len(x_ND):
        return x_ND[:, :1].expand(0, w_down_EOH.shape[1])
    rows = []
    for n, token in enumerate(x_ND):
        total = torch.zeros(w_down_EOH.shape[1], dtype=x_ND.dtype)
        for k, e in enumerate(indices_NK[n].tolist()):
            if e == len(w_up_EPD):
                continue
            pre = w_up_EPD[e] @ token + (0 if b_up_EP is None else b_up_EP[e])
            if activation in halves:
                half = len(pre) // 2
                h = plain[halves[activation]](pre[:half]) * pre[half:]
            else:
                h = activation(pre) if callable(activation) else plain[activation](pre)
            total = total + weights_NK[n, k] * (w_down_EOH[e] @ h + (0 if b_down_EO is None else b_down_EO[e]))
        rows.append(total)
    return torch.stack(rows)


def with_gradients(function: Callable[..., Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {
        name: tensor.detach().clone().requires_grad_() if tensor.is_floating_point() else tensor
        for name, tensor in inputs.items()
    }
    out = function(**leaves)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view_as(out)).sum().backward()
    grads = {name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in leaves.items() if t.requires_grad}
    return {"out": out.detach()} | grads


def on_device(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: t.to(DEVICE, dtype if t.is_floating_point() else t.dtype) for name, t in inputs.items()}


def close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = float(tensor.abs().max()) if tensor.numel() else 1.0
        torch.testing.assert_close(
            found[name].double().cpu(),
            tensor,
            rtol=0,
            atol=tolerance * max(scale, 1e-30),
            msg=lambda m, n=name: f"{n}: {m}",
        )
