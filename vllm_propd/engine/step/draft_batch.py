"""The batch as drafting and sizing see it: requests' texts, and what a step holds."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from numba import njit
from vllm import SamplingParams
from vllm.logger import init_logger

from vllm_propd.core.sizing.protocol import StepLoad
from vllm_propd.core.sources.lookup import TokenMatrix
from vllm_propd.core.sources.successors import ReadTokens
from vllm_propd.core.tree import Bools, Ints
from vllm_propd.engine.integration.cache_salts import salts_of
from vllm_propd.engine.step.request_ends import RequestEnds
from vllm_propd.engine.step.states import VerifiedStep
from vllm_propd.engine.step.tree_step import TreeStep

logger = init_logger("vllm.propd.draft_batch")

NO_TOKEN = np.int32(np.iinfo(np.int32).max)
"""Stands where a prompt has an embedding and no token: no target knows it."""


@njit(cache=True, nogil=True)
def _read(texts, rows, lengths, counts, drawn):  # type: ignore[no-untyped-def]
    """Lists the tokens that were read and put out (``ReadTokens``), and logits rows."""
    total = counts.sum()
    before, truth = np.empty(total, np.int64), np.empty(total, np.int64)
    row, of = np.empty(total, np.int64), np.empty(total, np.int64)
    place, at = np.empty(total, np.int64), 0
    for i in range(len(rows)):
        for ahead in range(counts[i]):
            end = lengths[i] - counts[i] + ahead
            before[at], truth[at] = texts[rows[i], end - 1], texts[rows[i], end]
            row[at], of[at], place[at] = drawn[rows[i], ahead], i, ahead
            at += 1
    return before, truth, of, place, row


class DraftBatch:
    """The sequences to draft for, once a step's tokens are in the batch.

    Each attribute is collected when it is first asked for: a step that drafts nothing
    pays for nothing. It holds until the batch changes.

    Args:
        runner: the worker's model runner.
        sampled: ``[requests]`` the tokens that each request of the batch has put out in
            the step; those of partial prompts are empty.
        verified: the step.
    """

    def __init__(self, runner: Any, sampled: list[list[int]], verified: VerifiedStep):
        self._runner, self._sampled, self._verified = runner, sampled, verified

    @cached_property
    def rows(self) -> Ints:
        """``[sequences]`` int64 each place in the batch, and row in ``tokens``."""
        runner = self._runner
        rows: Ints = runner.ends.going_on(runner.input_batch, runner.requests)
        if not all(self._sampled):
            rows = rows[[bool(self._sampled[row]) for row in rows.tolist()]]
        return rows

    @cached_property
    def ids(self) -> list[str]:
        """``[sequences]`` request ids."""
        known = self._runner.input_batch.req_ids
        if len(self.rows) == len(known):
            return list(known)
        return [known[i] for i in self.rows.tolist()]

    @cached_property
    def outputs(self) -> list[list[int]]:
        """``[sequences]`` the tokens that each has put out."""
        return [self._runner.requests[i].output_token_ids for i in self.ids]

    @cached_property
    def tokens(self) -> TokenMatrix:
        """``[rows, width]`` int32 all tokens of the batch, prompts included."""
        batch = self._runner.input_batch
        tokens: TokenMatrix = batch.token_ids_cpu
        if batch.req_prompt_embeds:
            # A prompt without ids leaves what its row's last request had there.
            count = len(batch.req_ids)
            used = slice(count), slice(batch.num_tokens_no_spec[:count].max())
            tokens = np.where(batch.is_token_ids[used], tokens[used], NO_TOKEN)
        return tokens

    @cached_property
    def lengths(self) -> Ints:
        """``[sequences]`` int64 how many tokens of its row in ``tokens`` are known."""
        lengths: Ints = self._runner.input_batch.num_tokens_no_spec[self.rows]
        return lengths.astype(np.int64)

    @property
    def roots(self) -> Ints:
        """``[sequences]`` int64 the last token of each, the root of its next tree."""
        last: Ints = self.tokens[self.rows, self.lengths - 1].astype(np.int64)
        return last

    @cached_property
    def begins(self) -> Ints:
        """``[sequences]`` int64 where each one's answer begins, behind its prompt."""
        return self.lengths - np.array([len(one) for one in self.outputs], np.int64)

    @property
    def salts(self) -> Ints:
        """``[sequences]`` int64 what ``cache_salt`` comes to, 0 without one."""
        return salts_of(self._params)

    @cached_property
    def put_out(self) -> Ints:
        """``[sequences]`` int64 how many tokens each has put out in the step."""
        return np.array([len(self._sampled[row]) for row in self.rows.tolist()], np.int64)

    def read(self) -> tuple[ReadTokens, Ints, torch.Tensor]:
        """Returns what the target has read of these sequences in the step.

        Returns:
            The tokens; ``[tokens]`` int64 the rows of logits by which it spoke of each;
            and ``[logits rows, vocabulary]`` these.
        """
        verified = self._verified
        assert verified.logits is not None
        *read, row = _read(
            self.tokens, self.rows, self.lengths, self.put_out, verified.outcome.drawn
        )
        return ReadTokens(*read), row, verified.logits

    @cached_property
    def _params(self) -> list[SamplingParams]:
        return [self._runner.requests[i].sampling_params for i in self.ids]

    @cached_property
    def sampled(self) -> Bools:
        """``[sequences]`` bool whether a request samples; else it is greedy."""
        random = self._runner.input_batch.random_reqs
        return np.array([one in random for one in self.ids], bool)

    @cached_property
    def steered(self) -> Bools:
        """``[sequences]`` bool whether more than the target decides what a request says."""
        return np.array([is_steered(one) for one in self._params], bool)

    @cached_property
    def chain(self) -> np.ndarray:
        """``[sequences]`` bool whether the draft must be a single branch."""
        return np.array([needs_chain(self._runner, i) for i in self.ids])


