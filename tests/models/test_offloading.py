"""Weights that stay on disk: the same numbers, two experts and one head in memory at most, and clear errors.

What is computed from copies of the weights is compared within rounding: on processors without AVX-512 a product's last
bit depends on where in memory its operands begin.
"""

import copy
import itertools
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from moe_mtl.files import CheckpointError
from moe_mtl.layers import streaming
from moe_mtl.layers.streaming import ExpertStream, Streamed, StreamedExperts, StreamedHeads
from moe_mtl.models import AutoModelForMultiTask
from moe_mtl.models._vision import VisionModel
from moe_mtl.models.m3vit import M3ViTConfig, M3ViTForMultiTask
from moe_mtl.models.mod_squad import ModSquadConfig, ModSquadForMultiTask
from moe_mtl.models.vit import MultiTaskViT, MultiTaskViTConfig
from moe_mtl.pathway import cost, prune
from moe_mtl.stored import StoredTensor

SIZES: dict[str, Any] = {
    "image_size": [16, 24],
    "patch_size": 8,
    "hidden_size": 12,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "decoder_dim": 6,
    "decoder_stages": 2,
    "initializer_range": 0.3,
    "tasks": [
        {"name": "parts", "kind": "segmentation", "num_outputs": 4},
        {"name": "scene", "kind": "multiclass", "num_outputs": 3},
    ],
}
E, H, D = 6, 10, 12
EXPERTS = {"num_experts": E, "num_selected": 2, "expert_dim": H}
HEADS = {"attention_experts": 5, "attention_selected": 3, "attention_head_dim": 8}
KINDS = ["m3vit", "mod_squad"]


def build(kind: str = "m3vit", **fields: Any) -> VisionModel:
    torch.manual_seed(0)
    model: VisionModel
    if kind == "m3vit":
        model = M3ViTForMultiTask(M3ViTConfig(**(SIZES | EXPERTS | fields)))
    else:
        model = ModSquadForMultiTask(ModSquadConfig(**(SIZES | EXPERTS | HEADS | {"zero_start": False} | fields)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("b_up", "b_down")):
                parameter.normal_()
    return model.eval()


def plain(model: Any) -> Any:
    """Its experts as the equation is written."""
    for module in model.modules():
        if hasattr(module, "backend"):
            module.backend = "torch"
    return model


def images(rows: int = 3) -> Tensor:
    return torch.randn(rows, 3, 16, 24, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(tmp_path: Path, kind: str) -> Path:
    build(kind).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("m3vit", {}),
        ("m3vit", {"gate": "task_conditioned"}),
        ("m3vit", {"experts_kept": {"3": [0, 2, 5]}}),
        ("mod_squad", {}),
        ("mod_squad", {"experts_kept": {"2": [0, 2, 3], "3": [1, 4]}}),
    ],
)
@pytest.mark.parametrize("tasks", [None, ["scene"], ["parts"]])
@pytest.mark.parametrize("shard", ["5GB", "4KB"])
def test_offloaded_experts_give_the_same_numbers(
    tmp_path: Path, kind: str, fields: dict[str, Any], tasks: Any, shard: str
) -> None:
    model = plain(build(kind, **fields))
    model.save_pretrained(tmp_path, max_shard_size=shard)
    offloaded = AutoModelForMultiTask.from_pretrained(tmp_path, offload_experts=True, tasks=tasks)
    for _ in range(2):
        with torch.inference_mode():
            found = offloaded(images()).logits
    found_again = offloaded(images()).logits  # a gradient could be recorded here, were anything trainable
    expected = model(images(), tasks=tasks).logits
    assert_close(dict(found), dict(expected))
    assert_close(dict(found_again), dict(expected))
    assert offloaded.config.name_or_path == str(tmp_path)
    assert not offloaded.training
    assert not any(parameter.requires_grad for parameter in offloaded.parameters())


