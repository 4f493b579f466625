"""Replayed recordings against a walk that looks at one node at a time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prices import Always, Line

from vllm_propd.config import ProPDConfig
from vllm_propd.core.drafting.growth import grow
from vllm_propd.core.sizing.backoff import LOAN
from vllm_propd.core.sizing.planner import Planner
from vllm_propd.core.tree import TokenTree
from vllm_propd.simulation.planned_replay import replay_planned
from vllm_propd.simulation.replay import RecordedText, replay

HEADS, RANKS, NODES, PLACES, VOCAB = 3, 4, 20, 30, 6


def recorded(seed: int) -> RecordedText:
    """A text, and trees whose candidates are often right."""
    rng = np.random.default_rng(seed)
    text = rng.integers(0, VOCAB, PLACES)
    tokens = np.argsort(rng.random((PLACES, HEADS, VOCAB)), -1)[..., :RANKS]
    said = -np.sort(rng.exponential(1.0, (PLACES, HEADS, RANKS)), -1).astype(np.float32)
    trees = grow(tokens, said, np.full(PLACES, NODES))
    assert all(len(tree) == NODES for tree in trees)

    def columns(name: str) -> np.ndarray:
        return np.stack([getattr(tree, name) for tree in trees])

    return RecordedText(
        columns("token"), columns("parent"), columns("depth"), columns("score"), text,
        early_rank=rng.integers(0, 5, (PLACES, NODES)),
        early_log_prob=-rng.exponential(1.0, (PLACES, NODES)).astype(np.float32),
    )  # fmt: skip


def naive(text: RecordedText, config: ProPDConfig) -> tuple[int, int, int, int]:
    """Steps, tokens, drafted and kept nodes."""
    at = steps = tokens = drafted = kept = 0
    assert text.early_rank is not None and text.early_log_prob is not None
    while at <= PLACES - HEADS:
        rows = (text.token[at], text.parent[at], text.depth[at], text.score[at])
        tree = TokenTree(*rows)
        children: dict[int, list[int]] = {}
        for node in range(1, NODES + 1):
            children.setdefault(int(tree.parent[node - 1]), []).append(node)
        if config.tree == "chain":
            chosen, node = [], 0
            while node in children and len(chosen) < config.num_speculative_tokens:
                node = children[node][0]
                chosen.append(node)
        else:
            chosen = list(range(1, config.num_speculative_tokens + 1))
        left = set(chosen)
        if config.pruning == "top_k":
            for node in chosen:
                if any(text.early_rank[at, n - 1] >= config.top_k for n in tree.path(node)):
                    left.discard(node)
        elif config.pruning == "path_probability":
            worth = {
                node: sum(float(text.early_log_prob[at, n - 1]) for n in tree.path(node))
                + config.draft_weight * float(tree.score[node - 1])
                for node in chosen
            }
            left = set(sorted(chosen, key=lambda n: -worth[n])[: config.keep_nodes])
        node = depth = 0
        while True:
            found = [
                n
                for n in children.get(node, [])
                if n in left and tree.token[n - 1] == text.text[at + depth]
            ]
            if not found:
                break
            node, depth = found[0], depth + 1
            if at + depth >= PLACES:
                break
        missing = 0
        if config.tree == "chain":
            missing = config.num_speculative_tokens - len(chosen)
        drafted, kept = drafted + len(chosen) + missing, kept + len(left) + missing
        steps += 1
        tokens, at = tokens + depth + 1, at + depth + 1
    return steps, tokens, drafted, kept


CONFIGS = [
    ProPDConfig(num_speculative_tokens=20),
    ProPDConfig(num_speculative_tokens=7),
    ProPDConfig(num_speculative_tokens=3, tree="chain"),
    ProPDConfig(num_speculative_tokens=2, tree="chain"),
    ProPDConfig(num_speculative_tokens=20, pruning="top_k", top_k=2),
    ProPDConfig(num_speculative_tokens=11, pruning="path_probability", keep_nodes=4),
    ProPDConfig(
        num_speculative_tokens=20, pruning="path_probability", keep_nodes=5,
        draft_weight=0.0,
    ),
]  # fmt: skip


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1 << 30), st.sampled_from(CONFIGS))
def test_a_replay_is_the_walk_of_an_engine(seed: int, config: ProPDConfig) -> None:
    texts = [recorded(seed), recorded(seed + 1)]
    found = replay(texts, config)
    expected = np.sum([naive(text, config) for text in texts], 0)
    assert [found.steps, found.tokens] == expected[:2].tolist()
    assert found.drafted == pytest.approx(expected[2] / expected[0])
    assert found.kept == pytest.approx(expected[3] / expected[0])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ProPDConfig(num_speculative_tokens=21), "trees of 20 nodes, not of 21"),
        (ProPDConfig(node_values="rank_accuracy"), "head_probability"),
    ],
)
def test_what_a_recording_cannot_tell_is_refused(config: ProPDConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replay([recorded(0)], config)


def test_pruning_needs_a_recorded_early_head() -> None:
    text = recorded(0)
    text = RecordedText(text.token, text.parent, text.depth, text.score, text.text)
    config = ProPDConfig(num_speculative_tokens=8, pruning="top_k")
    with pytest.raises(ValueError, match="no early head in this recording"):
        replay([text], config)
    assert replay([text], ProPDConfig(num_speculative_tokens=8)).kept == 8


def test_too_short_texts_are_refused() -> None:
    text = recorded(0)
    first = [a[:1] for a in (text.token, text.parent, text.depth, text.score)]
    short = RecordedText(*first, text=text.text[:1])
    config = ProPDConfig(num_speculative_tokens=8)
    with pytest.raises(ValueError, match="too short"):
        replay([short], config)
    with pytest.raises(ValueError, match="too short"):
        replay_planned([short], config, Planner(Line(1.0)), Line(0.0), 1)


def test_plans_that_draft_all_nodes_walk_as_fixed_sizes_do() -> None:
    texts, config = [recorded(0)], ProPDConfig(num_speculative_tokens=NODES)
    found = replay_planned(texts, config, Planner(Line(1.0)), Line(0.0), 1)
    fixed = replay(texts, config)
    assert (found.drafted, found.kept) == (NODES, NODES)
    assert found.tokens_per_step == pytest.approx(fixed.tokens_per_step, rel=0.1)


@pytest.mark.parametrize("batch_size", [2, 5])
def test_a_planned_batch_stays_full(batch_size: int) -> None:
    """Of texts that end at different steps, and of more sequences than there are texts."""
    texts, config = [recorded(0), recorded(1)], ProPDConfig(num_speculative_tokens=NODES)
    planner = Planner(Line(1.0, 1e-4))
    found = replay_planned(texts, config, planner, Line(0.25), batch_size)
    assert found.step_s == pytest.approx(1.25 + 1e-4 * batch_size * (1 + NODES))
    assert found.steps % batch_size == 0
    assert found.tokens >= 2 * (PLACES - HEADS + 1)


def test_heads_that_are_asked_in_vain_are_paid() -> None:
    """What they take is in every step in which they are asked, which soon are few."""
    texts, config = [recorded(0)], ProPDConfig(num_speculative_tokens=NODES)
    dear, draft = Planner(Line(2.0, 10.0, flat=2)), Line(2.0)
    found = replay_planned(texts, config, dear, draft, 2, Always())
    assert (found.drafted, found.step_s) == (0, pytest.approx(4.0))
    seldom = replay_planned(texts, config, dear, draft, 2)
    asked = (seldom.step_s - 2.0) * seldom.steps / 2 / 2.0
    assert LOAN <= asked < LOAN + 3 < seldom.steps / 2
