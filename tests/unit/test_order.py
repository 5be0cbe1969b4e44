"""Row order: seeded, and every epoch is a permutation."""

from hypothesis import given
from hypothesis import strategies as st

from lambdapo_async.tasks.order import row_of


@given(st.integers(1, 50), st.integers(0, 3), st.integers(0, 10))
def test_every_epoch_asks_every_row_once(num_rows: int, epoch: int, seed: int) -> None:
    rows = [row_of(epoch * num_rows + i, num_rows=num_rows, seed=seed) for i in range(num_rows)]
    assert sorted(rows) == list(range(num_rows))


def test_epochs_and_seeds_differ() -> None:
    orders = {
        tuple(row_of(epoch * 40 + i, num_rows=40, seed=seed) for i in range(40)) for epoch in (0, 1) for seed in (0, 1)
    }
    assert len(orders) == 4
