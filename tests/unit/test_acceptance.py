"""Acceptance: the kernels against naive walks, and a proof that exact is exact.

The proof enumerates every outcome of the draws at every node of a tree. No sampling:
the emitted sequences' probabilities are compared with the target's own.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import product

import numpy as np
import pytest
import torch

from vllm_propd.core.acceptance import matching_child, typical_nodes

VOCAB = 3
EPSILON, DELTA = 0.09, 0.3
seeds = pytest.mark.parametrize("seed", range(20))


def random_tree(
    rng: np.random.Generator, nodes: int, vocab: int
) -> tuple[list[int], list[int], list[int]]:
    """Parent, token and depth of each row (root first); siblings differ in token."""
    parent, token, depth = [-1], [-1], [0]
    while len(parent) <= nodes:
        place, word = int(rng.integers(len(parent))), int(rng.integers(vocab))
        if (place, word) not in zip(parent, token, strict=True):
            parent, token = [*parent, place], [*token, word]
            depth.append(depth[place] + 1)
    return parent, token, depth


@seeds
def test_matching_child_steps_like_a_naive_walk(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, roots, children = [], [], {}
    for request, size in enumerate(rng.integers(0, 12, 7)):
        parent, token, _ = random_tree(rng, int(size), VOCAB)
        root = len(rows)
        roots.append(root)
        rows.append((root, -1, request))
        for node in range(1, len(parent)):
            children[root + parent[node], token[node]] = len(rows)
            rows.append((root + parent[node], token[node], request))
        rows.append((root, -1, request))  # can never be accepted
    columns = np.array(rows).T
    current = np.array(roots)
    while (current >= 0).any():
        drawn = rng.integers(0, VOCAB, len(roots))
        pairs = zip(current.tolist(), drawn.tolist(), strict=True)
        expected = [children.get(pair, -1) for pair in pairs]
        current = matching_child(current, drawn, *columns)
        assert current.tolist() == expected


@seeds
def test_typical_nodes_follow_the_rule_node_by_node(seed: int) -> None:
    rng = np.random.default_rng(seed)
    parent, token, _ = random_tree(rng, 40, 30)
    token[1 + seed] = -1
    probs = rng.dirichlet(np.full(30, 0.1), len(parent)).astype(np.float32)
    probs[seed % 7] = np.eye(30)[seed]  # certainty: entropy 0
    accepted = [True]
    for node in range(1, len(parent)):
        at = probs[parent[node]].astype(np.float64)
        entropy = -sum(p * np.log(p) for p in at if p > 0)
        likely = at[token[node]] > min(EPSILON, DELTA * np.exp(-entropy))
        accepted.append(bool(accepted[parent[node]] and token[node] >= 0 and likely))
    # Rows of the batch in another order than the nodes.
    row = rng.permutation(len(parent))
    found = typical_nodes(
        torch.from_numpy(probs[np.argsort(row)]),
        *(torch.tensor(a[1:]) for a in (row[parent], token, row)),
        EPSILON,
        DELTA,
    )
    assert found.tolist() == accepted[1:]


def test_a_batch_without_nodes_accepts_nothing() -> None:
    none = torch.empty(0, dtype=torch.int64)
    probs = torch.full((2, VOCAB), 1 / VOCAB)
    assert len(typical_nodes(probs, none, none, none, EPSILON, DELTA)) == 0
    nothing = np.empty(0, np.int64)
    step = matching_child(np.array([-1, -1]), np.zeros(2, np.int64), *[nothing] * 3)
    assert step.tolist() == [-1, -1]


class Enumeration:
    """All ``VOCAB ** rows`` outcomes of one draw per row, each a request of its own."""

    def __init__(self, seed: int, nodes: int = 5) -> None:
        rng = np.random.default_rng(seed)
        self.parent, self.token, self.depth = random_tree(rng, nodes, VOCAB)
        self.probs = rng.dirichlet(np.ones(VOCAB), nodes + 1)
        outcomes = np.array(list(product(range(VOCAB), repeat=nodes + 1)))
        self.outcomes = outcomes
        self.weight = self.probs[np.arange(nodes + 1), outcomes].prod(1)

    def walk(self, accepted: list[bool]) -> dict[tuple[int, ...], float]:
        """Each emitted sequence's probability; ``accepted`` nodes need no draw."""
        rows, trees = len(self.parent), len(self.outcomes)
        parent, token = np.tile(self.parent, trees), np.tile(self.token, trees)
        request = np.arange(trees).repeat(rows)
        # A root is its own parent.
        parent = np.where(parent < 0, 0, parent) + request * rows
        forced = {
            self.parent[node]: self.token[node]
            for node in range(rows - 1, 0, -1)
            if accepted[node]
        }
        current, emitted = np.arange(trees) * rows, [[] for _ in range(trees)]
        while (current >= 0).any():
            at = current % rows
            drawn = np.take_along_axis(self.outcomes, at[:, None], 1)[:, 0]
            for node, word in forced.items():
                drawn = np.where(at == node, word, drawn)
            for text, word, place in zip(emitted, drawn, current, strict=True):
                text += [int(word)] if place >= 0 else []
            current = matching_child(current, drawn, parent, token, request)
        totals: dict[tuple[int, ...], float] = defaultdict(float)
        for text, weight in zip(emitted, self.weight, strict=True):
            totals[tuple(text)] += weight
        return totals

    def target(self, text: tuple[int, ...]) -> float:
        """The product of the target's conditional probabilities along ``text``."""
        siblings = zip(self.parent, self.token, strict=True)
        child = {pair: node for node, pair in enumerate(siblings)}
        at, probability = 0, 1.0
        for word in text:
            probability *= self.probs[at, word]
            at = child.get((at, word), -1)  # -1 after the last word only
        return probability


@seeds
def test_exact_acceptance_emits_the_targets_distribution(seed: int) -> None:
    case = Enumeration(seed)
    totals = case.walk([False] * len(case.parent))
    assert sum(totals.values()) == pytest.approx(1)
    for text, probability in totals.items():
        assert probability == pytest.approx(case.target(text), rel=1e-12)
    # The emitted texts are all the ways to leave the tree: none is a prefix of another.
    assert len(totals) == 1 + len(case.token) * (VOCAB - 1)
    assert not any(a != b and a == b[: len(a)] for a, b in product(totals, totals))


@seeds
def test_typical_acceptance_distorts_it_wherever_it_accepts(seed: int) -> None:
    case = Enumeration(seed)
    columns = (case.parent[1:], case.token[1:])
    accepted = typical_nodes(
        torch.from_numpy(case.probs),
        *map(torch.tensor, columns),
        torch.arange(1, len(case.parent)),
        EPSILON,
        DELTA,
    )
    totals = case.walk([True, *accepted.tolist()])
    assert sum(totals.values()) == pytest.approx(1)
    gap = sum(abs(p - case.target(text)) for text, p in totals.items())
    assert gap > 0.01 if accepted.any() else gap == pytest.approx(0)
