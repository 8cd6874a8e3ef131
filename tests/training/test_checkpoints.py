"""Interrupted runs: what is killed at any moment resumes to the same bits, and what is incomplete is refused."""

import errno
import hashlib
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch

from moe_mtl.data.tensors import TensorTable
from moe_mtl.files import CheckpointError
from moe_mtl.models import model_class
from moe_mtl.training.checkpoints import (
    REQUIRED,
    checkpoints_in,
    find_last_complete_checkpoint,
    keep_last_checkpoints,
    remove_stale_staging,
    verify_checkpoint,
)
from moe_mtl.training.recipe import EarlyStopping, TaskSampling, TrainSection
from moe_mtl.training.run import training_arguments
from moe_mtl.training.trainer import MultiTaskTrainer


def digest(model):
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in model.state_dict().values())).hexdigest()


class Stop(Exception):  # noqa: N818 - what a killed process would be
    pass


def stop_at(trainer, step):
    """Makes the trainer fail in the training step after `step` optimiser steps."""
    plain = trainer.training_step

    def training_step(model, inputs, count=None):
        if trainer.state.global_step == step:
            raise Stop
        return plain(model, inputs, count)

    trainer.training_step = training_step
    return trainer


# 70 rows in batches of 16: 5 batches an epoch, so that steps 3 and 8 lie within an epoch and 5 at its end.
SETTINGS = {
    "plain": {},
    "accumulation": {"gradient_accumulation": 2},
    "stopping": {"early_stopping": EarlyStopping("loss", 2), "learning_rate": 0.2},
    "uncertainty": {"loss_balancing": "UW"},
    "dwa": {"loss_balancing": "DWA"},
    "gradvac": {"gradient_balancing": "GradVac"},
    "sampling": {"task_sampling": TaskSampling(2.0)},
    "bf16": {"precision": "bf16"},
}


CASES = [(setting, step) for setting in SETTINGS for step in (3, 5)] + [("plain", 8), ("stopping", 8)]


@pytest.mark.parametrize(("setting", "step"), CASES)
def test_resuming_gives_the_same_bits(make_model, make_table, make_trainer, tmp_path, setting, step):
    def trainer(folder, model):
        options = {"epochs": 2, "save_steps": step, "logging_steps": 1, "schedule": "one_cycle", "seed": 4} | SETTINGS[
            setting
        ]
        return make_trainer(model, make_table(70), make_table(40, seed=1), folder=tmp_path / folder, **options)

    whole = make_model(dropout=0.3)
    straight = trainer("straight", whole)
    straight.train()
    model = make_model(dropout=0.3)
    with pytest.raises(Stop):
        stop_at(trainer("broken", model), step).train()
    torch.manual_seed(99)
    resumed_model = make_model(dropout=0.3, seed=7)
    resumed = trainer("broken", resumed_model)
    resumed.train(resume_from_checkpoint=True)
    assert digest(resumed_model) == digest(whole)
    for entry, other in zip(straight.state.log_history[:-1], resumed.state.log_history[:-1], strict=True):
        for key in entry:
            if "runtime" not in key and "per_second" not in key:
                assert entry[key] == other[key], (key, entry["step"])
    # What was not interrupted differs from what began anew: the test can fail.
    assert digest(make_model(dropout=0.3, seed=7)) != digest(whole)


@pytest.fixture
def finished(make_model, make_table, make_trainer, tmp_path):
    """A folder with two checkpoints, of steps 4 and 6."""
    trainer = make_trainer(make_model(), make_table(70), folder=tmp_path / "run", max_steps=6, save_steps=2)
    trainer.train()
    return tmp_path / "run"


def test_the_last_two_are_kept_whole_and_readable_alike(finished):
    assert [path.name for path in checkpoints_in(finished)] == ["checkpoint-4", "checkpoint-6"]
    assert find_last_complete_checkpoint(finished) == finished / "checkpoint-6"
    names = {path.name for path in (finished / "checkpoint-6").iterdir()}
    assert {*REQUIRED, "config.json", "model.safetensors", "rng_state.pth", "manifest.json"} == names
    assert "training_args.bin" not in names
    assert len({path.stat().st_mode for path in (finished / "checkpoint-6").iterdir()}) == 1


