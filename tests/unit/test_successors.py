"""Recycled successors: what is kept of a token, what it is worth, and trees of it."""

from __future__ import annotations

import heapq

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_propd.core.drafting.candidates import SUREST, Candidates
from vllm_propd.core.drafting.growth import DEEPEST, LEAST, grow_from
from vllm_propd.core.sources.successors import (
    AT_ROOT,
    BESIDE,
    BINS,
    EXPECTED,
    RANKS,
    SURPRISING,
    UNKNOWN,
    ReadTokens,
    Successors,
    SuccessorTable,
)
from vllm_propd.core.tree import Ints, TokenTree

VOCABULARY = 12
GREEDY, SAMPLED, STEERED = 0, 1, -1
relaxed = settings(deadline=None)


def see(
    table: SuccessorTable, before: int, truth: int, shares: dict[int, float], kind: int = 0
) -> None:
    """Tells the table that a root's best successors had these shares."""
    see_path(table, [(before, truth, shares)], kind)


def see_path(
    table: SuccessorTable,
    path: list[tuple[int, int, dict[int, float]]],
    kind: int = GREEDY,
    looked_up: list[int] | None = None,
) -> None:
    """Tells it of a root and accepted nodes: token, what came, shares."""
    with np.errstate(divide="ignore"):
        logs = np.log(np.array([[*shares.values()] for *_, shares in path], np.float32))
    seen = np.array([[*shares] for *_, shares in path])
    before, truth = np.array([[one, other] for one, other, _ in path]).T
    read = ReadTokens(before, truth, np.zeros(len(path), np.int64), np.arange(len(path)))
    suggested = np.array([looked_up or []], np.int64)
    table.see(read, seen, logs, np.array([kind]), suggested)


def after(table: SuccessorTable, *roots: int, sampled: bool = False) -> Successors:
    return table.after(np.array(roots), np.full(len(roots), sampled))


def worth(
    table: SuccessorTable, token: int, kind: int = GREEDY, where: int = AT_ROOT
) -> dict[int, float]:
    """What each successor of a token is worth."""
    known = after(table, token, sampled=kind == SAMPLED)
    values = np.exp(known.worth[0, where][known.bin[token]])
    return {
        int(t): float(v)
        for t, v in zip(known.token[token], values, strict=True)
        if t != UNKNOWN
    }


def test_the_last_sight_of_a_token_counts() -> None:
    table = SuccessorTable(VOCABULARY)
    see(table, 3, 1, {1: 0.9, 2: 0.1})
    see(table, 3, 4, {4: 0.6, 5: 0.3, 6: 0.1})
    assert [*worth(table, 3)] == [4, 5, 6]
    assert worth(table, 7) == {}


def test_tokens_that_the_target_does_not_know_have_no_successors() -> None:
    """A prompt may end with one; nothing beyond the table is read or written."""
    tables = SuccessorTable(VOCABULARY), SuccessorTable(VOCABULARY)
    shares = {1: 0.9, 2: 0.1}
    for table, path in zip(tables, ([(VOCABULARY + 500, 1, shares)], []), strict=True):
        see_path(table, [*path, (3, 4, shares)])
    for mine, other in zip(
        *(vars(after(table, 3)).values() for table in tables), strict=True
    ):
        np.testing.assert_array_equal(mine, other)


def test_what_is_impossible_is_no_successor() -> None:
    table = SuccessorTable(VOCABULARY)
    see(table, 3, 1, {1: 1.0, 2: 0.0})
    assert [*worth(table, 3)] == [1]
    see(table, 3, 1, {1: float("nan"), 2: float("nan")})
    assert worth(table, 3) == {}


@pytest.mark.parametrize("kind", [GREEDY, SAMPLED])
def test_successors_are_worth_what_they_have_been(kind: int) -> None:
    """Of those with 80% of the share half come true; of those with 20%, a quarter."""
    table, rng = SuccessorTable(VOCABULARY), np.random.default_rng(0)
    for _ in range(3000):
        truth = int(rng.choice([1, 2, 3], p=[0.5, 0.25, 0.25]))
        see(table, 0, truth, {1: 0.8, 2: 0.2}, kind)
    found = worth(table, 0, kind)
    assert found[1] == pytest.approx(0.5, abs=0.03)
    assert found[2] == pytest.approx(0.25, abs=0.03)
    other = worth(table, 0, 1 - kind)
    assert abs(other[1] - 0.5) > 0.05, "requests of the other kind have not spoken"


