"""Growth: trees are well formed, in best-first order, and the best of their size."""

from __future__ import annotations

import heapq
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vllm_propd.core.drafting.growth import grow, nodes_per_sequence
from vllm_propd.core.tree import TokenTree

Floats = np.ndarray
relaxed = settings(deadline=None)


def numbered(log_probs: Floats) -> np.ndarray:
    """Candidates whose token is its place: ``head * ranks + rank``."""
    sequences, heads, ranks = log_probs.shape
    places = np.arange(heads * ranks, dtype=np.int64).reshape(heads, ranks)
    return np.tile(places, (sequences, 1, 1))


def grow_one(log_probs: Floats, size: int) -> TokenTree:
    """The tree of one sequence's ``[heads, ranks]`` log probabilities."""
    (tree,) = grow(numbered(log_probs[None]), log_probs[None], np.array([size]))
    return tree


def same(one: TokenTree, other: TokenTree) -> bool:
    names = ("token", "parent", "depth", "score")
    return all(np.array_equal(getattr(one, n), getattr(other, n)) for n in names)


@st.composite
def candidates(draw: st.DrawFn, sequences: int | None = None) -> Floats:
    """Log probabilities in eighths: sums are exact, and ties are common."""
    count = [] if sequences is None else [sequences]
    shape = (*count, draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    eighths = draw(arrays(np.int64, shape, elements=st.integers(0, 24)))
    return (np.sort(eighths) / -8).astype(np.float32)


sizes = st.integers(0, 60)


@relaxed
@given(candidates(), sizes)
def test_trees_are_well_formed(log_probs: Floats, size: int) -> None:
    tree = grow_one(log_probs, size)
    ranks = log_probs.shape[1]
    node = np.arange(1, len(tree) + 1)
    assert (tree.parent >= 0).all() and (tree.parent < node).all()
    depth, score = np.append(0, tree.depth), np.append(np.float32(0), tree.score)
    np.testing.assert_array_equal(tree.depth, depth[tree.parent] + 1)
    np.testing.assert_array_equal(tree.token // ranks, tree.depth - 1)
    own = log_probs.flat[tree.token]
    np.testing.assert_array_equal(tree.score, score[tree.parent] + own)
    assert (np.diff(tree.score) <= 0).all()
    siblings = list(zip(tree.parent.tolist(), tree.token.tolist(), strict=True))
    assert len(set(siblings)) == len(siblings)


@relaxed
@given(candidates(), sizes)
def test_no_other_nodes_are_worth_more(log_probs: Floats, size: int) -> None:
    every = [
        sum(path)
        for depth in range(1, len(log_probs) + 1)
        for path in product(*log_probs[:depth])
    ]
    best = sorted(every, reverse=True)[:size]
    tree = grow_one(log_probs, size)
    assert len(tree) == min(size, len(every))  # fewer where the candidates run out
    np.testing.assert_array_equal(tree.score, np.array(best, np.float32))


@relaxed
@given(candidates(), sizes, sizes)
def test_a_prefix_is_the_tree_of_that_size(log_probs: Floats, size: int, kept: int) -> None:
    kept = min(kept, size)
    whole = grow_one(log_probs, size)
    assert same(whole.prefix(kept), grow_one(log_probs, kept))


@relaxed
@given(candidates(), sizes)
def test_equal_values_keep_the_order_of_their_discovery(
    log_probs: Floats, size: int
) -> None:
    """Node for node the tree of a plain heap: ranks of a cluster must agree."""
    heads, ranks = log_probs.shape
    # (-score, age, parent, depth, rank)
    heap = [(-log_probs[0, 0], 0, 0, 1, 0)]
    made, nodes = 1, []
    scores = [np.float32(0)]
    while heap and len(nodes) < size:
        worth, _, parent, depth, rank = heapq.heappop(heap)
        nodes.append((parent, (depth - 1) * ranks + rank))
        scores.append(-worth)
        if rank + 1 < ranks:
            score = scores[parent] + log_probs[depth - 1, rank + 1]
            heapq.heappush(heap, (-score, made, parent, depth, rank + 1))
            made += 1
        if depth < heads:
            score = scores[-1] + log_probs[depth, 0]
            heapq.heappush(heap, (-score, made, len(nodes), depth + 1, 0))
            made += 1
    tree = grow_one(log_probs, size)
    assert list(zip(tree.parent, tree.token, strict=True)) == nodes


@relaxed
@given(candidates(sequences=3), st.tuples(sizes, sizes, sizes))
def test_sequences_grow_independently(
    log_probs: Floats, wanted: tuple[int, int, int]
) -> None:
    trees = grow(numbered(log_probs), log_probs, np.array(wanted))
    for tree, alone, size in zip(trees, log_probs, wanted, strict=True):
        assert same(tree, grow_one(alone, size))


def all_paths(
    tokens: np.ndarray, log_probs: Floats, path: list[int], worth: Floats
) -> dict[tuple[int, ...], float]:
    """Every path of heads' and looked-up tokens, and its value."""
    found: dict[tuple[int, ...], float] = {}
    heads = len(tokens)

    def extend(prefix: tuple[int, ...], value: float) -> None:
        depth = len(prefix)
        looked = list(prefix) == path[:depth] and depth < len(path)
        children: dict[int, float] = {}
        if depth < heads:
            pairs = zip(tokens[depth].tolist(), np.exp(log_probs[depth]), strict=True)
            children = {token: float(share) for token, share in pairs}
        if looked:
            said = children.pop(path[depth], 0.0)
            surer = max(said, float(np.exp(worth[depth])))
            left = (1.0 - surer) / (1.0 - said)
            children = {token: share * left for token, share in children.items()}
            children[path[depth]] = surer
        assert sum(children.values()) < 1.0 + 1e-6
        for token, share in children.items():
            found[*prefix, token] = value * share
            extend((*prefix, token), value * share)

    extend((), 1.0)
    return found


@relaxed
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 3), st.integers(0, 5))
def test_looked_up_paths_stand_among_the_heads(
    seed: int, heads: int, ranks: int, reach: int
) -> None:
    rng = np.random.default_rng(seed)
    shares = -np.sort(-rng.dirichlet(np.ones(6), heads), 1)[:, :ranks]
    log_probs = np.log(shares).astype(np.float32)
    tokens = np.stack([rng.permutation(6)[:ranks] for _ in range(heads)])
    path = rng.integers(0, 6, reach)
    worth = np.log(rng.uniform(0.05, 0.95, reach)).astype(np.float32)
    size = int(rng.integers(0, 40))
    (tree,) = grow(
        tokens[None], log_probs[None], np.array([size]), (path[None], worth[None])
    )
    every = all_paths(tokens, log_probs, path.tolist(), worth)
    best = sorted(every.values(), reverse=True)[:size]
    np.testing.assert_allclose(np.exp(tree.score), best, rtol=1e-4)
    grown = [
        tuple(tree.token[np.array(tree.path(node)) - 1]) for node in range(1, len(tree) + 1)
    ]
    assert len(set(grown)) == len(grown)
    assert tree.looked_up is not None
    on_path = [list(one) == path[: len(one)].tolist() for one in grown]
    assert tree.looked_up.tolist() == on_path
    values = [every[one] for one in grown]
    np.testing.assert_allclose(np.exp(tree.score), values, rtol=1e-4)