FILES = [*REQUIRED, "config.json", "model.safetensors", "rng_state.pth", "manifest.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_a_damaged_checkpoint_is_passed_over_and_refused_by_name(finished, name, damage):
    path = finished / "checkpoint-6" / name
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    with pytest.raises(
        (CheckpointError, ValueError), match=name if name != "manifest.json" else "manifest|sha256|JSON|damaged"
    ):
        verify_checkpoint(finished / "checkpoint-6")
    with pytest.warns(UserWarning, match="passing over"):
        assert find_last_complete_checkpoint(finished) == finished / "checkpoint-4"


def test_resuming_from_nothing_or_from_a_damaged_checkpoint_is_refused(finished, make_model, make_table, make_trainer):
    (finished / "checkpoint-6" / "optimizer.pt").unlink()
    trainer = make_trainer(make_model(), make_table(70), folder=finished, max_steps=8, save_steps=2)
    with pytest.raises(CheckpointError, match=r"lacks optimizer.pt"):
        trainer.train(resume_from_checkpoint=str(finished / "checkpoint-6"))
    empty = make_trainer(make_model(), make_table(70), folder=finished / "checkpoint-4", max_steps=8)
    with pytest.raises(ValueError, match="expected a complete checkpoint"):
        empty.train(resume_from_checkpoint=True)


def test_an_empty_newest_folder_does_not_block(finished):
    (finished / "checkpoint-99").mkdir()
    with pytest.warns(UserWarning, match="written to its end"):
        assert find_last_complete_checkpoint(finished) == finished / "checkpoint-6"


def test_only_our_leavings_are_removed(tmp_path):
    for name in (
        "checkpoint-2",
        "checkpoint-10",
        "checkpoint-x",
        ".checkpoint-3.staging-0123abcd",
        ".checkpoint-notes",
        "runs",
    ):
        (tmp_path / name).mkdir()
    keep_last_checkpoints(tmp_path, 1)
    remove_stale_staging(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-10", "checkpoint-x", ".checkpoint-notes", "runs"}
    keep_last_checkpoints(tmp_path, 0)
    assert not checkpoints_in(tmp_path)


def test_a_full_disk_leaves_the_older_checkpoints(make_model, make_table, make_trainer, tmp_path, monkeypatch):
    folder, plain, calls = tmp_path / "run", torch.save, []

    def save(value, path, *rest):
        calls.append(path)
        if len(calls) == 5:  # within the second checkpoint
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(value, path, *rest)

    monkeypatch.setattr(torch, "save", save)
    trainer = make_trainer(make_model(), make_table(70), folder=folder, max_steps=8, save_steps=2)
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    assert [path.name for path in folder.iterdir()] == ["checkpoint-2"]
    assert find_last_complete_checkpoint(folder) == folder / "checkpoint-2"


def train_until_killed(folder, kill, resume, answer):
    """Runs in a process of its own, which dies before the `kill`-th of the calls that write, flush, rename or train."""
    calls = 0

    def dying(plain):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == kill:
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(*args, **kwargs)

        return call

    torch.set_num_threads(1)
    torch.save, os.replace, os.rename, os.fsync = map(dying, (torch.save, os.replace, os.rename, os.fsync))
    MultiTaskTrainer.training_step = dying(MultiTaskTrainer.training_step)
    torch.manual_seed(0)
    numeric = torch.randn(70, 2, generator=torch.Generator().manual_seed(0))
    table = TensorTable({"numeric": numeric, "labels": {"a": (numeric[:, 0] > 0).float()}})
    features = [{"name": "x", "kind": "numeric"}, {"name": "y", "kind": "numeric"}]
    config = {"num_experts": 2, "expert_dims": [3], "numeric_embedding": "scaled", "dropout": 0.3}
    cls = model_class("mmoe")
    model = cls(cls.config_class(features=features, tasks=[{"name": "a", "kind": "binary"}], **config))
    args = training_arguments(TrainSection(max_steps=7, batch_size=16, save_steps=3), folder)
    args.eval_strategy = "no"
    trainer = MultiTaskTrainer(model, args, table)
    found = find_last_complete_checkpoint(folder) if resume else None
    trainer.train(resume_from_checkpoint=None if found is None else str(found))
    Path(answer).write_text(f"{digest(model)} {calls}")


@pytest.fixture(scope="module")
def processes():
    """Processes that fork from one which has imported everything and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["moe_mtl.training.run"])
    return context


def test_killed_at_any_moment_of_a_save_a_run_resumes_to_the_same_bits(tmp_path, processes):
    def start(folder, kill, resume):
        answer = tmp_path / "answer"
        answer.unlink(missing_ok=True)
        process = processes.Process(target=train_until_killed, args=(str(tmp_path / folder), kill, resume, str(answer)))
        process.start()
        process.join(120)
        return process.exitcode, answer.read_text().split() if answer.exists() else None

    code, (expected, calls) = start("whole", -1, False)
    assert code == 0
    # From the first steps to the last: before each kind of write, flush and rename of the second checkpoint.
    total = int(calls)
    moments = sorted({2, *range(total // 2, total, max(total // 7, 1))})
    assert len(moments) >= 4
    for kill in moments:
        assert start(f"killed-{kill}", kill, False) == (-signal.SIGKILL, None)
        code, answer = start(f"killed-{kill}", -1, True)
        assert code == 0
        assert answer[0] == expected, kill
        assert not [path.name for path in (tmp_path / f"killed-{kill}").iterdir() if path.name.startswith(".")]
