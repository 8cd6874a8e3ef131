"""Batches by index are the rows they name; each epoch is a permutation that depends on seed and epoch alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from moe_mtl.data import ShuffledBatches, TensorTable, as_is


def table(rows=7):
    return TensorTable(
        {
            "numeric": torch.arange(rows * 3, dtype=torch.float32).reshape(rows, 3),
            "labels": {"a": torch.arange(rows), "b": torch.arange(rows) * 2.0},
        }
    )


def test_a_batch_holds_the_rows_of_its_indices():
    batch = table()[torch.tensor([5, 0, 5])]
    assert batch["numeric"].tolist() == [[15, 16, 17], [0, 1, 2], [15, 16, 17]]
    assert batch["labels"]["a"].tolist() == [5, 0, 5]
    assert table()[2]["labels"]["b"] == 4
    assert table()[1:3]["labels"]["a"].tolist() == [1, 2]
    assert len(table()) == 7


def test_select_by_mask_and_by_index():
    assert table().select(torch.arange(7) > 4).tensors["labels"]["a"].tolist() == [5, 6]
    assert table().select([3, 1]).tensors["labels"]["a"].tolist() == [3, 1]
    with pytest.raises(ValueError, match=r"mask of 7 rows"):
        table().select(torch.ones(6, dtype=torch.bool))


def test_lengths_must_agree():
    with pytest.raises(ValueError, match=r"expected 2 rows as in 'a', found \{'b.c': 3\}"):
        TensorTable({"a": torch.zeros(2), "b": {"c": torch.zeros(3)}})
    with pytest.raises(ValueError, match="at least one tensor"):
        TensorTable({"labels": {}})


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 3), st.integers(0, 3), st.integers(1, 3))
def test_an_epoch_is_every_row_once(rows, size, seed, epoch, min_last):
    batches = ShuffledBatches(rows, size, seed, min_last=min_last)
    batches.set_epoch(epoch)
    found = list(batches)
    assert len(found) == len(batches)
    assert sorted(torch.cat(found).tolist()) == list(range(rows))
    assert all(len(batch) == size for batch in found[:-1])
    # Only a table smaller than min_last, or batches that small by choice, may end in fewer rows.
    assert len(found[-1]) >= min(min_last, rows, size)
    assert len(found[-1]) < size + min_last
    again = ShuffledBatches(rows, size, seed, min_last=min_last)
    again.set_epoch(epoch)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_a_tail_of_one_row_joins_the_batch_before():
    assert [len(b) for b in ShuffledBatches(9, 4)] == [4, 5]
    assert [len(b) for b in ShuffledBatches(10, 4)] == [4, 4, 2]
    assert [len(b) for b in ShuffledBatches(9, 4, min_last=1)] == [4, 4, 1]


def test_the_order_changes_with_epoch_and_seed():
    def order(seed, epoch):
        batches = ShuffledBatches(50, 50, seed)
        batches.set_epoch(epoch)
        return tuple(next(iter(batches)).tolist())

    assert len({order(seed, epoch) for seed in range(3) for epoch in range(3)}) == 9
    assert torch.cat(list(ShuffledBatches(5, 2, shuffle=False))).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("rows", "size"), [(0, 2), (3, 0)])
def test_nothing_to_draw_is_refused(rows, size):
    with pytest.raises(ValueError, match="at least"):
        ShuffledBatches(rows, size)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_loader_takes_both(workers):
    batches = ShuffledBatches(7, 3, seed=1)
    loader = DataLoader(table(), batch_sampler=batches, collate_fn=as_is, num_workers=workers)
    for indices, batch in zip(batches, loader, strict=True):
        assert batch["labels"]["a"].tolist() == indices.tolist()
        assert batch["numeric"][:, 0].tolist() == [3 * i for i in indices.tolist()]
