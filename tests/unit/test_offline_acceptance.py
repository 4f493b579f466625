"""Walking over a known text, against a walk that knows nothing of node indices."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_propd.core.drafting.growth import grow
from vllm_propd.core.tree import TokenTree
from vllm_propd.simulation.offline_acceptance import accepted_path, tokens_per_step

relaxed = settings(deadline=None)
VOCAB = 4  # small, so that drafts are often right


@dataclass
class Drafted:
    """A text, and the trees drafted at its positions."""

    trees: list[TokenTree]
    truths: list[np.ndarray]

    def paths(self) -> list[list[int]]:
        both = zip(self.trees, self.truths, strict=True)
        return [accepted_path(tree, truth) for tree, truth in both]


@st.composite
def drafted(draw: st.DrawFn) -> Drafted:
    """Trees grown on candidates that a seed draws, and the text that follows each."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    positions, heads = draw(st.integers(1, 12)), draw(st.integers(1, 4))
    ranks = draw(st.integers(1, VOCAB))
    shape = (positions, heads, VOCAB)
    tokens = rng.permuted(np.broadcast_to(np.arange(VOCAB), shape), axis=-1)[..., :ranks]
    values = -np.sort(rng.exponential(size=(positions, heads, ranks)))
    sizes = rng.integers(0, 40, positions)
    trees = grow(tokens.astype(np.int64).copy(), values.astype(np.float32), sizes)
    text = rng.integers(0, VOCAB, positions + heads)
    truths = [text[t + 1 : t + 1 + heads] for t in range(positions)]
    return Drafted(trees, truths)


def matches(tree: TokenTree, truth: np.ndarray) -> list[int]:
    """The longest path of the tree that the truth begins with, of all paths tried."""
    paths = [tree.path(node) for node in range(len(tree) + 1)]
    begun = [
        p
        for p in paths
        if tree.token[np.array(p, int) - 1].tolist() == truth[: len(p)].tolist()
    ]
    return max(begun, key=len)


def walked(drafts: Drafted, nodes: int) -> list[int]:
    """Tokens of each step with trees cut to ``nodes`` nodes."""
    steps, at = [], 0
    while at < len(drafts.trees):
        accepted = matches(drafts.trees[at].prefix(nodes), drafts.truths[at])
        steps.append(len(accepted) + 1)
        at += steps[-1]
    return steps


@relaxed
@given(drafted())
def test_the_accepted_path_is_the_longest_that_the_text_begins_with(
    drafts: Drafted,
) -> None:
    both = zip(drafts.trees, drafts.truths, strict=True)
    assert drafts.paths() == [matches(tree, truth) for tree, truth in both]


@relaxed
@given(drafted(), st.integers(0, 40))
def test_nodes_up_to_a_size_are_the_path_of_the_cut_tree(
    drafts: Drafted, nodes: int
) -> None:
    for tree, truth in zip(drafts.trees, drafts.truths, strict=True):
        path = accepted_path(tree, truth)
        assert path == sorted(path)
        cut = accepted_path(tree.prefix(nodes), truth)
        assert cut == [node for node in path if node <= nodes]


@relaxed
@given(st.lists(drafted(), min_size=1, max_size=3), st.integers(0, 40))
def test_tokens_per_step_is_the_mean_over_the_steps_walked(
    sequences: list[Drafted], nodes: int
) -> None:
    steps = [tokens for drafts in sequences for tokens in walked(drafts, nodes)]
    paths = [drafts.paths() for drafts in sequences]
    assert tokens_per_step(paths, nodes) == pytest.approx(np.mean(steps))


def test_steps_jump_over_what_they_accept() -> None:
    # A step of 3 tokens, one of 1, and one of 2; the other positions are never stood on.
    paths = [[[1, 2], [1], [1, 2, 3], [], [4], []]]
    assert tokens_per_step(paths, 4) == 2
    assert tokens_per_step(paths, 2) == pytest.approx((3 + 1 + 1 + 1) / 4)
    assert tokens_per_step(paths, 0) == 1


@pytest.mark.parametrize("paths", [[], [[]], [[], []]])
def test_a_walk_needs_a_position(paths: list[list[list[int]]]) -> None:
    with pytest.raises(ValueError, match="no position to walk over"):
        tokens_per_step(paths, 4)