def test_where_a_token_stands_counts() -> None:
    """After an expected token the text goes on as before; after a surprising one, not."""
    table, shares, rng = (
        SuccessorTable(VOCABULARY),
        {1: 0.8, 2: 0.2},
        np.random.default_rng(2),
    )
    for _ in range(2000):
        first = int(rng.choice([1, 2]))
        # The root's successors are 1 and 2; so are those of 1, and of 2.
        second = int(rng.choice([1, 9], p=[0.75, 0.25] if first == 1 else [0.25, 0.75]))
        see_path(table, [(0, first, shares), (first, second, shares)])
    found = [worth(table, 0, where=where)[1] for where in (AT_ROOT, EXPECTED, SURPRISING)]
    assert found == pytest.approx([0.5, 0.75, 0.25], abs=0.04)


def test_what_is_looked_up_has_a_price_of_its_own() -> None:
    """Successors are graded beside it: of the others one in five comes true."""
    table, rng = SuccessorTable(VOCABULARY), np.random.default_rng(3)
    for _ in range(2000):
        truth = int(rng.choice([1, 2], p=[0.8, 0.2]))
        see_path(table, [(0, truth, {2: 0.8, 1: 0.2})], looked_up=[1, 5])
    assert worth(table, 0, where=AT_ROOT + BESIDE)[2] == pytest.approx(0.2, abs=0.03)
    taught, first = after(table, 0).worth, after(SuccessorTable(VOCABULARY), 0).worth
    np.testing.assert_array_equal(taught[0, AT_ROOT], first[0, AT_ROOT])


def test_beside_a_path_only_as_far_as_the_text_went_along() -> None:
    table, shares = SuccessorTable(VOCABULARY), {3: 0.8, 4: 0.2}
    first = after(table, 0).worth[0].copy()
    for _ in range(200):  # the path is 1 5; the text takes 3 instead of 1
        see_path(table, [(0, 3, shares), (3, 4, shares)], looked_up=[1, 5])
    moved = (after(table, 0).worth[0] != first).any(-1)
    assert np.flatnonzero(moved).tolist() == [EXPECTED, AT_ROOT + BESIDE]


def test_steered_requests_teach_nothing_but_are_read() -> None:
    table = SuccessorTable(VOCABULARY)
    see(table, 0, 1, {1: 0.8, 2: 0.2})
    first = after(table, 0).worth.copy()
    for _ in range(500):
        see(table, 0, 9, {1: 0.8, 2: 0.2}, STEERED)
    see(table, 0, 9, {3: 0.8}, STEERED)
    np.testing.assert_array_equal(after(table, 0).worth, first)
    assert [*worth(table, 0)] == [3]


def test_surer_successors_are_never_worth_less() -> None:
    table, rng = SuccessorTable(VOCABULARY), np.random.default_rng(1)
    for _ in range(500):
        share = rng.uniform(0.01, 0.99)
        see(table, 0, int(rng.integers(3)), {1: share, 2: 1.0 - share})
    curves = after(table, 0).worth[0]
    assert (np.diff(curves, axis=-1) >= 0.0).all()
    assert np.exp(curves.max()) <= SUREST + 1e-6


@st.composite
def tables(draw: st.DrawFn) -> tuple[Successors, Ints]:
    """Successors of few tokens, worth what no two paths are; and continuations."""
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    token = np.full((VOCABULARY, RANKS), UNKNOWN, np.int32)
    place = np.zeros((VOCABULARY, RANKS), np.uint8)
    for row in range(VOCABULARY):
        count = int(rng.integers(0, 5))
        token[row, :count] = rng.permutation(VOCABULARY)[:count]
        place[row, :count] = -np.sort(-rng.permutation(BINS)[:count])
    curves = np.sort(-rng.exponential(1.0, (2, 6, BINS)), -1).astype(np.float32)
    curves = np.minimum(curves, np.float32(np.log(SUREST)))
    roots = rng.integers(0, VOCABULARY, 2)
    path = rng.integers(0, VOCABULARY, (2, 6))
    path[:, int(rng.integers(0, 7)) :] = -1
    return Successors(token, place, curves, roots), path


