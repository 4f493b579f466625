"""Verification: a walk down each tree with vLLM's own sampler at every node.

At each depth the sampler sees one row per request, the node it stands on, and the
request's history including the path: exactly what it would see if the path had been
decoded token by token. So every SamplingParams field, every logits processor and every
seed acts as in plain vLLM; a seeded request even draws the same random numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from vllm_propd.config import ProPDConfig
from vllm_propd.core.acceptance import matching_child, typical_nodes
from vllm_propd.engine.step import TreeStep

GREEDY_BELOW = 1e-5
"""Temperatures that vLLM treats as greedy."""

PLACEHOLDER = -1
"""Marks, for vLLM, where a request's emitted tokens end."""


@dataclass
class Verified:
    """What one step accepted.

    Attributes:
        output: the emitted tokens per request, in vLLM's form.
        final_row: ``[requests]`` int64 logits row of the last accepted node (or root):
            the next tree is drafted from its hidden state.
        accepted: int64 indices among the step's tree rows of the accepted nodes.
    """

    output: SamplerOutput
    final_row: torch.Tensor
    accepted: np.ndarray


@dataclass
class _Nodes:
    """The drafted nodes of a step, by rows of the logits."""

    parent_row: torch.Tensor
    token: torch.Tensor
    request: torch.Tensor
    row: torch.Tensor
    depth: torch.Tensor
    tree_row: torch.Tensor


def _nodes(step: TreeStep, root_row: np.ndarray) -> _Nodes:
    """Logits rows of a tree follow its root's, in the tree's order."""
    drafted = np.flatnonzero(~step.is_root)
    base = np.repeat(root_row[step.request], step.sizes)
    row = base + np.arange(len(base)) - np.repeat(step.first, step.sizes)
    request = np.repeat(step.request, step.sizes)

    def pick(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values[drafted])

    return _Nodes(
        parent_row=pick(base + step.parent),
        token=pick(step.token),
        request=pick(request),
        row=pick(row),
        depth=pick(step.depth),
        tree_row=torch.from_numpy(drafted),
    )


@contextmanager
def _history(outputs: list[list[int]]) -> Iterator[None]:
    """Lets the walk append to the requests' outputs, and takes it all back."""
    lengths = [len(output) for output in outputs]
    try:
        yield
    finally:
        for output, length in zip(outputs, lengths, strict=True):
            del output[length:]


def verify(
    logits: torch.Tensor,
    step: TreeStep,
    root_row: np.ndarray,
    sampler: Sampler,
    metadata: SamplingMetadata,
    outputs: list[list[int]],
    config: ProPDConfig,
) -> Verified:
    """Accepts the longest path of each tree that the target agrees with, and a bonus.

    Args:
        logits: ``[logits rows, vocabulary]``: for each request its root's row, then its
            drafted nodes'.
        step: this step's trees.
        root_row: ``[requests]`` int64 logits row of each request's root.
        sampler: vLLM's.
        metadata: vLLM's, of the batch.
        outputs: each request's list of output tokens; what logits processors look at.
        config: the acceptance rule.
    """
    nodes = _nodes(step, root_row)
    forced = _typical_path(logits, nodes, metadata, config)
    current = torch.from_numpy(root_row)
    final_row = current.clone()
    active = torch.ones(len(current), dtype=torch.bool)
    emitted: list[torch.Tensor] = []
    logprobs: list[LogprobsTensors] = []
    accepted: list[torch.Tensor] = []
    with _history(outputs):
        for depth in range(int(step.depth.max()) + 1):
            if depth:
                metadata = _advance(metadata, outputs, emitted[-1], active)
            drawn = sampler(logits=logits[final_row], sampling_metadata=metadata)
            token = drawn.sampled_token_ids[:, 0].long()
            if forced is not None:
                token = torch.where(forced[depth] >= 0, forced[depth], token)
            emitted.append(torch.where(active, token, PLACEHOLDER))
            if drawn.logprobs_tensors is not None:
                logprobs.append(drawn.logprobs_tensors)
            current = matching_child(
                torch.where(active, final_row, -1), token,
                nodes.parent_row, nodes.token, nodes.request, nodes.row,
            )  # fmt: skip
            active = current >= 0
            if not active.any():
                break
            accepted.append(current[active])
            final_row = torch.where(active, current, final_row)
    return Verified(
        output=SamplerOutput(
            sampled_token_ids=torch.stack(emitted, 1).to(torch.int32),
            logprobs_tensors=_by_request(logprobs),
        ),
        final_row=final_row,
        accepted=_tree_rows(nodes, accepted),
    )


