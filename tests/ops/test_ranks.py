"""Rank experts against the equation, token by token in float64: values and every gradient, in each backend."""

import importlib.util
import json
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_mtl.bench import ranks as bench
from moe_mtl.ops import experts, ranks
from moe_mtl.ops.ranks import rank_experts

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
BACKENDS = ["torch", pytest.param("triton", marks=needs_triton)]
# tokens, width, outputs, ranks, chosen: primes, one of everything, none, more than a tile, all chosen
SHAPES = [(7, 97, 47, 5, 2), (1, 8, 8, 1, 1), (0, 8, 6, 5, 2), (35, 40, 24, 32, 8), (7, 16, 24, 8, 8)]
KINDS: dict[str, dict] = {
    "lora": {},
    "gate": {"gate": True},
    "smora": {"gate": True, "chosen": True, "bias": True},
    "renormalised": {"gate": True, "chosen": True, "renormalise": True},
    "flylora": {"chosen": True, "bias": True},
    "no bias": {"chosen": True},
    "mix": {"mix": True},
    "all": {"mix": True, "gate": True, "chosen": True, "bias": True, "renormalise": True},
}
LEAVES = ("x_ND", "a_RD", "b_OP", "base_NO", "gate_NP", "mix_TPR")


def make(shape: tuple[int, ...], kind: str, based: bool = True, wider: int = 0) -> dict:
    tokens, width, outputs, rank, chosen = shape
    parts = KINDS[kind]
    g = torch.Generator().manual_seed(tokens + 7 * width)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64)

    wide = rank + wider if parts.get("mix") else rank
    return {
        "x_ND": draw(tokens, width),
        "a_RD": draw(rank, width) / width**0.5,
        "b_OP": draw(outputs, wide),
        "base_NO": draw(tokens, outputs) if based else None,
        "scale": 0.7,
        "gate_NP": draw(tokens, wide).softmax(-1) if parts.get("gate") else None,
        "num_selected": chosen if parts.get("chosen") else None,
        "bias_P": 0.1 * draw(wide) if parts.get("bias") else None,
        "renormalise": parts.get("renormalise", False),
        "mix_TPR": draw(3, wide, rank) / rank**0.5 if parts.get("mix") else None,
        "tasks_G": torch.randint(3, (tokens,), generator=g) if parts.get("mix") else None,
    }


def equation(x_ND, a_RD, b_OP, base_NO, scale, gate_NP, num_selected, bias_P, renormalise, mix_TPR, tasks_G) -> Tensor:
    if not len(x_ND):
        return x_ND[:, :1].expand(0, len(b_OP))
    rows = []
    for n, token in enumerate(x_ND):
        u = a_RD @ token
        if mix_TPR is not None:
            u = mix_TPR[tasks_G[n]] @ u
        chosen = range(len(u))
        if num_selected is not None:
            key = u.abs() if gate_NP is None else gate_NP[n]
            key = (key if bias_P is None else key + bias_P).tolist()
            chosen = sorted(chosen, key=lambda p: (-key[p], p))[:num_selected]
        total = sum(gate_NP[n, p] for p in chosen) if renormalise else 1
        y = torch.zeros(len(b_OP), dtype=x_ND.dtype) if base_NO is None else base_NO[n]
        for p in chosen:
            y = y + scale * (1 if gate_NP is None else gate_NP[n, p] / total) * u[p] * b_OP[:, p]
        rows.append(y)
    return torch.stack(rows)


def run(function: Callable[..., Tensor], inputs: dict, device: str = "cpu") -> dict[str, Tensor]:
    """The output, and the gradient of every leaf that there is."""
    given = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    leaves = {name: given[name].detach().clone().requires_grad_() for name in LEAVES if given[name] is not None}
    out = function(**given | leaves)
    seen = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out)
    grads = torch.autograd.grad(out, list(leaves.values()), seen, allow_unused=True)
    found = {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }
    return {"out": out.detach(), **found}