def test_nothing_looked_up_changes_nothing() -> None:
    rng = np.random.default_rng(3)
    log_probs = np.log(-np.sort(-rng.dirichlet(np.ones(9), (2, 4)))).astype(np.float32)
    tokens, sizes = numbered(log_probs), np.array([30, 7])
    nothing = np.full((2, 6), -1), np.full((2, 6), -np.inf, np.float32)
    trees = grow(tokens, log_probs, sizes)
    for one, other in zip(trees, grow(tokens, log_probs, sizes, nothing), strict=True):
        assert same(one, other)


@pytest.mark.parametrize("size", [0, 1, 3, 5, 8])
def test_one_rank_gives_a_chain_as_long_as_there_are_heads(size: int) -> None:
    tree = grow_one(np.full((5, 1), -0.5, np.float32), size)
    length = min(size, 5)
    np.testing.assert_array_equal(tree.parent, np.arange(length))
    np.testing.assert_array_equal(tree.token, np.arange(length))


def test_scores_of_realistic_trees_are_sums_of_log_probs() -> None:
    rng = np.random.default_rng(0)
    log_probs = np.log(-np.sort(-rng.dirichlet(np.full(10, 0.3), 5)))[:, :8]
    tree = grow_one(log_probs.astype(np.float32), 255)
    assert len(tree) == 255
    for node in range(1, 256):
        tokens = tree.token[np.array(tree.path(node)) - 1]
        total = log_probs.flat[tokens].sum()
        assert tree.score[node - 1] == pytest.approx(total, rel=1e-5)


def test_hopeless_candidates_come_last() -> None:
    log_probs = np.array([[-1, -np.inf], [-2, -np.inf]], np.float32)
    tree = grow_one(log_probs, 9)
    assert len(tree) == 6
    np.testing.assert_array_equal(tree.score, [-1, -3] + [-np.inf] * 4)


@pytest.mark.parametrize(
    ("tokens", "log_probs", "sizes"),
    [
        ((1, 0, 3), (1, 0, 3), 1),
        ((1, 3, 0), (1, 3, 0), 1),
        ((1, 3, 2), (1, 2, 3), 1),
        ((1, 3, 2), (1, 3, 2), 2),
    ],
    ids=["no heads", "no ranks", "other log probs", "more sizes"],
)
def test_shapes_that_would_be_read_past_are_refused(
    tokens: tuple[int, ...], log_probs: tuple[int, ...], sizes: int
) -> None:
    with pytest.raises(ValueError, match="at least one head"):
        grow(np.zeros(tokens, np.int64), np.zeros(log_probs, np.float32), np.ones(sizes))


def test_no_sequences_give_no_trees() -> None:
    empty = np.empty((0, 3, 2))
    assert grow(empty.astype(np.int64), empty.astype(np.float32), np.empty(0, int)) == []


@given(st.integers(1, 255), st.integers(2, 8192), st.integers(1, 512))
def test_trees_leave_half_the_budget_to_prompts(
    wanted: int, budget: int, sequences: int
) -> None:
    nodes = nodes_per_sequence(wanted, budget, sequences)
    assert 0 <= nodes <= wanted
    assert nodes == 0 or sequences * (1 + nodes) <= budget / 2
    assert nodes == wanted or sequences * (2 + nodes) > budget // 2
