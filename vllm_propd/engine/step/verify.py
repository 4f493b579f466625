"""Verification: a walk down each tree with vLLM's own sampler at every node.

At each depth the sampler sees one row per request, the node it stands on, and the
request's history including the path: exactly what it would see if the path had been
decoded token by token. So every SamplingParams field, every logits processor and every
seed acts as in plain vLLM; a seeded request even draws the same random numbers.

Where all requests are greedy and none asks for more, a row's token depends on its logits
alone. One call then draws for all rows, and the device is waited for once. Where some
sample, and none asks for more, the sampler sees at each depth only rows whose walk goes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.sample.sampler import Sampler

from vllm_propd.config import ProPDConfig
from vllm_propd.core.acceptance import matching_child, typical_nodes
from vllm_propd.core.tree import Bools, Ints
from vllm_propd.engine.step.request_ends import Answers
from vllm_propd.engine.step.sampling import (
    all_rows,
    drawn,
    leaves_as_they_are,
    of_rows,
    parts,
    rows_alone,
    sampled,
)
from vllm_propd.engine.step.states import Verified
from vllm_propd.engine.step.tree_step import TreeStep
from vllm_propd.kernels.transfer import to_device, to_host

GREEDY_BELOW = 1e-5
"""The temperature below which vLLM treats a request as greedy."""

PLACEHOLDER = -1
"""Marks, for vLLM, where a request's emitted tokens end."""

NO_NODE = -1
"""Stands for the node of a request that has no tree, or has left its tree."""


@contextmanager
def _history(outputs: list[list[int]]) -> Iterator[None]:
    """Lets the walk append to the requests' outputs, and takes it all back."""
    lengths = [len(output) for output in outputs]
    try:
        yield
    finally:
        for output, length in zip(outputs, lengths, strict=True):
            del output[length:]


def draw(
    logits: torch.Tensor | None,
    root_row: Ints,
    sampler: Sampler,
    metadata: SamplingMetadata,
    putting_out: Bools,
    keeps: bool,
) -> Verified:
    """Draws a token of each request, in a step without trees.

    Args:
        logits: ``[requests, vocabulary]``; None on ranks that have none.
        root_row, sampler, metadata, putting_out: see ``verify``.
        keeps: whether logits are to stay as the target has said them: a sampler leaves in
            them what it makes of them.
    """
    if keeps and logits is not None and not leaves_as_they_are(logits, metadata):
        logits = logits.clone()
    output = sampled(sampler, logits, metadata, putting_out)
    return Verified(
        output, root_row, np.empty(0, np.int64), root_row[:, None], putting_out.astype(int)
    )


def verify(
    logits: torch.Tensor,
    step: TreeStep,
    root_row: np.ndarray,
    sampler: Sampler,
    metadata: SamplingMetadata,
    putting_out: Bools,
    answers: Answers,
    config: ProPDConfig,
) -> Verified:
    """Accepts the longest path of each tree that the target agrees with, and a bonus.

    Args:
        logits: ``[logits rows, vocabulary]``: for each request its root's row, then its
            drafted nodes'.
        step: this step's trees.
        root_row: ``[requests]`` int64 logits row of each request's root.
        sampler: vLLM's sampler.
        metadata: the batch's metadata; see ``sampling.without_drafts``.
        putting_out: ``[requests]`` bool whether each puts out a token; a prompt that goes
            on does not, and draws nothing: its text is to be the same in any chunks.
        answers: what requests have put out, which logits processors look at, and where
            they end. No token is drawn behind that: it would take a seeded request's
            numbers from its session's next turn.
        config: says which acceptance rule applies.
    """
    request = step.request[step.tree]
    logits_row = root_row[request] + step.node
    forced = _typical_path(logits, logits_row, step, metadata, config)
    parent_row = step.parent_row
    current = np.full(len(root_row), NO_NODE)
    current[step.request] = step.first
    active = np.ones(len(root_row), np.bool_)
    final_row = root_row.copy()
    emitted: list[Ints] = []
    rows: list[Ints] = []
    logprobs: list[LogprobsTensors] = []
    accepted: list[Ints] = []
    of_row = all_rows(logits, sampler, metadata) if rows_alone(metadata) else None
    outputs = answers.outputs
    with _history(outputs):
        for depth in range(int(step.depth.max()) + 1):
            if of_row is not None:
                token = of_row[final_row]
            else:
                if depth:
                    _advance(metadata, outputs, emitted[-1], active)
                drawing = active & putting_out
                token, told = drawn(logits, final_row, sampler, metadata, drawing)
                if told is not None:
                    logprobs.append(told)
            if forced is not None:
                token = np.where(forced[depth] >= 0, forced[depth], token)
            emitted.append(np.where(active, token, PLACEHOLDER))
            rows.append(np.where(active, final_row, -1))
            current = matching_child(current, token, parent_row, step.token, request)
            if of_row is None:
                current[answers.ended(depth + 1, token)] = NO_NODE
            active = current >= 0
            reached = current[active]
            if not len(reached):
                break
            accepted.append(reached)
            final_row[active] = logits_row[reached]
    tokens = np.stack(emitted, 1)
    return Verified(
        output=SamplerOutput(
            sampled_token_ids=torch.from_numpy(tokens.astype(np.int32)),
            logprobs_tensors=_by_request(logprobs),
        ),
        final_row=final_row,
        accepted=np.concatenate([np.empty(0, np.int64), *accepted]),
        drawn=np.stack(rows, 1),
        put_out=np.where(putting_out, answers.lengths(tokens), 0),
    )