def is_steered(params: SamplingParams) -> bool:
    """Whether penalties, bans, biases or a grammar change the target's choice."""
    return bool(
        params.presence_penalty
        or params.frequency_penalty
        or params.repetition_penalty != 1.0
        or params.logit_bias
        or params.allowed_token_ids
        or params.bad_words
        or params.structured_outputs
    )


def needs_chain(runner: Any, request_id: str) -> bool:
    """Whether a request's draft list is checked, and its logits masked, as a chain.

    Args:
        runner: the worker's model runner.
        request_id: of a request that it knows.
    """
    params = runner.requests[request_id].sampling_params
    if params is None or params.structured_outputs is None:
        return False
    logger.info_once("ProPD: requests with structured output are drafted a chain")
    return True


def keeps_all_rows(runner: Any) -> bool:
    """Whether vLLM masks logits by the rows of scheduled drafts: none may be missing."""
    if not any(needs_chain(runner, i) for i in runner.input_batch.req_ids):
        return False
    logger.info_once("ProPD: steps with structured output are not pruned")
    return True


def warm_up(ends: RequestEnds, batch: Any) -> None:
    """Runs this file's kernels once, on a worker's empty batch."""
    nothing = np.empty(0, np.int64)
    ends.going_on(batch, {})
    ends.answers(batch, {}).lengths(np.empty((0, 1), np.int64))
    _read(batch.token_ids_cpu, nothing, nothing, nothing, np.empty((0, 1), np.int64))


def step_load(runner: Any, num_scheduled: np.ndarray, step: TreeStep | None) -> StepLoad:
    """Returns what a step holds, once vLLM has prepared it.

    Args:
        runner: the worker's model runner.
        num_scheduled: ``[requests]`` scheduled tokens of each request.
        step: the step's trees; None where there are none.
    """
    batch, count = runner.input_batch, len(num_scheduled)
    discard = runner.discard_request_mask.np[:count]
    discarded = discard.nonzero()[0].tolist() if discard.any() else ()
    sequences = count - len(discarded)
    tokens = int(num_scheduled.sum())
    nodes = len(step.rows) - len(step.sizes) if step is not None else 0
    computed = batch.num_computed_tokens_cpu[:count]
    waiting = 0
    for i in discarded:
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
        fresh=not (computed >= batch.num_prompt_tokens[:count]).any(),
    )
