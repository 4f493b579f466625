"""Contexts in a hash table of fixed size: a text's last tokens, and what came next.

A context stands in one of ``WAYS`` slots that its hash names; a mark made of other bits of
it tells whose a slot is (the wrong one's, in one of 500 million times: a bad draft). The
longest context that is known speaks for a text.
"""

from __future__ import annotations

import numpy as np
from numba import njit

ORDERS = (8, 5, 3, 2)
"""Tokens of a context, the longest first."""

WAYS = 4
"""In how many places a context may stand (the one unused for longest is replaced), and how
many different next tokens are counted."""

MOST = 255
"""A context's counts are halved when one has come so far: texts change."""

SEEN_ONCE, SELDOM, MOSTLY, ALWAYS = range(4)
"""How often a context's best token has come next: the only time; in less than two thirds of
times; in more; always, twice or more."""

NONE = -1
"""Stands where there is no token."""


@njit(cache=True, nogil=True)
def _hashed(so_far, token):  # type: ignore[no-untyped-def]
    """Takes the token before into the hash of a context, int64 that wraps around."""
    mixed = (so_far ^ (token + 1)) * np.int64(-7046029254386353131)
    return mixed ^ ((mixed >> 29) & np.int64(0x7FFFFFFFF))


@njit(cache=True, nogil=True)
def _slot(marks, hashed):  # type: ignore[no-untyped-def]
    """Finds a context's slot, -1 where it is not known; and its mark and bucket."""
    mark = np.int32((hashed >> 32) | 1)
    first = (hashed & (len(marks) // WAYS - 1)) * WAYS
    for slot in range(first, first + WAYS):
        if marks[slot] == mark:
            return slot, mark, first
    return -1, mark, first


@njit(cache=True, nogil=True)
def recall(recent, salt, marks):  # type: ignore[no-untyped-def]
    """Finds the longest context that is known.

    Args:
        recent: tokens, the last first; ``NONE`` before the text's beginning.
        salt: int64, of the request.
        marks: ``[slots]`` int32 whose each slot is; 0: nobody's.

    Returns:
        Its slot and the number of its order; -1 and -1 where none is known.
    """
    hashed, count, best, found = np.int64(salt), 0, -1, -1
    for order in range(len(ORDERS) - 1, -1, -1):
        while count < ORDERS[order]:
            if recent[count] == NONE:
                return best, found
            hashed = _hashed(hashed, recent[count])
            count += 1
        slot, _, _ = _slot(marks, hashed)
        if slot < 0:  # a longer context holds this one, and was never seen either
            return best, found
        best, found = slot, order
    return best, found


@njit(cache=True, nogil=True)
def shift(recent, token):  # type: ignore[no-untyped-def]
    """Puts a token before the others, in place."""
    for at in range(len(recent) - 1, 0, -1):
        recent[at] = recent[at - 1]
    recent[0] = token


@njit(cache=True, nogil=True)
def _count(tokens, counts, token):  # type: ignore[no-untyped-def]
    """Counts that ``token`` came next in one context; returns how often its best did."""
    at = WAYS - 1  # a new one takes the place of the rarest
    for way in range(WAYS):
        if tokens[way] == token or tokens[way] == NONE:
            at = way
            break
    counts[at] = counts[at] + 1 if tokens[at] == token else 1
    tokens[at] = token
    while at and counts[at] > counts[at - 1]:
        counts[at], counts[at - 1] = counts[at - 1], counts[at]
        tokens[at], tokens[at - 1] = tokens[at - 1], tokens[at]
        at -= 1
    if counts[0] >= MOST:
        counts //= 2
    times = counts.sum()
    if times == 1:
        return SEEN_ONCE
    if counts[0] == times:
        return ALWAYS
    return MOSTLY if 3 * counts[0] >= 2 * times else SELDOM


@njit(cache=True, nogil=True)
def learn(  # type: ignore[no-untyped-def]
    recent, salt, token, marks, tokens, often, counts, stamps, clock
):
    """Counts that ``token`` came after these tokens, in contexts of all orders.

    Args:
        recent, salt, marks: see ``recall``.
        token: what came.
        tokens, counts: ``[slots, WAYS]`` next tokens, the most frequent first, and how
            often each came; in place.
        often: ``[slots]`` how often the first of them came: ``SEEN_ONCE``, ...; in place.
        stamps: ``[slots]`` when each was last learned; in place.
        clock: what time it is.

    Returns:
        What time it is then.
    """
    hashed, read = np.int64(salt), 0
    for order in range(len(ORDERS) - 1, -1, -1):
        if recent[ORDERS[order] - 1] == NONE:
            break
        while read < ORDERS[order]:
            hashed = _hashed(hashed, recent[read])
            read += 1
        slot, mark, first = _slot(marks, hashed)
        if slot < 0:
            slot = first
            for other in range(first + 1, first + WAYS):
                slot = other if stamps[other] < stamps[slot] else slot
            marks[slot], tokens[slot], counts[slot] = mark, NONE, 0
        clock += 1
        stamps[slot] = clock
        often[slot] = _count(tokens[slot], counts[slot], token)
    return clock
