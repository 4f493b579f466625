"""States that are no numbers, as of a prompt's own embeddings, cost nobody else a step.

Plain vLLM puts out a token there as anywhere, and goes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm_propd.core.drafting.candidates import Candidates
from vllm_propd.core.drafting.growth import grow_from
from vllm_propd.core.drafting.prices import Prices
from vllm_propd.core.drafting.reliability import Reliability
from vllm_propd.core.sizing.controller import DynamicSizing
from vllm_propd.core.sizing.node_values import NodeValues
from vllm_propd.core.sizing.protocol import Drafts, StepLoad
from vllm_propd.core.sizing.step_cost import StepCost
from vllm_propd.engine.step.draft_vocabulary import DraftVocabulary
from vllm_propd.engine.step.propose import MedusaTreeProposer
from vllm_propd.heads.transition import Transition

HEADS, HIDDEN, TOKENS, RANKS = 3, 8, 20, 4

terms = pytest.mark.parametrize("coupled", [False, True], ids=["medusa", "transition"])


@dataclass
class Heads:
    """Heads that all say the same."""

    num_heads: int = HEADS
    knows_root: bool = False

    def __call__(self, states: torch.Tensor, roots: torch.Tensor | None) -> torch.Tensor:
        return states.expand(HEADS, -1, -1)


def asked(states: torch.Tensor, coupled: bool) -> Candidates:
    """What a proposer returns whose output layer is random."""
    torch.manual_seed(0)
    weight = torch.randn(TOKENS, HIDDEN)
    vocabulary = object.__new__(DraftVocabulary)
    vocabulary.tokens, vocabulary._output = None, lambda states: states @ weight.T
    vocabulary._transition = Transition(TOKENS, 2) if coupled else None
    vocabulary._place = torch.arange(TOKENS)
    proposer = object.__new__(MedusaTreeProposer)
    proposer.heads, proposer.vocabulary = Heads(), vocabulary
    proposer.config = SimpleNamespace(ranks=RANKS)
    return proposer.candidates(states)


def states() -> torch.Tensor:
    """Of a healthy sequence, of one of NaN, and of one that overflows."""
    torch.manual_seed(1)
    healthy = torch.randn(1, HIDDEN)
    overflowing = torch.nn.functional.one_hot(torch.zeros(1).long(), HIDDEN) * 3e38
    return torch.cat([healthy, torch.full_like(healthy, torch.nan), overflowing * 4])


@terms
def test_nothing_is_said_in_nan_and_others_say_what_they_would(coupled: bool) -> None:
    found, alone = asked(states(), coupled), asked(states()[:1], coupled)
    assert (found.log_probs <= 0).all()
    for ours, expected in zip(
        vars(found.one(0)).values(), vars(alone).values(), strict=True
    ):
        np.testing.assert_allclose(ours, expected, rtol=1e-5)
    assert np.isfinite(alone.log_probs).all()


@terms
@pytest.mark.parametrize("priced", [False, True], ids=["as said", "priced"])
def test_accounts_stay_finite(coupled: bool, priced: bool) -> None:
    found = asked(states(), coupled)
    if priced:
        prices = Prices(Reliability(HEADS), Reliability(HEADS))
        sampled = np.array([False, True, False])
        found = found.valued(prices.values(sampled, found.log_probs))
    trees = grow_from(found, np.full(3, 8))
    assert all((tree.score <= 0).all() for tree in trees)
    cost = StepCost(np.array([1, 64]), np.array([1.0, 1.0]))
    draft = StepCost(np.array([1, 64]), np.array([1e-4, 1e-4]))
    sizing = DynamicSizing(cost, draft, 8, 256, promised={8: 3.0}, clock=lambda: 0.0)
    nodes = 0
    for _ in range(4):
        drafting = sizing.begin(0.0, StepLoad(3, 3 + nodes, 0, nodes)).verified(None)
        asks = drafting.asks_heads(None)
        if asks:
            nodes = int(drafting.plan(Drafts(NodeValues.of(trees), 0.0)).sizes.sum())
        assert np.isfinite(drafting.end(0, 3).expected_tokens)
        assert asks and nodes  # as the healthy sequence has it
    assert np.isfinite(list(vars(sizing.backoff.now).values())).all()


@terms
def test_they_teach_nothing(coupled: bool) -> None:
    """Their text is token 0, again and again, and some head may well have said that."""
    known = Reliability(HEADS)
    before = np.stack(known.curve())
    tokens, said = asked(states()[1:2], coupled).along(np.zeros((1, HEADS), np.int64))
    for _ in range(100):
        known.observe(np.ones(tokens.shape, np.bool_), said)
    np.testing.assert_array_equal(np.stack(known.curve()), before)
