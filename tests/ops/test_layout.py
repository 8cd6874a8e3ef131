"""How rows of experts lie for the products of a CPU: the same numbers in every way, and what each way holds."""

import weakref

import pytest
import torch
from mixture import DEVICE, TOLERANCE, close, equation, make, on_device, with_gradients
from torch import Tensor

from moe_mtl.ops import expert_mlp, grouped, layout, make_plan
from moe_mtl.ops.routing import RoutingPlan


def one_part(plan: RoutingPlan, *_: object, **__: object) -> layout.Layout:
    return layout.in_one_part(plan)


@pytest.mark.parametrize("nobody", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("laid_out", ["slots", "slots, turned", "slots of two parts", "no slots", "one part"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
)
def test_every_layout_of_the_rows(
    nobody: bool,
    biased: bool,
    apart: bool,
    laid_out: str,
    dtype: torch.dtype,
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Widths of 16 bytes, as torch's grouped product wants them, and one more."""
    monkeypatch.setattr(layout, "BYTES", 64 * 16 * dtype.itemsize if laid_out == "slots of two parts" else 2**20)
    monkeypatch.setattr(layout, "FREE_SLOTS", 0 if laid_out == "no slots" else 10**6)
    monkeypatch.setattr(layout, "SLOTS_PER_COPY", 0)
    turned = laid_out == "slots, turned" or dtype != torch.float32  # as a processor with AVX-512, or without
    for module in (layout, grouped):
        monkeypatch.setattr(module, "batches_turned", lambda dtype: turned)
    monkeypatch.setattr(layout, "is_emulated", lambda dtype: False)
    if laid_out == "one part":
        monkeypatch.setattr(grouped, "lay_out", one_part)
    for width, hidden in ((16, 8), (5, 3)):
        inputs = make(40, width, hidden, 4, 2, out=width)
        if nobody:
            inputs["indices_NK"][::3, 1] = 4
        if not biased:
            inputs.pop("b_up_EP"), inputs.pop("b_down_EO")
        expected = with_gradients(lambda **t: equation("swiglu", **t), inputs)
        if apart:
            for whole, half in (("w_up_EPD", "w_gate_EHD"), ("b_up_EP", "b_gate_EH")):
                if whole in inputs:
                    inputs[half], inputs[whole] = inputs[whole].chunk(2, dim=1)
                    expected[half], expected[whole] = expected[whole].chunk(2, dim=1)
        parts = grouped.lay_out(make_plan(inputs["indices_NK"], 4), 2 * hidden, dtype).parts
        assert any(part.slots is not None for part in parts) == laid_out.startswith("slots")
        assert (len(parts) > 1) == (laid_out == "slots of two parts" and width == 16)
        found = with_gradients(lambda **t: expert_mlp(**t, backend="grouped"), on_device(inputs, dtype))
        close(found, expected, tolerance)


def test_slots_only_where_they_cost_little() -> None:
    def slots(indices: Tensor, experts: int, width: int = 256) -> list[int | None]:
        return [part.slots for part in layout.lay_out(plan_of(indices, experts), width, torch.float32).parts]

    def plan_of(indices: Tensor, experts: int) -> RoutingPlan:
        return make_plan(indices.view(-1, 1), experts)

    even = torch.arange(4096) % 64
    assert slots(even, 64) == [64, 64]  # two parts of 2,048 rows
    assert slots(even, 64, 128) == [64]
    # All copies to one expert; half of them to one, whose part is its own; nobody here has any.
    assert slots(torch.zeros(4096, dtype=torch.int64), 64) == [None, None]
    assert slots(torch.where(torch.arange(4096) < 2048, 5, even), 64) == [32, None, 32]
    assert slots(torch.full((4096,), 64), 64) == [None]
    # One token in eight experts: slots would read them all.
    assert slots(torch.zeros(1, dtype=torch.int64), 8) == [None]
    assert slots(torch.tensor([0, 1, 2, 3]), 8) == [1]
    assert [part.slots for part in layout.lay_out(plan_of(even, 64), 128, torch.float32, slots=False).parts] == [None]


@pytest.mark.parametrize(
    ("capability", "dtype", "turned", "emulated"),
    [
        ("AVX512", torch.float32, False, False),
        ("AVX2", torch.float32, True, False),
        ("DEFAULT", torch.float32, False, False),
        ("AVX512", torch.bfloat16, True, False),
        ("AVX2", torch.bfloat16, True, True),
        ("AVX2", torch.float64, True, False),
    ],
)
def test_what_is_fast_depends_on_the_processor(
    capability: str, dtype: torch.dtype, turned: bool, emulated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert layout.batches_turned.__wrapped__(dtype) is turned
    assert layout.is_emulated.__wrapped__(dtype) is emulated


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_empty_rows_where_every_row_counts(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = on_device(make(40, 16, 8, 4, 2), dtype)
    counts = make_plan(inputs["indices_NK"], 4).counts_E
    assert counts.unique().numel() > 1  # slots would have empty rows
    rows = []
    product = layout.Part.product
    monkeypatch.setattr(layout.Part, "product", lambda part, x, *rest: rows.append(len(x)) or product(part, x, *rest))
    for emulated, least in ((True, 80), (False, 4 * int(counts.max()))):
        monkeypatch.setattr(layout, "is_emulated", lambda dtype, emulated=emulated: emulated)
        rows.clear()
        with_gradients(lambda **t: expert_mlp(**t, backend="grouped"), inputs)
        assert set(rows) == {least}


@pytest.mark.parametrize("few_last", [False, True])
def test_parts_hold_a_few_neighbours_and_all_rows(few_last: bool) -> None:
    indices_NK = torch.randint(0, 65, (4096, 2), generator=torch.Generator().manual_seed(0))
    plan = make_plan(indices_NK, 64)
    for slots in (True, False):
        rows = layout.lay_out(plan, 1024, torch.float32, slots, few_last)
        assert rows.parts[-1].experts.start >= 56 or not few_last
        assert any(part.experts.stop == 56 for part in rows.parts) or not few_last
        assert sum(part.experts.stop - part.experts.start for part in rows.parts) == 64
        for part in rows.parts:
            copies_C = part.copies_R if part.real_C is None else part.copies_R[part.real_C]
            assert torch.equal(copies_C, plan.order_S[part.copies])
        assert [part.experts.start for part in rows.parts[1:]] == [part.experts.stop for part in rows.parts[:-1]]
        assert [part.rows.start for part in rows.parts[1:]] == [part.rows.stop for part in rows.parts[:-1]]
        assert all(part.rows.stop - part.rows.start <= layout.BYTES // 4096 for part in rows.parts)
        assert len(rows.parts) > 8
        copies_R = torch.cat([part.copies_R for part in rows.parts])
        here_S = indices_NK.flatten() < 64
        position_S = rows.position_NK.flatten()
        assert torch.equal(copies_R[position_S[here_S]], torch.arange(8192)[here_S])
        assert sorted(position_S[~here_S].tolist()) == list(range(rows.num_placed, rows.num_rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_is_given_only_what_its_grouped_product_takes(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A width of one, experts innermost: torch would raise."""
    monkeypatch.setattr(grouped, "lay_out", one_part)
    for width in (1, 8):
        inputs = on_device(make(300, width, 8, 8, 1), dtype)
        inputs["indices_NK"] = torch.zeros(300, 1, dtype=torch.int64, device=DEVICE)
        inputs["w_up_EPD"] = inputs["w_up_EPD"].permute(1, 2, 0).contiguous().permute(2, 0, 1)
        expected = expert_mlp(**inputs, backend="torch")
        found = expert_mlp(**inputs, backend="grouped")
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE[dtype] * float(expected.abs().max()))


def test_what_a_part_makes_is_freed_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    of_tokens = layout.Part.of_tokens
    made: list[tuple[int, weakref.ref[Tensor]]] = []

    def noted(part: layout.Part, x_ND: Tensor) -> Tensor:
        assert not [of for of, tensor in made if of != id(part) and tensor() is not None]
        x_RD = of_tokens(part, x_ND)
        made.append((id(part), weakref.ref(x_RD)))
        return x_RD

    monkeypatch.setattr(layout, "BYTES", 2**11)
    inputs = {n: t.requires_grad_() if t.is_floating_point() else t for n, t in make(64, 16, 24, 4, 2).items()}
    out_NO = expert_mlp(**inputs, backend="grouped")
    made.clear()
    monkeypatch.setattr(layout.Part, "of_tokens", noted)
    out_NO.sum().backward()
    assert len(made) == 8  # tokens and gradients of four parts


def test_the_last_gradient_of_a_part_is_written_where_little_else_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    of_tokens, outer = layout.Part.of_tokens, layout.Part.outer
    made: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []

    def noted(part: layout.Part, x_ND: Tensor) -> Tensor:
        x_RD = of_tokens(part, x_ND)
        made.append(weakref.ref(x_RD))
        return x_RD

    def noted_outer(part: layout.Part, *operands: Tensor) -> None:
        alive.append(made[-2]() is not None)  # the part's tokens; its gradients of outputs were made after them
        outer(part, *operands)

    monkeypatch.setattr(layout, "BYTES", 2**11)
    inputs = {n: t.requires_grad_() if t.is_floating_point() else t for n, t in make(64, 16, 24, 4, 2).items()}
    out_NO = expert_mlp(**inputs, backend="grouped")
    monkeypatch.setattr(layout.Part, "of_tokens", noted)
    monkeypatch.setattr(layout.Part, "outer", noted_outer)
    out_NO.sum().backward()
    assert alive == [True, False] * 4  # of the first layer, of the second
