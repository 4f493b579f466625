"""Where requests end: there nothing is drafted, and no further token is drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit

from vllm_propd.core.tree import Bools, Ints


@njit(cache=True, nogil=True)
def _going_on(texts, known, prompts, read, lengths, stops):  # type: ignore[no-untyped-def]
    """Finds rows that go on; -1 stands first where prompts are not those that were read."""
    rows, count = np.empty(len(read), np.int64), 0
    for row in range(len(read)):
        if prompts[row] != read[row]:
            return np.full(1, -1, np.int64)
        if known[row] + 1 >= lengths[row]:
            continue
        last, stopped = texts[row, known[row] - 1], False
        for token in stops[row]:
            stopped |= token == last
        if not stopped:
            rows[count] = row
            count += 1
    return rows[:count]


@dataclass(frozen=True)
class Answers:
    """What requests have put out, and where they end.

    Attributes:
        outputs: ``[requests]`` the list of each one's output tokens.
        left: ``[requests]`` int64 how many tokens each may still put out.
        stops: ``[requests, stops]`` int64 tokens that each ends with; -1 where there is
            none.
    """

    outputs: list[list[int]]
    left: Ints
    stops: Ints

    def ended(self, put_out: int, token: Ints) -> Bools:
        """Returns ``[requests]`` bool whether each ends with its latest token.

        Args:
            put_out: how many tokens each has put out since.
            token: ``[requests]`` int64 the latest.
        """
        ended: Bools = (self.stops == token[:, None]).any(1) | (put_out >= self.left)
        return ended

    def lengths(self, tokens: Ints) -> Ints:
        """Returns ``[requests]`` int64 how many of its next tokens each puts out.

        Args:
            tokens: ``[requests, places]`` int64; -1 behind those that each has.
        """
        known = tokens >= 0
        stopped = known & (tokens[:, :, None] == self.stops[:, None, :]).any(-1)
        # Up to the first that ends it, and that one.
        until = np.where(stopped.any(1), stopped.argmax(1) + 1, known.sum(1))
        lengths: Ints = np.minimum(until, self.left)
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
        self._stops = np.empty((0, 0), np.int64)

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
        return rows

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
        return Answers(outputs, left, self._stops)

    def _find(self, batch: Any) -> Ints:
        rows: Ints = _going_on(
            batch.token_ids_cpu, batch.num_tokens_no_spec, batch.num_prompt_tokens,
            self._prompts, self._lengths, self._stops,
        )  # fmt: skip
        return rows

    def _read(self, batch: Any, requests: Any) -> None:
        self._ids = list(batch.req_ids)
        params = [requests[one].sampling_params for one in self._ids]
        most = np.array([one.max_tokens or self._longest for one in params], np.int64)
        self._prompts = batch.num_prompt_tokens[: len(params)].astype(np.int64)
        self._lengths = np.minimum(self._prompts + most, self._longest)
        stops = [{one.eos_token_id, *(one.stop_token_ids or ())} - {None} for one in params]
        self._stops = np.full((len(params), max(map(len, stops), default=0)), -1, np.int64)
        for row, tokens in zip(self._stops, stops, strict=True):
            row[: len(tokens)] = list(tokens)
