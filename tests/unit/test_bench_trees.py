"""What recordings of trees tell of ranks and sizes."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_propd.bench.trees import accepted_by_rank, tokens_by_size


def tree(parent: list[int], accepted: list[int]) -> dict[str, Any]:
    return {"parent": parent, "accepted": accepted, "verified": len(parent)}


SHAPE = [0, 0, 1, 2, 2, 0]
"""Nodes 1, 2 and 6 hang on the root, 3 on the first, 4 and 5 on the second."""


def test_ranks_are_counted_among_siblings() -> None:
    recording = [[tree(SHAPE, [1, 3]), tree(SHAPE, [2, 5])], [tree(SHAPE, [6])], []]
    third = pytest.approx(1 / 3)
    assert accepted_by_rank(recording) == [[third, third, third], [third, third, 0.0]]


def test_a_trees_prefix_accepts_what_it_holds() -> None:
    recording = [[tree(SHAPE, [1, 3]), tree(SHAPE, [])], [tree(SHAPE, [2, 5])]]
    expected = [1, 4 / 3, 5 / 3, 2, 2, 7 / 3, 7 / 3]
    assert tokens_by_size(recording) == pytest.approx(expected)


def test_sizes_that_change_have_no_curve() -> None:
    assert tokens_by_size([[tree(SHAPE, [1]), tree([0], [1])]]) == []


def test_nothing_recorded_tells_nothing() -> None:
    assert tokens_by_size([[]]) == accepted_by_rank([]) == []
    assert accepted_by_rank([[tree(SHAPE, [])]]) == []
