"""One task alone, for every model and every task: the same answer, from what the task needs and nothing else."""

import copy
from pathlib import Path

import pytest
import torch
import zoo
from torch import Tensor, nn

from moe_mtl.checkpoint import Checkpoint
from moe_mtl.models import AutoModelForMultiTask, MultiTaskModel, _base
from moe_mtl.tasks import UnknownTaskError

all_variants = pytest.mark.parametrize("variant", zoo.VARIANTS)
all_types = pytest.mark.parametrize("model_type", zoo.MODEL_TYPES)


def poison_the_rest(model: MultiTaskModel, small: MultiTaskModel) -> int:
    """Sets to NaN everything that the small model does not hold; returns how many tensors that were."""
    kept = small.state_dict()
    count = 0
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        rows = model.rows_kept(small.config, name) if name in kept else []
        if rows is not None:
            rest = [row for row in range(len(tensor)) if row not in rows]
            tensor[rest] = float("nan")
            count += bool(rest)
    return count


@all_variants
def test_every_task_alone_answers_like_the_full_model(variant: str) -> None:
    model = zoo.variant_of(variant)
    inputs = zoo.inputs_of(model.config, rows=70)
    whole = model(**inputs).logits
    precise = copy.deepcopy(model).double()
    whole_precise = precise(**inputs).logits
    for task in zoo.TASK_NAMES:
        small = model.extract_task(task)
        assert type(small) is type(model)
        assert task in small.tasks
        assert not small.training
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
        assert torch.equal(small(**inputs).logits[task], whole[task]), task
        assert list(model(**inputs, tasks=[task]).logits) == [task]
        assert torch.equal(model(**inputs, tasks=task).logits[task], whole[task]), task

        poisoned = copy.deepcopy(model)
        assert poison_the_rest(poisoned, small) > 0
        assert torch.equal(poisoned(**inputs, tasks=[task]).logits[task], whole[task]), task
        assert torch.equal(poisoned.extract_task(task)(**inputs).logits[task], whole[task]), task

        assert torch.equal(small.double()(**inputs).logits[task], whole_precise[task]), task


@all_types
def test_a_double_model_extracts_to_a_double_one(model_type: str) -> None:
    model = zoo.model_of(model_type).double()
    small = model.extract_task("badges")
    inputs = zoo.inputs_of(model.config)
    assert {p.dtype for p in small.parameters()} == {torch.float64}
    assert torch.equal(small(**inputs).logits["badges"], model(**inputs).logits["badges"])


@all_variants
def test_several_tasks_and_extraction_from_an_extraction(variant: str) -> None:
    model = zoo.variant_of(variant)
    inputs = zoo.inputs_of(model.config)
    whole = model(**inputs).logits
    pair = model.extract_task(["colour", "view_buy"])
    assert pair.tasks == ["view", "buy", "view_buy", "colour"]  # factors come along, order stays
    for task, logits in pair(**inputs).logits.items():
        assert torch.equal(logits, whole[task]), task
    for task in ("view_buy", "buy", "colour"):
        assert torch.equal(pair.extract_task(task)(**inputs).logits[task], whole[task]), task
        once, twice = model.extract_task(task), pair.extract_task(task)
        assert once.state_dict().keys() == twice.state_dict().keys()
        assert once.config.to_dict() == twice.config.to_dict()
    everything = model.extract_task(zoo.TASK_NAMES)
    assert everything.state_dict().keys() == model.state_dict().keys()