def _advance(
    metadata: SamplingMetadata,
    outputs: list[list[int]],
    emitted: torch.Tensor,
    active: torch.Tensor,
) -> SamplingMetadata:
    """The batch's metadata one token later.

    Requests that have stopped ride along, because vLLM's processors know requests by
    their index; but their random generators must not move on.
    """
    alive = active.tolist()
    for output, token, goes_on in zip(outputs, emitted.tolist(), alive, strict=True):
        if goes_on:
            output.append(token)
    for processor in metadata.logitsprocs.all:
        processor.update_state(None)
    if not metadata.generators:
        return metadata
    generators = {i: g for i, g in metadata.generators.items() if alive[i]}
    return replace(metadata, generators=generators)


def _by_request(steps: list[LogprobsTensors]) -> LogprobsTensors | None:
    """Per-depth logprobs in vLLM's order: all of a request's tokens, then the next's."""
    if not steps:
        return None

    def merge(tensors: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(tensors, 1).flatten(0, 1)

    return LogprobsTensors(
        merge([step.logprob_token_ids for step in steps]),
        merge([step.logprobs for step in steps]),
        merge([step.selected_token_ranks for step in steps]),
    )


def _tree_rows(nodes: _Nodes, accepted: list[torch.Tensor]) -> np.ndarray:
    if not accepted:
        return np.empty(0, np.int64)
    # Node rows ascend, so a search finds each accepted row's place.
    place = torch.searchsorted(nodes.row, torch.cat(accepted))
    return nodes.tree_row[place].numpy()


def _typical_path(
    logits: torch.Tensor,
    nodes: _Nodes,
    metadata: SamplingMetadata,
    config: ProPDConfig,
) -> torch.Tensor | None:
    """``[depths, requests]`` int64 tokens that typical acceptance takes; -1 elsewhere.

    Greedy requests and batches that want logprobs keep the exact rule.
    """
    exact = config.acceptance == "exact" or metadata.all_greedy
    if exact or metadata.max_num_logprobs is not None or not len(nodes.depth):
        return None
    assert metadata.temperature is not None
    temperature = metadata.temperature
    owner = torch.zeros(len(logits), dtype=torch.int64)
    owner[nodes.row] = nodes.request
    owner[nodes.parent_row] = nodes.request
    heat = torch.where(temperature < GREEDY_BELOW, 1.0, temperature)[owner]
    probs = (logits.float() / heat[:, None]).softmax(-1)
    likely = typical_nodes(
        probs, nodes.parent_row, nodes.token, nodes.depth, nodes.row,
        config.typical_epsilon, config.typical_delta,
    )  # fmt: skip
    likely &= temperature[nodes.request] >= GREEDY_BELOW
    depths = int(nodes.depth.max())
    path = torch.full((depths + 1, len(temperature)), PLACEHOLDER)
    for request in nodes.request.unique().tolist():
        mine = torch.nonzero(likely & (nodes.request == request))[:, 0]
        if not len(mine):
            continue
        # The deepest accepted node; of equals the first, the most probable draft.
        at = mine[nodes.depth[mine].argmax()]
        while True:
            path[nodes.depth[at] - 1, request] = nodes.token[at]
            if nodes.depth[at] == 1:
                break
            at = torch.nonzero(nodes.row == nodes.parent_row[at])[0, 0]
    return path