def test_of_pruned_experts_too(tmp_path: Path, kind: str) -> None:
    pruned, report = prune(build(kind), ["parts", "scene"], [{"pixel_values": images()}], keep=0.7)
    assert any(len(kept) < report.stored[layer] for layer, kept in report.kept.items())
    pruned.save_pretrained(tmp_path)
    offloaded = AutoModelForMultiTask.from_pretrained(tmp_path, offload_experts=True)
    assert_close(dict(offloaded(images()).logits), dict(plain(pruned)(images()).logits))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_in_another_dtype(folder: Path, dtype: torch.dtype) -> None:
    model = plain(AutoModelForMultiTask.from_pretrained(folder, dtype=dtype))
    offloaded = AutoModelForMultiTask.from_pretrained(folder, offload_experts=True, dtype=dtype)
    found, expected = offloaded(images().to(dtype)).logits, model(images().to(dtype)).logits
    assert {logits.dtype for logits in found.values()} == {dtype}
    assert_close(dict(found), dict(expected))


def test_with_autocast(folder: Path) -> None:
    model = plain(AutoModelForMultiTask.from_pretrained(folder))
    offloaded = AutoModelForMultiTask.from_pretrained(folder, offload_experts=True)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        found, expected = offloaded(images()).logits, model(images()).logits
    assert {logits.dtype for logits in found.values()} == {torch.bfloat16}
    assert_close(dict(found), dict(expected), rtol=0.02, atol=0.02)