def _advance(
    metadata: SamplingMetadata,
    outputs: list[list[int]],
    emitted: Ints,
    active: np.ndarray,
) -> None:
    """Tells the batch's processors that requests are one token further."""
    alive = active.tolist()
    for output, token, goes_on in zip(outputs, emitted.tolist(), alive, strict=True):
        if goes_on:
            output.append(token)
    for processor in metadata.logitsprocs.all:
        processor.update_state(None)


def _by_request(steps: list[LogprobsTensors]) -> LogprobsTensors | None:
    """Puts the logprobs of each depth into vLLM's order: request by request."""
    if not steps:
        return None

    def merge(tensors: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(tensors, 1).flatten(0, 1)

    return LogprobsTensors(
        merge([step.logprob_token_ids for step in steps]),
        merge([step.logprobs for step in steps]),
        merge([step.selected_token_ranks for step in steps]),
    )


def _typical_path(
    logits: torch.Tensor,
    logits_row: Ints,
    step: TreeStep,
    metadata: SamplingMetadata,
    config: ProPDConfig,
) -> Ints | None:
    """Returns ``[depths, requests]`` int64 tokens that typical acceptance takes, else -1.

    It is None where the exact rule holds. Greedy requests keep it; so do batches that want
    logprobs, or of which a request forbids tokens or has ``min_p``: the model's own
    distribution knows nothing of that. ``top_k`` and ``top_p`` are put upon it.
    """
    exact = config.acceptance == "exact" or metadata.all_greedy
    drafted = np.flatnonzero(~step.is_root)
    if exact or not parts(metadata) or not len(drafted):
        return None
    assert metadata.temperature is not None
    here = to_device(
        {
            "logits_row": logits_row,
            "request": step.request[step.tree],
            "row": drafted,
            "parent_row": step.parent_row[drafted],
            "token": step.token[drafted],
        },
        logits.device,
    )
    heat = metadata.temperature[here["request"]]
    is_sampled = to_host(heat >= GREEDY_BELOW)
    scaled = logits[here["logits_row"]].float() / heat.clamp(min=GREEDY_BELOW)[:, None]
    top_k, top_p = (of_rows(m, here["request"]) for m in (metadata.top_k, metadata.top_p))
    scaled = apply_top_k_top_p(scaled, top_k, top_p)
    likely = typical_nodes(
        scaled.softmax(-1), here["parent_row"], here["token"], here["row"],
        config.typical_epsilon, config.typical_delta,
    )  # fmt: skip
    taken = drafted[to_host(likely)()]
    taken = taken[is_sampled()[taken]]
    path = np.full((int(step.depth.max()) + 1, len(metadata.temperature)), PLACEHOLDER)
    # The deepest accepted node of each tree; of equals the first, the most probable draft.
    tree, parent_row, depth = step.tree, step.parent_row, step.depth
    deepest = taken[np.lexsort((taken, -depth[taken], tree[taken]))]
    at = deepest[np.unique(tree[deepest], return_index=True)[1]]
    while len(at := at[depth[at] > 0]):
        path[depth[at] - 1, step.request[tree[at]]] = step.token[at]
        at = parent_row[at]
    return path
