"""Where requests end: there nothing is drafted, and no further token is drawn."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numba import njit
from vllm import SamplingParams
from vllm.v1.core.sched.utils import check_sequence_repetition

from vllm_propd.core.tree import Bools, Ints


@njit(cache=True, nogil=True)
def _stops(token, row, stops, begins):  # type: ignore[no-untyped-def]
    """Whether a row's request ends with a token; see ``StopTokens``."""
    own = stops[begins[row] : begins[row + 1]]
    place = np.searchsorted(own, token)
    return place < len(own) and own[place] == token


@njit(cache=True, nogil=True)
def _all_stops(tokens, stops, begins):  # type: ignore[no-untyped-def]
    """Computes what ``StopTokens.among`` returns."""
    found = np.zeros(tokens.shape, np.bool_)
    for row, place in np.ndindex(tokens.shape):
        found[row, place] = _stops(tokens[row, place], row, stops, begins)
    return found


@njit(cache=True, nogil=True)
def _going_on(  # type: ignore[no-untyped-def]
    texts, known, prompts, read, lengths, stops, begins
):
    """Finds rows that go on; -1 stands first where prompts are not those that were read."""
    rows, count = np.empty(len(read), np.int64), 0
    for row in range(len(read)):
        if prompts[row] != read[row]:
            return np.full(1, -1, np.int64)
        if known[row] + 1 >= lengths[row]:
            continue
        if not _stops(np.int64(texts[row, known[row] - 1]), row, stops, begins):
            rows[count] = row
            count += 1
    return rows[:count]


@dataclass(frozen=True)
class StopTokens:
    """The tokens that requests end with: one request's list may be as long as it likes.

    Attributes:
        tokens: int64 all lists, one after the other, each sorted.
        begins: ``[requests + 1]`` int64 where each one begins, and where the last ends.
    """

    tokens: Ints
    begins: Ints

    @classmethod
    def of(cls, lists: Iterable[Iterable[int]]) -> StopTokens:
        """Makes them of each request's list."""
        each = [sorted(one) for one in lists]
        tokens = np.array([token for one in each for token in one], np.int64)
        return cls(tokens, np.array([0, *map(len, each)], np.int64).cumsum())

    def among(self, tokens: Ints) -> Bools:
        """Returns ``[requests, places]`` bool whether each one's request ends with it.

        Args:
            tokens: ``[requests, places]`` int64.
        """
        found: Bools = _all_stops(tokens, self.tokens, self.begins)
        return found


def _repeats(params: SamplingParams, output: list[int]) -> bool:
    """Whether a request that is not to repeat itself does so, and so ends (vLLM's rule)."""
    asked = params.repetition_detection
    assert asked is not None
    return len(output) >= params.min_tokens and check_sequence_repetition(output, asked)


@dataclass(frozen=True)
class Answers:
    """What requests have put out, and where they end.

    Attributes:
        outputs: ``[requests]`` the list of each one's output tokens.
        left: ``[requests]`` int64 how many tokens each may still put out.
        stops: the tokens that they end with.
        repeating: by row, what requests ask for that end where they repeat themselves.
    """

    outputs: list[list[int]]
    left: Ints
    stops: StopTokens
    repeating: dict[int, SamplingParams] = field(default_factory=dict)

    def ended(self, put_out: int, token: Ints) -> Bools:
        """Returns ``[requests]`` bool whether each ends with its latest token.

        Args:
            put_out: how many tokens each has put out since.
            token: ``[requests]`` int64 the latest, which is not in ``outputs`` yet.
        """
        ended: Bools = self.stops.among(token[:, None])[:, 0] | (put_out >= self.left)
        for row, params in self.repeating.items():
            ended[row] |= _repeats(params, [*self.outputs[row], int(token[row])])
        return ended

    def lengths(self, tokens: Ints) -> Ints:
        """Returns ``[requests]`` int64 how many of its next tokens each puts out.

        Args:
            tokens: ``[requests, places]`` int64 those that are not in ``outputs`` yet; -1
                behind those that each has.
        """
        known = tokens >= 0
        stopped = known & self.stops.among(tokens)
        # Up to the first that ends it, and that one.
        until = np.where(stopped.any(1), stopped.argmax(1) + 1, known.sum(1))
        lengths: Ints = np.minimum(until, self.left)
        for row, params in self.repeating.items():
            output = list(self.outputs[row])
            for place, token in enumerate(tokens[row, : lengths[row]].tolist(), 1):
                output.append(token)
                if _repeats(params, output):
                    lengths[row] = place
                    break
        return lengths


class RequestEnds:
    """Knows where the batch's requests end.

    Every sequence asks in every step, and what a step of the model has pushed out of the
    caches is slow to read. So it reads arrays, and requests when others are in the batch.

    Args:
        longest: ``max_model_len``.
    """

    def __init__(self, longest: int):
        self._longest = longest
        self._ids: list[str] = []
        self._prompts = self._lengths = np.empty(0, np.int64)
        self._stops = StopTokens.of([])
        self._repeating: dict[int, SamplingParams] = {}

    def going_on(self, batch: Any, requests: Any) -> Ints:
        """Returns the rows of requests that may put out two tokens or more from now on.

        Stop strings, which only the front end knows, are not looked at.

        Args:
            batch: the worker's batch, with the step's tokens.
            requests: the worker's states of all requests, by id.
        """
        if batch.req_ids != self._ids:
            self._read(batch, requests)
        rows: Ints = self._find(batch)
        if len(rows) and rows[0] < 0:  # a session's next turn: the id of the one before
            self._read(batch, requests)
            rows = self._find(batch)
        over = [
            row
            for row, params in self._repeating.items()
            if _repeats(params, requests[self._ids[row]].output_token_ids)
        ]
        return rows[~np.isin(rows, over)] if over else rows

    def answers(self, batch: Any, requests: Any) -> Answers:
        """Returns the answers of a batch that does not have the step's tokens yet.

        Args:
            batch, requests: see ``going_on``.
        """
        count = len(batch.req_ids)
        prompts = batch.num_prompt_tokens[:count]
        if batch.req_ids != self._ids or (prompts != self._prompts).any():
            self._read(batch, requests)
        outputs = [requests[one].output_token_ids for one in batch.req_ids]
        left = self._lengths - batch.num_tokens_no_spec[:count]
        return Answers(outputs, left, self._stops, self._repeating)

    def _find(self, batch: Any) -> Ints:
        rows: Ints = _going_on(
            batch.token_ids_cpu, batch.num_tokens_no_spec, batch.num_prompt_tokens,
            self._prompts, self._lengths, self._stops.tokens, self._stops.begins,
        )  # fmt: skip
        return rows

    def _read(self, batch: Any, requests: Any) -> None:
        self._ids = list(batch.req_ids)
        params = [requests[one].sampling_params for one in self._ids]
        most = np.array([one.max_tokens or self._longest for one in params], np.int64)
        self._prompts = batch.num_prompt_tokens[: len(params)].astype(np.int64)
        self._lengths = np.minimum(self._prompts + most, self._longest)
        self._stops = StopTokens.of(
            {one.eos_token_id, *(one.stop_token_ids or ())} - {None} for one in params
        )
        self._repeating = {
            row: one for row, one in enumerate(params) if one.repetition_detection
        }