def test_two_experts_are_held_at_most(folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that enter products lie in two places; an expert is read while the one before it is computed."""
    offloaded = AutoModelForMultiTask.from_pretrained(folder, offload_experts=True)
    assert not [name for name in offloaded.state_dict() if ".experts." in name]
    layers = [type(module) for module in offloaded.modules() if isinstance(module, Streamed)]
    alike = [StreamedHeads, StreamedExperts] if kind == "mod_squad" else [StreamedExperts]
    assert layers == alike * 2
    events: list[tuple[str, int]] = []
    fill, done = ExpertStream._fill, ExpertStream.done

    def filled(self: ExpertStream, slot: Any, read: Any) -> Any:
        fill(self, slot, read)
        events.append(("read", slot.device.data_ptr()))
        return slot

    def used(self: ExpertStream, slot: Any) -> None:
        events.append(("used", slot.device.data_ptr()))
        done(self, slot)

    monkeypatch.setattr(ExpertStream, "_fill", filled)
    monkeypatch.setattr(ExpertStream, "done", used)
    offloaded(images())
    streams = {module.stream for module in offloaded.modules() if isinstance(module, Streamed)}
    assert len(streams) == 1  # all layers share it
    slots = next(iter(streams)).slots
    assert sum(slot.host.numel() for slot in slots) == 2 * (512 + 64 + 512 + 48)  # padded to 64 bytes
    places = {slot.device.data_ptr() for slot in slots}
    assert {place for _, place in events} == places
    held: set[int] = set()
    for what, place in events:
        if what == "read":
            assert place not in held, "an expert was written over that was still to be computed"
            held.add(place)
        else:
            held.remove(place)
    assert not held
    heads = 2 * HEADS["attention_experts"] if kind == "mod_squad" else 0  # of each head first the query
    assert sum(what == "read" for what, _ in events) <= 2 * (E + heads)


def test_only_experts_with_tokens_are_read(folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    offloaded = AutoModelForMultiTask.from_pretrained(folder, offload_experts=True)
    read: list[tuple[str, int]] = []
    original = StoredTensor.read_row

    def spy(self: StoredTensor, row: int, into: Tensor) -> None:
        read.append((self.name, row))
        original(self, row, into)

    monkeypatch.setattr(StoredTensor, "read_row", spy)
    with torch.no_grad():
        for name, parameter in offloaded.named_parameters():
            if ".gates." in name:
                parameter.zero_()  # equal probabilities: the first experts
    offloaded(images())
    read = [(name, row) for name, row in read if ".experts." in name]
    mlp = [(f"blocks.{b}.mlp.experts.{n}", e) for b in (1, 3) for e in range(2) for n in StreamedExperts.passes[0]]
    heads = [(f"blocks.{b}.attention.experts.{n}", e) for b in (0, 2) for e in range(3) for n in ("w_query", "w_out")]
    assert sorted(read) == sorted(mlp + (heads if kind == "mod_squad" else []))


@pytest.mark.parametrize("asked", [["parts"], ["scene"], ["scene", "parts"]])
def test_only_heads_of_asked_tasks_are_read(folder: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    offloaded = AutoModelForMultiTask.from_pretrained(folder, offload_experts=True)
    assert not [name for name in offloaded.state_dict() if name.startswith("heads.")]
    read: list[str] = []
    original = StoredTensor.read

    def spy(self: StoredTensor, rows: Any = None) -> Tensor:
        read.append(self.name)
        return original(self, rows)

    monkeypatch.setattr(StoredTensor, "read", spy)
    offloaded(images(), tasks=asked)
    heads = [name for name in build().state_dict() if name.startswith("heads.")]
    assert set(read) == {name for name in heads if name.split(".")[1] in asked}
    first = list(read)
    offloaded(images(), tasks=asked)
    assert read == first * 2  # nothing of the first call was left
    assert all(t.is_meta for head in offloaded.heads.values() for t in head._bare[0].state_dict().values())


def test_a_head_notices_that_its_file_changed(folder: Path) -> None:
    heads = AutoModelForMultiTask.from_pretrained(folder, offload_experts=True).heads
    x_BLD = torch.randn(1, 7, D)
    assert heads["parts"](x_BLD).shape == (1, 4, 16, 24)
    os.utime(folder / "model.safetensors", ns=(1, 1))
    with pytest.raises(CheckpointError, match="changed while its weights were in use"):
        heads["parts"](x_BLD)


@pytest.mark.parametrize("name", ["heads.parts.out.weight", "blocks.0.mlp.up.weight"])
def test_integers_for_weights_are_refused_before_any_call(folder: Path, name: str) -> None:
    state = load_file(folder / "model.safetensors")
    save_file(state | {name: state[name].long()}, folder / "model.safetensors", metadata={"format": "pt"})
    message = f"expected {name} as floating-point numbers, found torch.int64"
    with pytest.raises(CheckpointError, match=message):
        AutoModelForMultiTask.from_pretrained(folder, offload_experts=True)


def test_the_only_head_is_held(folder: Path) -> None:
    alone = AutoModelForMultiTask.from_pretrained(folder, offload_experts=True, tasks="parts")
    assert {name.split(".")[1] for name in alone.state_dict() if name.startswith("heads.")} == {"parts"}


def test_a_file_that_changes_or_goes_is_noticed(folder: Path, kind: str) -> None:
    weights = folder / "model.safetensors"
    for harm, message in (
        (lambda: os.utime(weights, ns=(1, 1)), "changed while its weights were in use"),
        (lambda: shutil.copy(weights, folder / "copy") and os.replace(folder / "copy", weights), "changed while"),
        (lambda: os.truncate(weights, weights.stat().st_size // 2), "changed while"),
        (lambda: weights.unlink(), "was removed while its weights were in use; load the model anew"),
    ):
        build(kind).save_pretrained(folder)
        offloaded = AutoModelForMultiTask.from_pretrained(folder, offload_experts=True)
        before = offloaded(images()).logits["parts"]
        harm()
        for _ in range(2):  # the first failure leaves nothing locked
            with pytest.raises(CheckpointError, match=message):
                offloaded(images())
        build(kind).save_pretrained(folder)
        anew = AutoModelForMultiTask.from_pretrained(folder, offload_experts=True)
        assert anew(images()).logits["parts"].equal(before)


def test_values_are_checked(tmp_path: Path) -> None:
    experts = [f"blocks.2.attention.experts.{name}" for name in ("w_query", "w_out")]
    for name in ("blocks.1.mlp.experts.w_down", "blocks.0.mlp.up.weight", "heads.parts.out.bias", *experts):
        model = build("mod_squad")
        with torch.no_grad():
            model.get_parameter(name).view(-1)[-1] = torch.nan
        model.save_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match=f"NaN or infinite values in {name}"):
            AutoModelForMultiTask.from_pretrained(tmp_path, offload_experts=True)


def test_what_needs_the_experts_is_refused(folder: Path, tmp_path: Path) -> None:
    offloaded = AutoModelForMultiTask.from_pretrained(folder, offload_experts=True)
    with pytest.raises(ValueError, match="extract_task: expected a model that holds its experts"):
        offloaded.extract_task("parts")
    with pytest.raises(ValueError, match="found one that was loaded with offload_experts"):
        cost(offloaded)
    with pytest.raises(ValueError, match="save_pretrained: expected a model that holds its experts"):
        offloaded.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(RuntimeError, match="offloaded experts cannot be trained"):
        offloaded.train()(images())
    with pytest.raises(RuntimeError, match="offloaded experts cannot be trained"):
        offloaded.eval()(images().requires_grad_())


@pytest.mark.parametrize("given", [{"state_dict": {}}, {"ignore_mismatched_sizes": True}, {"device_map": "cpu"}])
def test_options_that_contradict_offloading(folder: Path, given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="offload_experts: expected"):
        AutoModelForMultiTask.from_pretrained(folder, offload_experts=True, **given)


def test_a_model_without_experts_has_none_to_leave_on_disk(tmp_path: Path) -> None:
    MultiTaskViT(MultiTaskViTConfig(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected a model with sparse experts, found MultiTaskViT without"):
        AutoModelForMultiTask.from_pretrained(tmp_path, offload_experts=True)


def test_a_copy_has_slots_of_its_own(folder: Path) -> None:
    offloaded = AutoModelForMultiTask.from_pretrained(folder, offload_experts=True)
    expected = offloaded(images()).logits["parts"]
    other = copy.deepcopy(offloaded)
    assert other(images()).logits["parts"].equal(expected)
    mine, others = (
        next(module for module in model.modules() if isinstance(module, Streamed)).stream.slots
        for model in (offloaded, other)
    )
    assert not {slot.host.data_ptr() for slot in mine} & {slot.host.data_ptr() for slot in others}


def test_threads_take_turns(folder: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    offloaded = AutoModelForMultiTask.from_pretrained(folder, offload_experts=True)
    calls = [(images() * scale, task) for scale, task in zip((0.5, 1.0, 2.0, 4.0), ("parts", "scene") * 2, strict=True)]

    def answer(call: tuple[Tensor, str]) -> Tensor:
        x, task = call
        return offloaded(x, tasks=[task]).logits[task]

    expected = [answer(call) for call in calls]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            found = list(pool.map(answer, calls))
            assert all(a.equal(b) for a, b in zip(found, expected, strict=True))


def test_tensors_of_an_expert_do_not_overlap() -> None:
    state = (0, 0, 0, 0)
    stored = {
        name: StoredTensor(name, Path("none"), 0, shape, torch.float32, state)
        for name, shape in (("w_up", (E, H, D)), ("b_up", (E, H)), ("w_down", (E, D, H)), ("b_down", (E, D)))
    }
    found = list(streaming.places(stored, StreamedExperts.passes[0]).values())
    assert all(start % 64 == 0 for start, _ in found)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(found))
    assert [stop - start for start, stop in found] == [4 * H * D, 4 * H, 4 * H * D, 4 * D]
    assert StreamedExperts.slot_bytes(stored) == found[-1][1]


def test_a_slot_holds_one_tensor_of_a_head() -> None:
    """What a pass does not need is not read."""
    state = (0, 0, 0, 0)
    stored = {
        name: StoredTensor(name, Path("none"), 0, shape, torch.float32, state)
        for name, shape in (("w_query", (E, H, D)), ("w_out", (E, D, H)))
    }
    assert StreamedHeads.slot_bytes(stored) == 4 * H * D