def close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = max(float(tensor.abs().max()), 1e-30) if tensor.numel() else 1.0
        torch.testing.assert_close(
            found[name].double().cpu(), tensor, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def cast(inputs: dict, dtype: torch.dtype) -> dict:
    return {n: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in inputs.items()}


def with_backend(backend: str) -> Callable[..., Tensor]:
    return lambda **inputs: rank_experts(**inputs, backend=backend)


def device(backend: str) -> str:
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)],
    ids=["float64", "float32", "bfloat16", "float16"],
)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_equation(backend: str, dtype: torch.dtype, tolerance: float, shape: tuple[int, ...], kind: str) -> None:
    if (backend, dtype) == ("triton", torch.float64):
        pytest.skip("refused")
    inputs = cast(make(shape, kind), dtype)
    expected = run(equation, cast(inputs, torch.float64))
    found = run(with_backend(backend), inputs, device(backend))
    assert all(tensor.dtype == dtype for tensor in found.values())
    close(found, expected, tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["mix", "all"])
def test_mix_makes_more_ranks(backend: str, kind: str) -> None:
    inputs = cast(make((9, 12, 10, 4, 3), kind, based=False, wider=14), torch.float32)
    close(run(with_backend(backend), inputs, device(backend)), run(equation, cast(inputs, torch.float64)), 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_narrow_parameters_in_float32(backend: str) -> None:
    """As PEFT holds them beside a half-precision base: the small side is cast, gate and mix stay exact."""
    inputs = make((9, 24, 10, 4, 2), "all")
    inputs = cast(inputs, torch.float32) | {name: inputs[name].bfloat16() for name in ("x_ND", "base_NO")}
    found = run(with_backend(backend), inputs, device(backend))
    assert found["out"].dtype == torch.bfloat16
    assert all(found[name].dtype == torch.float32 for name in ("a_RD", "b_OP", "gate_NP", "mix_TPR"))
    close(found, run(equation, cast(inputs, torch.float64)), 2e-2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["smora", "flylora"])
def test_of_equals_the_lower_rank(backend: str, kind: str) -> None:
    """Few distinct values, of both signs: ties at the border of most rows' choice, 0.0 and -0.0 among them."""
    g = torch.Generator().manual_seed(0)
    values = torch.tensor([-3.0, -2.0, -1.0, -0.0, 0.0, 1.0])
    inputs = make((40, 12, 6, 12, 5), kind)
    inputs = cast(inputs, torch.float32) | {
        "x_ND": values[torch.randint(6, (40, 12), generator=g)],
        "a_RD": torch.eye(12),
        "bias_P": values[torch.randint(6, (12,), generator=g)] if kind == "flylora" else None,
    }
    if kind == "smora":
        inputs["gate_NP"] = values[torch.randint(6, (40, 12), generator=g)]
    close(run(with_backend(backend), inputs, device(backend)), run(equation, cast(inputs, torch.float64)), 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_unchosen_weights_get_no_gradient(backend: str) -> None:
    inputs = cast(make((9, 12, 6, 8, 3), "smora"), torch.float32)
    dgate_NP = run(with_backend(backend), inputs, device(backend))["gate_NP"]
    assert (dgate_NP != 0).sum(-1).tolist() == [3] * 9


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["lora", "flylora", "smora"])
def test_not_a_number_stays_visible(backend: str, kind: str) -> None:
    inputs = cast(make((3, 12, 6, 8, 3), kind), torch.float32)
    inputs["x_ND"][1, 5] = torch.nan
    out_NO = run(with_backend(backend), inputs, device(backend))["out"]
    assert out_NO.isnan().any(-1).tolist() == [False, True, False]


def test_gradcheck() -> None:
    for kind in KINDS:
        for based in (True, False):
            inputs = make((4, 5, 3, 4, 2), kind, based)
            names = [name for name in LEAVES if inputs[name] is not None]

            def call(*leaves: Tensor, given: dict = inputs, names: list[str] = names) -> Tensor:
                return rank_experts(**given | dict(zip(names, leaves, strict=True)), backend="torch")

            assert torch.autograd.gradcheck(call, [inputs[name].requires_grad_() for name in names]), kind


def test_stacks_hold_the_methods() -> None:
    """MTL-LoRA and HydraLoRA, written as they stand, are one call over stacked matrices."""
    tokens, width, outputs, rank, copies, tasks = 6, 7, 5, 3, 2, 4
    torch.manual_seed(0)
    x_ND, a_RD = torch.randn(tokens, width).double(), torch.randn(rank, width).double()
    b_COR = torch.randn(copies, outputs, rank).double()
    stacked_OP = b_COR.permute(1, 0, 2).flatten(1)
    tasks_G = torch.tensor([0, 3, 1, 2, 0, 1])

    lambda_TRR, w_TC = torch.randn(tasks, rank, rank).double(), torch.randn(tasks, copies).double().softmax(-1)
    expected = torch.stack(
        [
            sum(w_TC[t, c] * b_COR[c] @ lambda_TRR[t] @ a_RD @ x for c in range(copies))
            for x, t in zip(x_ND, tasks_G, strict=True)
        ]
    )
    mix_TPR = (w_TC[:, :, None, None] * lambda_TRR[:, None]).flatten(1, 2)
    torch.testing.assert_close(rank_experts(x_ND, a_RD, stacked_OP, mix_TPR=mix_TPR, tasks_G=tasks_G), expected)

    gate_NC = torch.randn(tokens, copies).double().softmax(-1)
    expected = torch.stack(
        [sum(w[c] * b_COR[c] @ a_RD @ x for c in range(copies)) for x, w in zip(x_ND, gate_NC, strict=True)]
    )
    identities = torch.eye(rank).double().repeat(1, copies, 1)
    found = rank_experts(
        x_ND,
        a_RD,
        stacked_OP,
        gate_NP=gate_NC.repeat_interleave(rank, 1),
        mix_TPR=identities,
        tasks_G=torch.zeros_like(tasks_G),
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["lora", "smora", "flylora", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_kept_only_for_a_trained_down_projection(backend: str, kind: str, dtype: torch.dtype) -> None:
    tokens, width, outputs, rank = 64, 64, 64, 4
    inputs = cast(make((tokens, width, outputs, rank, 2), kind), dtype)
    inputs = {n: v.to(device(backend)) if isinstance(v, Tensor) else v for n, v in inputs.items()}
    inputs["b_OP"].requires_grad_()
    given = {v.data_ptr() for n, v in inputs.items() if isinstance(v, Tensor) and n != "x_ND"}

    def kept(**changes: Tensor) -> tuple[int, bool]:
        """Bytes that backward keeps and nobody else holds; and whether it keeps the tokens."""
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            rank_experts(**inputs | changes, backend=backend)
        tokens_at = inputs["x_ND"].data_ptr()
        own = [t for t in saved if t.numel() and t.data_ptr() not in given | {tokens_at}]
        return sum(t.nbytes for t in own), any(t.numel() and t.data_ptr() == tokens_at for t in saved)

    small = tokens * rank * (4 + (inputs["num_selected"] is not None))  # float32, and a byte per choice
    assert kept() == (small, False)
    assert kept(x_ND=inputs["x_ND"].detach().requires_grad_()) == (small, False)
    assert kept(a_RD=inputs["a_RD"].detach().clone().requires_grad_())[1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_base_is_not_written_to(backend: str) -> None:
    inputs = cast(make((9, 12, 6, 4, 2), "lora"), torch.float32)
    inputs = {n: v.to(device(backend)) if isinstance(v, Tensor) else v for n, v in inputs.items()}
    before = inputs["base_NO"].clone()
    out_NO = rank_experts(**inputs, backend=backend)
    assert out_NO.data_ptr() != inputs["base_NO"].data_ptr()
    assert torch.equal(inputs["base_NO"], before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend: str) -> None:
    inputs = cast(make((9, 12, 6, 4, 2), "all"), torch.float32)
    turned = {n: v.t().contiguous().t() if isinstance(v, Tensor) and v.dim() == 2 else v for n, v in inputs.items()}
    assert not turned["x_ND"].is_contiguous()
    at = device(backend)
    close(
        run(with_backend(backend), turned, at),
        {n: t.double().cpu() for n, t in run(with_backend(backend), inputs, at).items()},
        1e-6,
    )


@pytest.mark.parametrize("kind", ["lora", "smora", "flylora", "all"])
@pytest.mark.parametrize("frozen", [False, True])
def test_compiles_to_one_graph(kind: str, frozen: bool) -> None:
    inputs = cast(make((9, 12, 6, 4, 2), kind), torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(with_backend("torch"), fullgraph=True, backend="aot_eager")

    def call(**given: Tensor) -> Tensor:
        return compiled(**given | ({"a_RD": inputs["a_RD"]} if frozen else {}))

    expected = run(with_backend("torch"), inputs)
    if frozen:
        expected["a_RD"].zero_()
    close(run(call, inputs), {name: tensor.double() for name, tensor in expected.items()}, 1e-6)


def test_inductor_takes_the_graph() -> None:
    inputs = cast(make((9, 12, 6, 4, 2), "smora"), torch.float32)
    torch.compiler.reset()
    found = run(torch.compile(with_backend("torch"), fullgraph=True), inputs)
    close(found, run(equation, cast(inputs, torch.float64)), 1e-5)


class Adapter(torch.nn.Module):
    def __init__(self, inputs: dict) -> None:
        super().__init__()
        self.a_RD, self.b_OP = torch.nn.Parameter(inputs["a_RD"]), torch.nn.Parameter(inputs["b_OP"])

    def forward(self, x_ND: Tensor, base_NO: Tensor) -> Tensor:
        return rank_experts(x_ND, self.a_RD, self.b_OP, base_NO, num_selected=2)


def test_exports_with_any_number_of_tokens() -> None:
    inputs = cast(make((9, 12, 6, 4, 2), "lora"), torch.float32)
    module = Adapter(inputs)
    tokens = torch.export.Dim("tokens")
    program = torch.export.export(
        module, (inputs["x_ND"], inputs["base_NO"]), dynamic_shapes=({0: tokens}, {0: tokens})
    )
    assert "moe_mtl" not in str(program.graph)  # runs where this library is not installed
    for number in (2, 33):
        x_ND, base_NO = torch.randn(number, 12), torch.randn(number, 6)
        torch.testing.assert_close(program.module()(x_ND, base_NO), module(x_ND, base_NO))


@needs_triton
@pytest.mark.parametrize("kind", ["lora", "all"])
def test_kernels_stay_whole_in_a_graph(kind: str) -> None:
    inputs = cast(make((9, 12, 6, 4, 2), kind), torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(with_backend("triton"), fullgraph=True, backend="aot_eager")
    at = device("triton")
    expected = run(with_backend("triton"), inputs, at)
    close(run(compiled, inputs, at), {name: tensor.double().cpu() for name, tensor in expected.items()}, 1e-6)


@needs_triton
@pytest.mark.parametrize("kind", ["lora", "all"])
def test_kernels_give_what_tracing_expects(kind: str) -> None:
    given = make((9, 12, 6, 4, 2), kind, wider=3)
    at = device("triton")
    x, a, b, base, gate, mix, bias, tasks = (
        None if given[name] is None else given[name].to(at)
        for name in ("x_ND", "a_RD", "b_OP", "base_NO", "gate_NP", "mix_TPR", "bias_P", "tasks_G")
    )
    x, a, b, base = (tensor.bfloat16() for tensor in (x, a, b, base))
    number, renormalise = given["num_selected"] or 0, given["renormalise"]
    checks = {"test_utils": ("test_schema", "test_faketensor")}
    down = (x, a, gate, mix, bias, tasks, 0.7, number, renormalise)
    torch.library.opcheck(ranks._down_triton, down, **checks)
    _, z, chosen = ranks._down_triton(*down)
    torch.library.opcheck(ranks._up_triton, (z, b, base), **checks)
    back = (base, b, z.float(), gate, chosen, 0.7, number > 0, renormalise)
    torch.library.opcheck(ranks._back_triton, back, **checks)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inside", [False, True])
def test_autocast(backend: str, inside: bool) -> None:
    inputs = cast(make((9, 12, 6, 4, 2), "all"), torch.float32)
    at = device(backend)
    inputs = {n: v.to(at) if isinstance(v, Tensor) else v for n, v in inputs.items()}
    leaves = {name: inputs[name].requires_grad_() for name in LEAVES}
    with torch.autocast(at, torch.bfloat16):
        out_NO = rank_experts(**inputs, backend=backend)
        if inside:
            out_NO.float().sum().backward()
    if not inside:
        out_NO.float().sum().backward()
    assert out_NO.dtype == torch.bfloat16
    assert all(leaf.grad is not None and leaf.grad.dtype == torch.float32 for leaf in leaves.values())
    exact = cast({n: v.detach().cpu() if isinstance(v, Tensor) else v for n, v in inputs.items()}, torch.float64)
    close({"out": out_NO.detach()}, {"out": equation(**exact)}, 2e-2)


@pytest.mark.parametrize("task", [-1, 3])
@pytest.mark.parametrize("runs", [9, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_unknown_task_is_an_error(backend: str, runs: int, task: int) -> None:
    if device(backend) == "cuda":
        pytest.skip("an assertion of the device ends the process")
    inputs = cast(make((9, 12, 6, 4, 2), "mix"), torch.float32)
    inputs["tasks_G"] = inputs["tasks_G"][:runs]
    inputs["tasks_G"][2] = task
    with pytest.raises((RuntimeError, IndexError)):
        rank_experts(**inputs, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("runs", "tasks"), [(12, 3), (12, 40), (4, 3), (4, 40), (1, 3)])
def test_tasks_of_tokens_and_of_runs_of_tokens(backend: str, runs: int, tasks: int) -> None:
    """A column per task, a matrix per token, a matrix per run."""
    inputs = make((12, 10, 6, 4, 2), "all")
    g = torch.Generator().manual_seed(3)
    inputs["mix_TPR"] = torch.randn(tasks, *inputs["mix_TPR"].shape[1:], generator=g).double()
    tasks_G = torch.randint(tasks, (runs,), generator=g)
    expected = run(equation, inputs | {"tasks_G": tasks_G.repeat_interleave(12 // runs)})
    found = run(with_backend(backend), cast(inputs, torch.float32) | {"tasks_G": tasks_G}, device(backend))
    close(found, expected, 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_how_often_each_rank_was_chosen_is_counted(backend: str) -> None:
    inputs = make((9, 12, 6, 4, 2), "flylora")
    keys_NP = (inputs["x_ND"] @ inputs["a_RD"].t()).abs() + inputs["bias_P"]
    chosen_S = keys_NP.topk(inputs["num_selected"]).indices.flatten()
    expected = chosen_S.bincount(minlength=4)
    counts_P = torch.ones(4, dtype=torch.int64, device=device(backend))
    given = {n: v.to(device(backend)) if isinstance(v, Tensor) else v for n, v in cast(inputs, torch.float32).items()}
    rank_experts(**given, counts_P=counts_P, backend=backend)
    assert torch.equal(counts_P.cpu(), expected + 1)
    some_M = torch.tensor([7, 0, 4], device=device(backend))
    counts_P.zero_()
    rank_experts(**given, counts_P=counts_P, counted_M=some_M, backend=backend)
    assert torch.equal(counts_P.cpu(), chosen_S.view(9, -1)[[7, 0, 4]].flatten().bincount(minlength=4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_ND": torch.zeros(2, 9, 12)}, r"x: expected \[N, D\] of .*, found \[2, 9, 12\]"),
        ({"x_ND": torch.zeros(9, 12, dtype=torch.int64)}, "x: expected .* found .* of torch.int64"),
        ({"a_RD": torch.zeros(4, 11)}, r"a: expected shape \[R, 12\].*, found \[4, 11\]"),
        ({"a_RD": torch.zeros(0, 12)}, "a: expected shape .* R of 1 at least"),
        ({"b_OP": torch.zeros(6, 5)}, r"b: expected shape \[O, 4\], found \[6, 5\]"),
        ({"base_NO": torch.zeros(9, 7)}, r"base: expected shape \[9, 6\], found \[9, 7\]"),
        ({"gate_NP": torch.zeros(9)}, r"gate: expected shape \[9, 4\], found \[9\]"),
        ({"bias_P": torch.zeros(5)}, r"bias: expected shape \[4\], found \[5\]"),
        ({"mix_TPR": torch.zeros(3, 4, 5)}, r"mix: expected shape \[T, P, 4\], found \[3, 4, 5\]"),
        (
            {"tasks_G": torch.zeros(8, dtype=torch.int64)},
            r"tasks: expected shape \[9\], or of an equal share of it, found \[8\]",
        ),
        ({"tasks_G": None}, "mix, tasks: expected both or neither, found mix alone"),
        ({"mix_TPR": None}, "mix, tasks: expected both or neither, found tasks alone"),
        ({"num_selected": 0}, "num_selected: expected 1 to 4, found 0"),
        ({"num_selected": 5}, "num_selected: expected 1 to 4, found 5"),
        ({"num_selected": None, "renormalise": False}, "bias: expected num_selected beside it"),
        ({"num_selected": None, "bias_P": None}, "renormalise: expected a gate and num_selected"),
        ({"gate_NP": None}, "renormalise: expected a gate and num_selected"),
        ({"a_RD": torch.zeros(4, 12).half()}, "a: expected torch.float32, found torch.float16"),
        ({"base_NO": torch.zeros(9, 6).bfloat16()}, "base: expected torch.float32, found torch.bfloat16"),
        ({"tasks_G": torch.zeros(9, dtype=torch.int32)}, "tasks: expected torch.int64, found torch.int32"),
        ({"b_OP": torch.zeros(6, 4, device="meta")}, "b: expected a tensor on cpu, found one on meta"),
        ({"backend": "cuda"}, "backend: expected torch or triton, found 'cuda'"),
    ],
)
def test_refuses(changes: dict, message: str) -> None:
    inputs = cast(make((9, 12, 6, 4, 2), "all"), torch.float32)
    with pytest.raises(ValueError, match=message):
        rank_experts(**inputs | changes)


@needs_triton
def test_triton_refuses_what_it_cannot_take(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(inputs: dict) -> str:
        with pytest.raises(ValueError, match="backend triton: ") as info:
            rank_experts(**inputs, backend="triton")
        return str(info.value)

    assert "found torch.float64" in refused(make((9, 12, 6, 4, 2), "lora"))
    inputs = cast(make((9, 12, 6, 4, 2), "lora"), torch.float32)
    wide = cast(make((9, 12, 6, 129, 2), "lora"), torch.float32)
    assert "at most 128 ranks, found 129" in refused(wide)
    with monkeypatch.context() as without:
        without.setattr(experts, "HAS_TRITON", False)
        assert "not installed" in refused(inputs)
    monkeypatch.setattr("moe_mtl.ops.triton_launch.INTERPRETED", False)
    assert "needs a CUDA device, found tensors on cpu" in refused(inputs)
    assert torch.equal(rank_experts(**inputs), rank_experts(**inputs, backend="torch"))  # by default, no refusal


def test_is_lora() -> None:
    inputs = cast(make((9, 12, 6, 4, 2), "lora"), torch.float32)
    x_ND, a_RD, b_OP, base_NO = (inputs[name] for name in LEAVES[:4])
    expected = base_NO + 0.7 * F.linear(F.linear(x_ND, a_RD), b_OP)
    torch.testing.assert_close(rank_experts(x_ND, a_RD, b_OP, base_NO, scale=0.7), expected)


@pytest.mark.parametrize("part", ["forward", "full"])
@pytest.mark.parametrize("kind", bench.KINDS)
def test_bench_contenders_agree(part: str, kind: str) -> None:
    calls = bench.contenders(torch.float32, (12, 8, 6, 8, 2), kind, part, bench.Options())
    torch.testing.assert_close(calls[bench.OURS](), calls["unfused"]())


def test_bench_result_and_table(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(bench, "GRID", ((12, 8, 6, 4, 2),))
    options = bench.Options(dtypes=("float32",), shapes=(0,), rounds=1, slice_seconds=0.0, output=str(tmp_path))
    result = bench.main(options)
    assert json.loads((tmp_path / "ranks.json").read_text())["rows"] == result["rows"]
    assert result["rows"][0]["bytes"] == {"floor": 4 * 12 * 20, "moe_mtl": 4 * 12 * 20, "unfused": 4 * 12 * 44}
    assert all(row["results"][bench.OURS]["ratio"] == 1 for row in result["rows"])
    assert "unfused takes" in capsys.readouterr().out


@pytest.mark.parametrize("changes", [{"kinds": ("dora",)}, {"dtypes": ()}, {"parts": ("half",)}, {"shapes": (9,)}])
def test_bench_options(changes: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(changes))}: expected"):
        bench.Options(**changes)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_derivative_is_refused(backend: str) -> None:
    inputs = cast(make((5, 8, 6, 4, 2), "gate"), torch.float32)
    inputs["x_ND"].requires_grad_()
    inputs["a_RD"].requires_grad_()
    out = rank_experts(**inputs, backend=backend)
    (grad,) = torch.autograd.grad(out.square().sum(), inputs["x_ND"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
