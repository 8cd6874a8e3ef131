"""What holds for every model of the registry: answers, gradients, files, precision, routing."""

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zoo
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from moe_mtl import AutoModelForMultiTask
from moe_mtl.layers.experts import ExpertBank
from moe_mtl.models import REGISTRY, MultiTaskModel, _tabular
from moe_mtl.outputs import MultiTaskOutput

all_variants = pytest.mark.parametrize("variant", zoo.VARIANTS)
all_types = pytest.mark.parametrize("model_type", zoo.MODEL_TYPES)


def close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert list(got) == list(expected)
    for task, logits in got.items():
        torch.testing.assert_close(
            logits, expected[task], rtol=tolerance, atol=tolerance, msg=lambda m, t=task: f"{t}: {m}"
        )


def same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(got) == list(expected)
    for task, logits in got.items():
        assert torch.equal(logits, expected[task]), task


# --- answers and gradients --------------------------------------------------------------------------------------------


@all_variants
def test_forward_and_backward(variant: str) -> None:
    model = zoo.variant_of(variant).train()
    config = model.config
    out = model(**zoo.inputs_of(config), labels=zoo.labels_of(config))
    assert isinstance(out, MultiTaskOutput)
    assert list(out.logits) == zoo.TASK_NAMES == list(out.task_losses)
    for task in zoo.TASKS:
        assert out.logits[task["name"]].shape == (6, task.get("num_outputs", 1))
    assert out.last_hidden_state.shape[:2] == (6, len(zoo.TOWER_TASKS))
    expected = sum(task.get("weight", 1.0) * out.task_losses[task["name"]] for task in zoo.TASKS)
    if out.auxiliary_loss is not None:
        expected = expected + out.auxiliary_loss
    torch.testing.assert_close(out.loss, expected)
    out.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(torch.isfinite(parameter.grad).all()), name


@all_variants
def test_no_label_at_all_gives_no_gradient(variant: str) -> None:
    model = zoo.variant_of(variant)  # evaluation: no regulariser
    labels = {name: torch.full_like(y, -100 if y.dtype == torch.int64 else math.nan) for name, y in zoo.labels_of(model.config).items()}  # noqa: E501 # fmt: skip
    out = model(**zoo.inputs_of(model.config), labels=labels)
    assert out.loss.item() == 0
    out.loss.backward()
    assert all(bool((p.grad == 0).all()) for p in model.parameters())


@all_types
def test_only_the_labelled_tasks_count(model_type: str) -> None:
    model = zoo.model_of(model_type)
    inputs, labels = zoo.inputs_of(model.config), zoo.labels_of(model.config)
    assert model(**inputs).loss is None
    assert model(**inputs).task_losses is None
    out = model(**inputs, labels={"price": labels["price"]})
    assert list(out.task_losses) == ["price"]
    both = model(**inputs, labels=labels, tasks=["price", "colour"])
    assert list(both.task_losses) == ["price", "colour"]
    torch.testing.assert_close(both.loss, both.task_losses["price"] + 2 * both.task_losses["colour"])
    weighted = model(**inputs, labels=labels, sample_weights={"price": torch.arange(6.0)}, tasks="price")
    plain = (weighted.logits["price"][:5, 0] - labels["price"][:5]) ** 2
    torch.testing.assert_close(weighted.loss, (plain * torch.arange(5.0)).sum() / 10)


@all_types
def test_labels_of_a_space_decide_which_rows_count(model_type: str) -> None:
    model = zoo.model_of(model_type)
    inputs, labels = zoo.inputs_of(model.config), zoo.labels_of(model.config)
    labels["view"] = torch.tensor([1.0, 0, 1, 0, math.nan, 1])
    loss = model(**inputs, labels=labels).task_losses["buy"]
    seen = {name: y[[0, 2]] for name, y in labels.items()}
    again = model(**{name: x[[0, 2]] for name, x in inputs.items()}, labels=seen).task_losses["buy"]
    torch.testing.assert_close(loss, again)  # row 5 has no label of its own