@all_variants
def test_reading_one_task_from_disk_reads_only_that(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = zoo.variant_of(variant)
    model.save_pretrained(tmp_path)
    inputs = zoo.inputs_of(model.config)
    checkpoints: list[Checkpoint] = []

    class Counted(Checkpoint):
        def __init__(self, folder: Path, **options: bool) -> None:
            super().__init__(folder, **options)
            checkpoints.append(self)

    monkeypatch.setattr(_base, "Checkpoint", Counted)
    type(model).from_pretrained(tmp_path)
    everything = checkpoints[-1].bytes_read
    assert everything == sum(t.nbytes for t in model.state_dict().values())
    for task in ("view_buy", "colour"):
        small = AutoModelForMultiTask.from_pretrained(tmp_path, tasks=[task])
        extracted = model.extract_task(task)
        assert small.config.tasks == extracted.config.tasks
        assert small.state_dict().keys() == extracted.state_dict().keys()
        assert torch.equal(small(**inputs).logits[task], model(**inputs).logits[task])
        needed = sum(t.nbytes for t in small.state_dict().values())
        gates = [m for m in model.modules() if type(m).__name__ == "DSelectKGate" and m.static]
        looked_at = sum(p.nbytes for gate in gates for p in gate.parameters())  # to see which experts were chosen
        assert needed <= checkpoints[-1].bytes_read <= needed + looked_at
        assert checkpoints[-1].bytes_read < everything


@all_variants
def test_the_extracted_model_saves_loads_and_learns(variant: str, tmp_path: Path) -> None:
    model = zoo.variant_of(variant)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs, labels = zoo.inputs_of(model.config), zoo.labels_of(model.config)
    small = model.extract_task("buy")
    small.save_pretrained(tmp_path)
    again = AutoModelForMultiTask.from_pretrained(tmp_path)
    assert torch.equal(again(**inputs).logits["buy"], model(**inputs).logits["buy"])

    again.train()
    loss = again(**inputs, labels={"buy": labels["buy"]}).loss  # its space is gone: every labelled row counts
    loss.backward()
    torch.optim.SGD(again.parameters(), lr=0.1).step()
    changed = [name for name, p in again.named_parameters() if not torch.equal(p, small.state_dict()[name])]
    assert any("towers.buy" in name for name in changed)
    for parameter in small.parameters():
        parameter.data.fill_(7.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())  # no memory is shared


@all_variants
def test_task_parameters_are_a_partition_by_who_uses_them(variant: str) -> None:
    model = zoo.variant_of(variant)
    owned = model.task_parameters()
    assert list(owned) == ["shared", *zoo.TASK_NAMES]
    everyone = [id(p) for group in owned.values() for p in group]
    assert sorted(everyone) == sorted(id(p) for p in model.parameters())
    state = copy.deepcopy(model.state_dict())
    inputs = zoo.inputs_of(model.config)
    for task in zoo.TASK_NAMES:
        for parameter in owned[task]:
            nn.init.constant_(parameter, float("nan"))
        for other, logits in model(**inputs).logits.items():
            assert bool(logits.isnan().any()) == (other == task and bool(owned[task])), (task, other)
        model.load_state_dict(state)
    assert owned["colour"]
    assert not owned["view"]  # its tower also makes view_buy
    next(iter(model.towers["colour"].parameters())).requires_grad_(False)
    assert len(model.task_parameters()["colour"]) == len(owned["colour"]) - 1


@all_types
def test_one_task_model_and_unknown_tasks(model_type: str, tmp_path: Path) -> None:
    model = zoo.model_of(model_type, tasks=[{"name": "only", "kind": "binary"}])
    inputs = zoo.inputs_of(model.config)
    small = model.extract_task("only")
    assert small.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(small(**inputs).logits["only"], model(**inputs).logits["only"])
    model.save_pretrained(tmp_path)

    def labels(name: str) -> dict[str, Tensor]:
        return {name: torch.zeros(6)}

    for call in (
        lambda: model(**inputs, tasks=["onyl"]),
        lambda: model(**inputs, labels=labels("onyl")),
        lambda: model(**inputs, labels=labels("only"), sample_weights=labels("onyl")),
        lambda: model.extract_task("onyl"),
        lambda: model.extract_task(["only", "onyl"]),
        lambda: type(model).from_pretrained(tmp_path, tasks=["onyl"]),
    ):
        with pytest.raises(UnknownTaskError, match="unknown task 'onyl'; known tasks: only"):
            call()
    with pytest.raises(ValueError, match="at least one of only, found an empty list"):
        model(**inputs, tasks=[])
