"""The draws of a fuzz case: sorted indices, and padded lists of them."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.test_fuzz import HypothesisDraw

CPU = torch.device("cpu")


@given(data=st.data(), n=st.integers(0, 30))
def test_indices_are_different_and_in_rising_order(data, n):
    draw = HypothesisDraw(data, CPU)
    size = draw.choice((None, draw.integer(0, n)))
    chosen = draw.indices(n, size)
    assert chosen.dtype == torch.int64
    assert chosen.shape == (len(chosen) if size is None else size,)
    assert chosen.tolist() == sorted(set(chosen.tolist()) & set(range(n)))


@given(data=st.data(), n=st.integers(0, 12), shape=st.lists(st.integers(0, 5), min_size=1, max_size=3))
def test_padded_indices_are_lists_with_minus_one_behind_them(data, n, shape):
    padded = HypothesisDraw(data, CPU).padded_indices(shape, n)
    assert padded.dtype == torch.int32
    assert list(padded.shape) == shape
    for row in padded.view(-1, shape[-1] or 1).tolist():
        chosen = row[: row.index(-1)] if -1 in row else row
        assert chosen == sorted(set(chosen) & set(range(n)))
        assert set(row[len(chosen) :]) <= {-1}


def test_lists_of_every_length_and_with_gaps_are_drawn():
    lists = set()

    @settings(max_examples=200, deadline=None, derandomize=True, database=None)
    @given(data=st.data())
    def draw(data):
        row = HypothesisDraw(data, CPU).padded_indices((4,), 4).tolist()
        lists.add(tuple(i for i in row if i >= 0))

    draw()
    assert set(map(len, lists)) == {0, 1, 2, 3, 4}
    assert lists & {(0, 2), (0, 3), (1, 3)}
