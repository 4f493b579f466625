"""Recorded trees, replayed with other settings: no engine, seconds instead of minutes.

A recording holds the whole tree at every place of a text, none skipped, with what the
early head says of each node. Which nodes lie on the text, which a rule would have kept and
where the next step would have begun follow from that for every smaller or pruned tree.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_propd.config import ProPDConfig
from vllm_propd.core.pruning import (
    edges_of,
    keep_best_paths,
    keep_top_k,
    node_log_probs,
    own_part,
)
from vllm_propd.core.tree import Bools, Ints


@dataclass(frozen=True)
class RecordedText:
    """One recorded sequence: a tree at each place of its text.

    Attributes:
        token, parent, depth: ``[places, nodes]`` int64 fields of the tree drafted at each
            place, as in ``TokenTree``.
        score: ``[places, nodes]`` float32 scores of its nodes, as in ``TokenTree``.
        text: ``[places]`` int64 the token that came at each place: what a node of depth 1
            of this place's tree drafts.
        early_rank: ``[places, nodes]`` int64 how many tokens the early head preferred to
            the node's, after the node's parent; None without an early head.
        early_log_prob: ``[places, nodes]`` float32 log probability that the early head
            gave the node's token; None without an early head.
    """

    token: Ints
    parent: Ints
    depth: Ints
    score: npt.NDArray[np.float32]
    text: Ints
    early_rank: Ints | None = None
    early_log_prob: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Replayed:
    """What a setting would have given on recorded texts.

    Attributes:
        steps, tokens: steps and new tokens of all sequences, the bonus counted.
        drafted, kept: mean nodes of a sequence's step, before and after pruning.
    """

    steps: int
    tokens: int
    drafted: float
    kept: float

    @property
    def tokens_per_step(self) -> float:
        """New tokens of a sequence per step, the bonus included."""
        return self.tokens / self.steps


def replay(texts: list[RecordedText], config: ProPDConfig) -> Replayed:
    """Walks over recorded texts as an engine with this config would.

    Args:
        texts: recorded with trees at least as large as the config's.
        config: tree, size and pruning count; its sizes are taken as fixed.

    Raises:
        ValueError: the recording cannot tell: other node values, larger trees, or pruning
            without a recorded early head; or it is too short.
    """
    if config.node_values != "head_probability":
        raise ValueError("a recording knows node_values 'head_probability' only")
    steps = tokens = drafted = kept = 0
    for text in texts:
        chosen = _chosen(text, config)
        stays = chosen & _kept(text, chosen, config)
        unknown = _unknown(text, chosen, config)
        accepted = (stays & on_text(text)).sum(1)
        at = 0
        while at < places_of(text):
            steps += 1
            drafted += int(chosen[at].sum() + unknown[at])
            kept += int(stays[at].sum() + unknown[at])
            tokens += int(accepted[at]) + 1
            at += int(accepted[at]) + 1
    if not steps:
        raise ValueError("the recorded texts are too short to replay")
    return Replayed(steps, tokens, drafted / steps, kept / steps)


def places_of(text: RecordedText) -> int:
    """Returns how many places have trees whose deepest nodes lie within the text."""
    return max(0, len(text.text) - int(text.depth.max(initial=0)) + 1)


def on_text(text: RecordedText) -> Bools:
    """Returns ``[places, nodes]`` bool which nodes the text took, with all ancestors."""
    place = np.arange(len(text.text))[:, None] + text.depth - 1
    known = place < len(text.text)
    right = known & (text.token == text.text[np.minimum(place, len(text.text) - 1)])
    return _with_ancestors(right, text)


def _with_ancestors(nodes: Bools, text: RecordedText) -> Bools:
    """Returns those of ``nodes`` whose ancestors are all among them, too."""
    found = np.concatenate([np.ones((len(nodes), 1), np.bool_), nodes], 1)
    for level in range(1, int(text.depth.max(initial=0)) + 1):
        place, node = np.nonzero(text.depth == level)
        found[place, node + 1] &= found[place, text.parent[place, node]]
    return found[:, 1:]


def _chosen(text: RecordedText, config: ProPDConfig) -> Bools:
    """Returns ``[places, nodes]`` bool the nodes that this config would have drafted."""
    nodes = text.token.shape[1]
    wanted = config.num_speculative_tokens
    if config.tree == "best_first":
        if wanted > nodes:
            raise ValueError(f"recorded were trees of {nodes} nodes, not of {wanted}")
        return np.tile(np.arange(nodes) < wanted, (len(text.text), 1))
    # In best-first order the first child of a node is its head's first choice.
    order = np.lexsort((np.arange(nodes) + 0 * text.parent, text.parent))
    in_order = np.take_along_axis(text.parent, order, 1)
    first = np.diff(in_order, prepend=-1, axis=1) != 0
    best = np.zeros_like(first)
    np.put_along_axis(best, order, first, 1)
    return _with_ancestors(best, text) & (text.depth <= wanted)


def _unknown(text: RecordedText, chosen: Bools, config: ProPDConfig) -> Ints:
    """Counts ``[places]`` a chain's nodes that are too improbable for the recorded tree.

    They are taken as drafted, kept and wrong.
    """
    if config.tree != "chain":
        return np.zeros(len(chosen), np.int64)
    wanted = min(config.num_speculative_tokens, int(text.depth.max(initial=0)))
    return wanted - chosen.sum(1)


def _kept(text: RecordedText, chosen: Bools, config: ProPDConfig) -> Bools:
    """Returns ``[places, nodes]`` bool the nodes that the config's rule would have kept."""
    if not config.has_rule:
        return np.ones_like(chosen)
    if text.early_rank is None or text.early_log_prob is None:
        raise ValueError("there is no early head in this recording")
    places, nodes = chosen.shape
    # All places in one batch of trees, each with its root; what was not drafted is last.
    size = nodes + 1
    base = np.arange(places)[:, None] * size
    roots = np.zeros((places, 1), np.int64)
    depth = np.concatenate([roots, text.depth], 1).ravel()
    parent_row = (np.concatenate([roots, text.parent], 1) + base).ravel()
    tree = np.repeat(np.arange(places), size)
    edges = edges_of(parent_row, depth)
    if config.pruning == "top_k":
        rank = text.early_rank.ravel()
        keep = keep_top_k(rank, edges, parent_row, depth, config.top_k)
    else:
        said = own_part(text.score.ravel(), edges, parent_row)
        early = text.early_log_prob.ravel()
        log_prob = node_log_probs(early, said, config.draft_weight)
        log_prob = np.where(chosen.ravel(), log_prob, -np.inf).astype(np.float32)
        keep = keep_best_paths(log_prob, edges, parent_row, depth, tree, config.keep_nodes)
    return keep.reshape(places, size)[:, 1:]
