"""The batch as drafting and sizing see it: requests' texts, and what a step holds."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from vllm import SamplingParams

from vllm_propd.core.drafting.lookup import TokenMatrix
from vllm_propd.core.sizing.protocol import StepLoad
from vllm_propd.core.tree import Bools, Ints
from vllm_propd.engine.step.grammar import needs_chain
from vllm_propd.engine.step.tree_step import TreeStep


class DraftBatch:
    """The sequences to draft for, once a step's tokens are in the batch.

    Each attribute is collected when it is first asked for: a step that drafts nothing
    pays for nothing. It holds until the batch changes.

    Args:
        runner: the worker's model runner.
        sampled: ``[requests]`` the tokens that each request of the batch has put out in
            the step; those of partial prompts are empty.
    """

    def __init__(self, runner: Any, sampled: list[list[int]]):
        self._runner, self._sampled = runner, sampled

    @cached_property
    def rows(self) -> Ints:
        """``[sequences]`` int64 each place in the batch, and row in ``tokens``."""
        drafting = (i for i, one in enumerate(self._sampled) if one)
        return np.array([i for i in drafting if goes_on(self._runner, i)], np.int64)

    @cached_property
    def ids(self) -> list[str]:
        """``[sequences]`` request ids."""
        known = self._runner.input_batch.req_ids
        return [known[i] for i in self.rows.tolist()]

    @cached_property
    def outputs(self) -> list[list[int]]:
        """``[sequences]`` the tokens that each has put out."""
        return [self._runner.requests[i].output_token_ids for i in self.ids]

    @property
    def tokens(self) -> TokenMatrix:
        """``[rows, width]`` int32 all tokens of the batch, prompts included."""
        tokens: TokenMatrix = self._runner.input_batch.token_ids_cpu
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


def step_load(runner: Any, num_scheduled: np.ndarray, step: TreeStep | None) -> StepLoad:
    """Returns what a step holds, once vLLM has prepared it.

    Args:
        runner: the worker's model runner.
        num_scheduled: ``[requests]`` scheduled tokens of each request.
        step: the step's trees; None where there are none.
    """
    batch, count = runner.input_batch, len(num_scheduled)
    discarded = runner.discard_request_mask.np[:count].nonzero()[0].tolist()
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
    )
