"""The batch as drafting and sizing see it: requests' texts, and what a step holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_propd.core.drafting.lookup import TokenMatrix
from vllm_propd.core.sizing.protocol import StepLoad
from vllm_propd.core.tree import Ints
from vllm_propd.engine.step.grammar import needs_chain
from vllm_propd.engine.step.tree_step import TreeStep


@dataclass(frozen=True)
class DraftBatch:
    """The sequences to draft for.

    Attributes:
        ids: ``[sequences]`` request ids.
        outputs: ``[sequences]`` the tokens that each has put out.
        tokens: ``[rows, width]`` int32 all tokens of the batch, prompts included.
        rows: ``[sequences]`` int64 each sequence's row in ``tokens``.
        lengths: ``[sequences]`` int64 how many tokens of that row are known.
        chain: ``[sequences]`` bool whether the draft must be a single branch.
    """

    ids: list[str]
    outputs: list[list[int]]
    tokens: TokenMatrix
    rows: Ints
    lengths: Ints
    chain: np.ndarray


def goes_on(runner: Any, index: int) -> bool:
    """Whether a request may put out more than one token beside those that it has.

    Stop strings, which only the front end knows, are not looked at.

    Args:
        runner: the worker's model runner.
        index: place in the batch of a request that has put out a token.
    """
    request = runner.requests[runner.input_batch.req_ids[index]]
    params, outputs = request.sampling_params, request.output_token_ids
    length = min(
        params.max_tokens or runner.max_model_len,
        runner.max_model_len - request.num_prompt_tokens,
    )
    last = outputs[-1]
    stopped = last == params.eos_token_id or last in (params.stop_token_ids or ())
    return not stopped and length - len(outputs) > 1


def draft_batch(runner: Any, drafting: list[int]) -> DraftBatch:
    """Collects the texts of some requests, once a step's tokens are in the batch.

    Args:
        runner: the worker's model runner.
        drafting: ``[sequences]`` places in the batch.
    """
    batch, rows = runner.input_batch, np.array(drafting)
    ids = [batch.req_ids[i] for i in drafting]
    return DraftBatch(
        ids,
        [runner.requests[i].output_token_ids for i in ids],
        batch.token_ids_cpu,
        rows,
        batch.num_tokens_no_spec[rows].astype(np.int64),
        np.array([needs_chain(runner, i) for i in ids]),
    )


def step_load(runner: Any, num_scheduled: np.ndarray, step: TreeStep | None) -> StepLoad:
    """Returns what a step holds, once vLLM has prepared it.

    Args:
        runner: the worker's model runner.
        num_scheduled: ``[requests]`` scheduled tokens of each request.
        step: the step's trees; None where there are none.
    """
    batch, count = runner.input_batch, len(num_scheduled)
    discarded = runner.discard_request_mask.np[:count]
    sequences = count - int(discarded.sum())
    tokens = int(num_scheduled.sum())
    nodes = len(step.rows) - len(step.sizes) if step is not None else 0
    computed = batch.num_computed_tokens_cpu[:count]
    waiting = 0
    for i in np.flatnonzero(discarded).tolist():
        request = runner.requests[batch.req_ids[i]]
        known = request.num_prompt_tokens + len(request.output_token_ids)
        waiting += known - int(computed[i] + num_scheduled[i])
    return StepLoad(
        sequences=sequences,
        tokens=tokens,
        others=tokens - nodes - sequences,
        context=int(computed.sum()),
        waiting=waiting,
        chained=step is not None and step.chained,
    )
