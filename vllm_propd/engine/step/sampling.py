"""Asking vLLM's sampler: for a row of each request, for some, or for all rows at once.

What a request asks for tells which: its processors may know it by its place in the batch,
or look at what it has put out.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.logits_processor.builtin import (
    LogitBiasLogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.logits_processor.interface import LogitsProcessor
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from vllm_propd.core.tree import Bools, Ints
from vllm_propd.engine.integration.logits_processors import called_for
from vllm_propd.kernels.transfer import to_device, to_host

ROWS_AT_ONCE = 256
"""How many rows the sampler is given at once: it makes float32 of their logits."""


def without_drafts(metadata: SamplingMetadata) -> SamplingMetadata:
    """Returns the batch's metadata as in plain vLLM: one row a request, no drafts.

    vLLM's thinking budgets count the scheduled drafts as a chain that is put out, and look
    for a request's row behind those of the drafts before it; the walk has neither.
    """
    budgets = metadata.thinking_budget_state_holder
    if budgets is not None:
        budgets.in_spec_mode = False
    elif not any(metadata.spec_token_ids or ()):
        return metadata
    return replace(metadata, spec_token_ids=[])


def drawn(
    logits: torch.Tensor,
    row: Ints,
    sampler: Sampler,
    metadata: SamplingMetadata,
    drawing: Bools,
) -> tuple[Ints, LogprobsTensors | None]:
    """Draws a token of each request; rows whose tokens count alone where that may be.

    Sorting a row, for ``top_p``, takes longer than most of what a walk does.

    Args:
        logits, sampler, metadata: see ``verify``.
        row: ``[requests]`` int64 the logits row where each one stands.
        drawing: see ``sampled``.

    Returns:
        ``[requests]`` int64, any token where it does not count; and the logprobs of all,
        if a request wants some.
    """
    who = np.flatnonzero(drawing | (not parts(metadata)))
    here = to_device({"rows": row[who], "who": who}, logits.device)
    if len(who) < len(drawing):
        metadata = _of_some(metadata, who, here["who"])
    found = sampled(sampler, logits[here["rows"]], metadata, drawing[who])
    token = np.zeros(len(drawing), np.int64)
    token[who] = _tokens(found.sampled_token_ids)
    return token, found.logprobs_tensors


def of_rows(values: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor | None:
    """Returns ``[some]`` values of what the batch has ``[requests]`` of, if it has it."""
    return None if values is None else values[rows]


def _of_some(
    metadata: SamplingMetadata, rows: Ints, here: torch.Tensor
) -> SamplingMetadata:
    """Returns the metadata of some requests alone; see ``parts``.

    Args:
        metadata: the batch's.
        rows, here: ``[some]`` int64 their numbers, on the host and on the device.
    """
    known = metadata.generators
    return replace(
        metadata,
        temperature=of_rows(metadata.temperature, here),
        top_p=of_rows(metadata.top_p, here),
        top_k=of_rows(metadata.top_k, here),
        generators={i: known[row] for i, row in enumerate(rows.tolist()) if row in known},
    )


def sampled(
    sampler: Sampler,
    logits: torch.Tensor | None,
    metadata: SamplingMetadata,
    drawing: Bools,
) -> SamplerOutput:
    """Samples a row of each request; what is kept of some moves on for those drawing only.

    The others ride along, because vLLM's processors know requests by their index. But
    their random generators must not move on, nor what their own processors count.

    Args:
        sampler, metadata: see ``verify``.
        logits: ``[requests, vocabulary]``.
        drawing: ``[requests]`` bool whose token counts.
    """
    if drawing.all():
        return sampler(logits=logits, sampling_metadata=metadata)
    generators = {i: one for i, one in metadata.generators.items() if drawing[i]}
    with called_for(drawing, metadata.logitsprocs.all):
        return sampler(
            logits=logits, sampling_metadata=replace(metadata, generators=generators)
        )


def _tokens(sampled_token_ids: torch.Tensor) -> Ints:
    tokens: Ints = to_host(sampled_token_ids[:, 0].contiguous())().astype(np.int64)
    return tokens


def rows_alone(metadata: SamplingMetadata) -> bool:
    """Whether each row's token depends on its logits and on nothing else."""
    return metadata.all_greedy and unchanged(metadata) and not tells(metadata)


def parts(metadata: SamplingMetadata) -> bool:
    """Whether nothing knows requests by their index but what ``_of_some`` renumbers."""
    others = metadata.logitsprocs.argmax_invariant
    return unchanged(metadata) and not tells(metadata) and all(map(_idle, others))


def unchanged(metadata: SamplingMetadata) -> bool:
    """Whether no request of the batch forbids tokens, or changes logits in another way."""
    budget = metadata.thinking_budget_state_holder
    return (
        metadata.no_penalties
        and not metadata.bad_words_token_ids
        and metadata.allowed_token_ids_mask is None
        and (budget is None or not budget.has_tracked_requests())
        and all(map(_idle, metadata.logitsprocs.non_argmax_invariant))
    )


def leaves_as_they_are(logits: torch.Tensor, metadata: SamplingMetadata) -> bool:
    """Whether the sampler changes no logits in place: it makes float32 of others first."""
    return logits.dtype != torch.float32 or (metadata.all_greedy and unchanged(metadata))


def tells(metadata: SamplingMetadata) -> bool:
    """Whether some request wants logprobs."""
    return metadata.max_num_logprobs is not None or bool(metadata.logprob_token_ids)


def _idle(processor: LogitsProcessor) -> bool:
    """Whether a processor is one of vLLM's own, and no request of the batch needs it."""
    if isinstance(processor, MinTokensLogitsProcessor):
        return not processor.min_toks
    if isinstance(processor, MinPLogitsProcessor):
        return not processor.min_p_count
    return isinstance(processor, LogitBiasLogitsProcessor) and not processor.biases


def all_rows(logits: torch.Tensor, sampler: Sampler, metadata: SamplingMetadata) -> Ints:
    """Draws ``[logits rows]`` int64 the token of each row; see ``rows_alone``."""
    tokens = [
        sampler(logits=rows, sampling_metadata=metadata).sampled_token_ids
        for rows in logits.split(ROWS_AT_ONCE)
    ]
    return _tokens(torch.cat(tokens))