def by_hand(
    known: Successors, sequence: int, size: int, path: list[int], of_path: list[float]
) -> list[tuple[list[int], float]]:
    """The best tree's nodes as paths of tokens, with their log probabilities."""

    def children(tokens: list[int]) -> dict[int, float]:
        so_far = [int(known.roots[sequence]), *tokens]
        before, at = so_far[-1], len(tokens)
        where = AT_ROOT
        if tokens:
            expected = known.token[so_far[-2], 0] == before
            where = EXPECTED if expected else SURPRISING
        looks_up = at < len(path) and path[at] >= 0 and tokens == path[:at]
        found: dict[int, float] = {}
        if at < DEEPEST:
            for token, place in zip(known.token[before], known.bin[before], strict=True):
                if token != UNKNOWN:
                    curve = known.worth[sequence, where + BESIDE * looks_up]
                    found[int(token)] = float(np.exp(curve[place]))
        if looks_up:
            found[path[at]] = float(np.exp(of_path[at]))
        return found

    waiting: list[tuple[float, list[int]]] = []
    grown: list[tuple[list[int], float]] = []

    def offer(tokens: list[int], score: float) -> None:
        looked = tokens == path[: len(tokens)]
        for token, p in children(tokens).items():
            mine = score + float(np.log(p))
            is_path = looked and len(tokens) < len(path) and path[len(tokens)] == token
            if is_path or mine >= np.log(LEAST):
                heapq.heappush(waiting, (-mine, [*tokens, token]))

    offer([], 0.0)
    while waiting and len(grown) < size:
        score, tokens = heapq.heappop(waiting)
        grown.append((tokens, -score))
        offer(tokens, -score)
    return grown


def paths_of(tree: TokenTree) -> list[list[int]]:
    return [
        [int(tree.token[i - 1]) for i in tree.path(node)]
        for node in range(1, len(tree) + 1)
    ]


@relaxed
@given(tables(), st.integers(1, 40), st.booleans(), st.integers(0, 1 << 30))
def test_trees_are_the_best(
    drawn: tuple[Successors, Ints], size: int, looks_up: bool, seed: int
) -> None:
    known, path = drawn
    rng = np.random.default_rng(seed)
    of_path = np.log(rng.uniform(0.05, 0.99, path.shape)).astype(np.float32)
    of_path[path < 0] = -np.inf
    looked_up = (path, of_path) if looks_up else None
    nothing, sizes = Candidates.none(2), np.full(2, size)
    for sequence, tree in enumerate(grow_from(nothing, sizes, looked_up, known)):
        mine = path[sequence].tolist() if looks_up else []
        # One more than the tree has: what it is cut before may be a tie, too.
        expected = by_hand(known, sequence, size + 1, mine, of_path[sequence].tolist())
        score = np.array([one for _, one in expected])
        np.testing.assert_allclose(tree.score, score[:size], atol=1e-4)
        if (np.diff(score) < -1e-3).all():  # no ties
            assert paths_of(tree) == [tokens for tokens, _ in expected[:size]]


def test_successors_stand_below_the_heads() -> None:
    table = SuccessorTable(VOCABULARY)
    see(table, 5, 6, {6: 0.9, 7: 0.1})
    see(table, 6, 8, {8: 0.95, 7: 0.05})
    see(table, 0, 9, {9: 0.99, 7: 0.01})  # the root's, whose place belongs to a head
    heads = Candidates.independent(
        np.array([[[5, 4]]]), np.log(np.array([[[0.8, 0.2]]], np.float32))
    )
    (tree,) = grow_from(heads, np.array([8]), None, after(table, 0))
    assert [one for one in paths_of(tree) if one[0] == 5][:3] == [[5], [5, 6], [5, 6, 8]]
    assert 9 not in tree.token and [4] in paths_of(tree)
    (without,) = grow_from(heads, np.array([8]))
    assert paths_of(without) == [[5], [4]]
