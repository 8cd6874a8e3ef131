"""Shared bottom, row by row."""

import pytest
import torch
from by_hand import bank, check_gradients, close, mlp, model_of, rows

TASKS = [{"name": "b", "kind": "binary"}, {"name": "a", "kind": "multilabel", "num_outputs": 2}]


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("tasks", [TASKS, TASKS[:1]])
def test_equations(tasks: list[dict], activation: str) -> None:
    """y_k = h_k(f(x)); with one task, the single-task baseline."""
    model = model_of("shared_bottom", tasks=tasks, bottom_dims=[6, 5], activation=activation)
    state, x = model.state_dict(), rows()
    out = model(numeric=x)
    for b, row in enumerate(x):
        (hidden,) = bank(state, "trunk.bottom", row, activation)
        for task in out.logits:
            close(out.logits[task][b], mlp(state, f"towers.{task}", hidden, activation))


def test_gradients() -> None:
    model = model_of("shared_bottom", tasks=TASKS, bottom_dims=[4])
    nan = float("nan")
    labels = {
        "b": torch.tensor([1.0, nan, 0.0], dtype=torch.float64),
        "a": torch.tensor([[1.0, 0.0], [nan, 1.0], [0.0, 0.0]], dtype=torch.float64),
    }
    check_gradients(model.train(), labels)