@all_variants
def test_rows_do_not_see_each_other_in_evaluation(variant: str) -> None:
    model = zoo.variant_of(variant)
    inputs = zoo.inputs_of(model.config, rows=9)
    whole = model(**inputs).logits
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    close(model(**{name: x[order] for name, x in inputs.items()}).logits, {t: z[order] for t, z in whole.items()})
    for rows in (slice(0, 1), slice(1, 4), slice(4, 9)):  # one row too
        close(model(**{name: x[rows] for name, x in inputs.items()}).logits, {t: z[rows] for t, z in whole.items()})
    alike = model(**{name: x[3:4].expand(5, *x.shape[1:]) for name, x in inputs.items()}).logits
    close(alike, {t: z[3:4].expand(5, -1) for t, z in whole.items()})


@all_types
def test_a_batch_that_goes_through_in_pieces_answers_the_same(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.model_of(model_type)
    inputs, labels = zoo.inputs_of(model.config, rows=7), zoo.labels_of(model.config, rows=7)
    with torch.no_grad():
        whole = model(**inputs, labels=labels)
        monkeypatch.setattr(_tabular, "ROWS_AT_ONCE", 3)
        pieces = model(**inputs, labels=labels)
        close(pieces.logits, whole.logits)
        torch.testing.assert_close(pieces.last_hidden_state, whole.last_hidden_state)
        torch.testing.assert_close(pieces.loss, whole.loss)
        if whole_routing := model(**inputs, output_routing=True).routing:
            assert all(w.shape[0] == 7 for record in whole_routing for w in record.weights.values())
        assert len(model(**inputs, output_hidden_states=True).hidden_states[0]) == 7


@all_variants
def test_training_answers_like_evaluation_but_for_what_is_random(variant: str) -> None:
    """In training all gates mix in one product; without dropout, and with a batch norm's statistics, it is the same."""
    names = {field.name for field in zoo.own_fields(type(zoo.variant_of(variant).config))}
    quiet = {name: 0.0 for name in ("dropout", "embedding_dropout", "gate_dropout") if name in names}
    model = zoo.variant_of(variant, **quiet)
    inputs = zoo.inputs_of(model.config)
    whole = model(**inputs)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()
    trained = model(**inputs)
    close(trained.logits, whole.logits)
    torch.testing.assert_close(trained.last_hidden_state, whole.last_hidden_state)
    close(model(**inputs, tasks=["buy", "area"]).logits, {task: whole.logits[task] for task in ("buy", "area")})


@all_variants
def test_seeds_decide_everything(variant: str) -> None:
    def losses(seed: int) -> list[float]:
        model = zoo.variant_of(variant, seed=seed, dropout=0.3, embedding_dropout=0.2).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        out = []
        for _ in range(3):
            loss = model(**zoo.inputs_of(model.config), labels=zoo.labels_of(model.config)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            out.append(loss.item())
        return out

    first = losses(3)
    assert losses(3) == first
    assert losses(4) != first


@all_types
def test_experts_differ_at_the_start(model_type: str) -> None:
    for name, bank in zoo.model_of(model_type).named_modules():
        if isinstance(bank, ExpertBank):
            for weight in bank.weights:
                for i in range(1, len(weight)):
                    assert not torch.allclose(weight[0], weight[i], atol=1e-2), name


@all_types
def test_every_kind_of_task_can_be_learnt(model_type: str) -> None:
    """The loss of a handful of rows falls far below that of a guess: no part is cut off from its gradient."""
    model = zoo.model_of(model_type, dropout=0.0, embedding_dropout=0.0, tasks=[zoo.TASKS[i] for i in (0, 3, 4)])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.reset_running_stats()
    model.train()
    inputs, labels = zoo.inputs_of(model.config, rows=8), zoo.labels_of(model.config, rows=8)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    enough = {task: max(0.5 * loss.item(), 0.1) for task, loss in model(**inputs, labels=labels).task_losses.items()}
    for _ in range(200):
        losses = model(**inputs, labels=labels).task_losses
        if all(losses[task].item() < bound for task, bound in enough.items()):
            return
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    pytest.fail(f"after 200 steps {losses}, hoped for less than {enough}")


# --- files ------------------------------------------------------------------------------------------------------------


@all_variants
def test_saved_and_loaded_it_is_the_same(variant: str, tmp_path: Path) -> None:
    model = zoo.variant_of(variant)
    inputs = zoo.inputs_of(model.config)
    model.config.use_cache = False  # transformers' Trainer writes this into any config
    model.save_pretrained(tmp_path)
    again = AutoModelForMultiTask.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert not again.training
    assert again.tasks == zoo.TASK_NAMES  # JSON sorts a dict, not a list
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    same(again(**inputs).logits, model(**inputs).logits)


@all_types
def test_saved_in_shards(model_type: str, tmp_path: Path) -> None:
    model = zoo.model_of(model_type)
    model.save_pretrained(tmp_path, max_shard_size="1KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    inputs = zoo.inputs_of(model.config)
    same(type(model).from_pretrained(tmp_path)(**inputs).logits, model(**inputs).logits)
    alone = type(model).from_pretrained(tmp_path, tasks="colour")(**inputs).logits
    same(alone, {"colour": model(**inputs).logits["colour"]})


@all_types
def test_loading_over_another_head_keeps_the_rest(model_type: str, tmp_path: Path) -> None:
    """`ignore_mismatched_sizes`: what fits is loaded, what does not is initialised, not left as memory was."""
    model = zoo.model_of(model_type)
    model.save_pretrained(tmp_path)
    tasks = [{**task, "num_outputs": 5} if task["name"] == "colour" else task for task in zoo.TASKS]
    features = [{**f, "bins": [-2.0, 0.0, 1.0]} if f["name"] == "age" else f for f in zoo.FEATURES]
    config = zoo.config_of(model_type, tasks=tasks, features=features)
    other = type(model).from_pretrained(tmp_path, config=config, ignore_mismatched_sizes=True)
    fresh = REGISTRY[model_type](config)
    for name, tensor in other.state_dict().items():
        if tensor.shape == model.state_dict()[name].shape:
            assert torch.equal(tensor, model.state_dict()[name]), name
        elif name.startswith("encoder.numeric.impl"):
            assert torch.equal(tensor, fresh.state_dict()[name]), name  # derived from the bins
        else:
            assert tensor.abs().max() < 10, name
    assert other(**zoo.inputs_of(config)).logits["colour"].shape == (6, 5)


def test_auto_classes_in_a_fresh_process(tmp_path: Path) -> None:
    sums = {}
    for model_type in zoo.MODEL_TYPES:
        model = zoo.model_of(model_type, tasks=zoo.TASKS[:3])
        model.save_pretrained(tmp_path / model_type)
        sums[model_type] = [type(model).__name__, sum(t.double().sum().item() for t in model.state_dict().values())]
    code = """
import json, pathlib, sys
import moe_mtl.models
from transformers import AutoConfig, AutoModel
out = {}
for folder in pathlib.Path(sys.argv[1]).iterdir():
    assert AutoConfig.from_pretrained(folder).model_type == folder.name
    model = AutoModel.from_pretrained(folder)
    out[folder.name] = [type(model).__name__, sum(t.double().sum().item() for t in model.state_dict().values())]
print(json.dumps(out))
"""
    run = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == sums


@all_types
def test_auto_classes_build_from_a_config(model_type: str) -> None:
    config = zoo.config_of(model_type)
    assert type(AutoModelForMultiTask.from_config(config)) is REGISTRY[model_type]
    assert type(AutoModel.from_config(config)) is REGISTRY[model_type]
    assert type(AutoConfig.for_model(model_type)) is REGISTRY[model_type].config_class


@all_types
def test_copies_are_equal_and_apart(model_type: str) -> None:
    model = zoo.model_of(model_type)
    other = copy.deepcopy(model)
    inputs = zoo.inputs_of(model.config)
    same(other(**inputs).logits, model(**inputs).logits)
    for parameter in other.parameters():
        parameter.data.zero_()
    assert not torch.equal(other(**inputs).logits["colour"], model(**inputs).logits["colour"])


@all_types
def test_print_is_short_enough_to_read(model_type: str) -> None:
    text = str(zoo.model_of(model_type, tasks=zoo.TASKS[:2]))
    assert len(text.splitlines()) < 200
    assert len(text) < 8000


# --- precision and export ---------------------------------------------------------------------------------------------


@all_variants
def test_half_precision(variant: str, tmp_path: Path) -> None:
    model = zoo.variant_of(variant)
    inputs, labels = zoo.inputs_of(model.config), zoo.labels_of(model.config)
    whole = model(**inputs).logits
    model.save_pretrained(tmp_path)
    half = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    out = half(**inputs, labels=labels)
    for task, logits in out.logits.items():
        assert logits.dtype == torch.bfloat16
        torch.testing.assert_close(logits.float(), whole[task], rtol=0.1, atol=0.15)
    assert out.loss.dtype == torch.float32
    half.train()(**inputs, labels=labels).loss.backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in half.parameters())


@all_variants
def test_autocast(variant: str) -> None:
    model = zoo.variant_of(variant).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**zoo.inputs_of(model.config), labels=zoo.labels_of(model.config)).loss
    loss.backward()
    assert bool(torch.isfinite(loss))
    assert all(p.grad.dtype == torch.float32 and bool(torch.isfinite(p.grad).all()) for p in model.parameters())


class Answers(nn.Module):
    """Tensors in, tensors out, as an exported program wants it."""

    def __init__(self, model: MultiTaskModel):
        super().__init__()
        self.model = model

    def forward(self, numeric: Tensor, categorical: Tensor, sequences: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model(numeric, categorical, sequences).logits.values())


@all_types
def test_export_for_any_batch(model_type: str) -> None:
    model = zoo.model_of(model_type, tasks=zoo.TASKS[:3])
    example, other = zoo.inputs_of(model.config, rows=4), zoo.inputs_of(model.config, rows=1500, seed=5)
    batch = torch.export.Dim.DYNAMIC
    with torch.no_grad():
        program = torch.export.export(
            Answers(model), tuple(example.values()), dynamic_shapes=tuple({0: batch} for _ in example)
        )
        got = program.module()(*other.values())
        close(dict(zip(model.tasks, got, strict=True)), model(**other).logits)


# --- routing ----------------------------------------------------------------------------------------------------------


@all_variants
def test_routing_record(variant: str) -> None:
    # With a number of experts that is a power of two every DSelect-k code names an expert, and weights sum to 1.
    has_experts = "num_experts" in {field.name for field in zoo.own_fields(type(zoo.variant_of(variant).config))}
    model = zoo.variant_of(variant, **({"num_experts": 4} if has_experts else {}))
    inputs = zoo.inputs_of(model.config)
    assert model(**inputs).routing is None
    out = model(**inputs, output_routing=True)
    same(out.logits, model(**inputs).logits)
    has_gates = any(name.endswith(".gates") for name, _ in model.named_modules())
    assert bool(out.routing) == has_gates
    assert len({record.layer for record in out.routing}) == len(out.routing)
    for record in out.routing:
        assert record.weights.keys() == record.experts.keys()
        for gate, weights in record.weights.items():
            experts = record.experts[gate]
            assert weights.shape == (6, len(experts))
            assert len(set(experts)) == len(experts)
            assert bool((weights >= 0).all())
            torch.testing.assert_close(weights.sum(1), torch.ones(6))
            torch.testing.assert_close(record.utilisation()[gate], weights.mean(0))
            assert -1e-6 <= record.entropy()[gate].item() <= math.log(len(experts)) + 1e-5
            assert set(experts) <= set(record.dead_units)
        assert all(0 <= share.item() <= 1 for share in record.dead_units.values())
    if out.routing:  # who speaks to a tower: its own gate, or one for all
        assert set(out.routing[-1].weights) in (set(zoo.TOWER_TASKS), {"shared"})


@all_types
def test_routing_of_one_task_is_that_of_all(model_type: str) -> None:
    model = zoo.model_of(model_type)
    inputs = zoo.inputs_of(model.config)
    whole = model(**inputs, output_routing=True).routing
    alone = model(**inputs, output_routing=True, tasks="colour").routing
    for record, small in zip(whole, alone, strict=True):
        for gate, weights in small.weights.items():
            assert torch.equal(weights, record.weights[gate])
            assert small.experts[gate] == record.experts[gate]
    assert not alone or set(alone[-1].weights) <= {"colour", "shared"}


@all_types
def test_evaluation_leaves_the_model_alone(model_type: str) -> None:
    model = zoo.model_of(model_type)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(**zoo.inputs_of(model.config), output_routing=True, labels=zoo.labels_of(model.config))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
