"""Arms take turns: in which order, and what their turns give together."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import reduce
from operator import eq, iadd
from statistics import mean, median
from typing import Generic, TypeVar

import numpy as np

from vllm_propd.bench.timing.turn import Kind, Turn

Taker = TypeVar("Taker")
AnyTurn = TypeVar("AnyTurn", bound=Turn)

NEIGHBOURS = 8
"""The most turns of other arms between two turns of plain vLLM."""

FAST = 0.02
"""The share of like steps that are faster than the one that counts."""

OFTEN = 10
"""How many like steps can tell how far an arm's steps are from its fast ones."""

SHOWN = (0.0, FAST, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9)
"""The quantiles of like steps' times in the results: others than FAST can be tried."""


def in_turns(arms: Sequence[Taker], needs: Callable[[Taker], bool]) -> Iterator[Taker]:
    """Yields whose turn it is: A B C D, A B C D, ... A; A also between many others.

    Args:
        arms: the first is what the others are compared with, and has more turns: what its
            fast steps are like decides all ratios.
        needs: whether an arm has not had turns enough; asked before each round. Where none
            of the others needs one, nobody has a turn.
    """
    first, *others = arms
    begun = False
    while left := [arm for arm in others or arms if needs(arm)]:
        begun = True
        for i in range(0, len(left), NEIGHBOURS):
            yield first
            yield from left[i : i + NEIGHBOURS]
    if begun:
        yield first


def turns_in(arms: int, rounds: int) -> int:
    """Returns how many turns ``in_turns`` yields where every arm needs one a round."""
    taken: Counter[int] = Counter()
    for arm in in_turns(range(arms), lambda arm: taken[arm] < rounds):
        taken[arm] += 1
    return taken.total()


class Turns(Generic[AnyTurn]):
    """All turns that count, in the order in which they were taken."""

    def __init__(self, plain: str = "plain"):
        self._plain = plain
        self._taken: list[tuple[str, AnyTurn]] = []
        self._read: list[tuple[str, AnyTurn]] = []

    def add(self, arm: str, turn: AnyTurn, only_texts: bool = False) -> None:
        """Adds a turn that an arm has just ended.

        Args:
            arm: its name.
            turn: the turn.
            only_texts: nothing else of it counts: what was timed are other turns.
        """
        (self._read if only_texts else self._taken).append((arm, turn))

    def of(self, arm: str) -> list[AnyTurn]:
        """Returns an arm's turns, in the order in which they were taken."""
        return [turn for name, turn in self._taken if name == arm]

    def only(self, groups: Sequence[int]) -> Turns[AnyTurn]:
        """Returns the turns with some groups of prompts."""
        found: Turns[AnyTurn] = Turns(self._plain)
        found._taken = [one for one in self._taken if one[1].group in groups]
        found._read = [one for one in self._read if one[1].group in groups]
        return found

    @property
    def plain(self) -> list[AnyTurn]:
        """The turns of plain vLLM, which the other arms are compared with."""
        return self.of(self._plain)

    def share(self, arm: str, rounds: int, seconds: float = 0.0) -> float:
        """Returns how much of its least rounds and seconds an arm has had, 0 to 1."""
        turns = self.of(arm)
        had = sum(turn.seconds for turn in turns)
        return min(len(turns) / rounds, had / seconds if seconds else 1.0, 1.0)

    def latest(self, arm: str) -> AnyTurn:
        """Returns an arm's last turn with each group of prompts, added up to one turn."""
        by_group = {turn.group: turn for turn in self.of(arm)}
        first, *others = (by_group[group] for group in sorted(by_group))
        return reduce(iadd, others, deepcopy(first))

    def same_texts(self, arm: str) -> int:
        """Returns how many prompts have plain vLLM's text in each of an arm's turns.

        It is compared with that of plain vLLM's last turn of the kind with them, whole.
        Where batches were kept full, texts are cut anywhere: as far as both go.
        """
        taken = self._taken + self._read
        of_plain = {
            (turn.group, turn.full): turn.texts
            for name, turn in taken
            if name == self._plain
        }
        # Plain vLLM begins: an arm may not have met all prompts yet, but none besides.
        found: dict[int, list[bool]] = {}
        for turn in (turn for name, turn in taken if name == arm):
            agree = _agree if turn.full else eq
            same = list(map(agree, turn.texts, of_plain[turn.group, turn.full]))
            before = found.get(turn.group, same)
            found[turn.group] = [a and b for a, b in zip(before, same, strict=True)]
        return sum(map(sum, found.values()))

    def tokens_per_s(self, arm: str) -> float:
        """Returns an arm's tokens/s: the median of each group of prompts, their mean.

        Groups have unequal numbers of turns, and some write faster than others. A group
        whose texts all end with their first tokens has no speed; 0 where all groups are so.
        """
        by_group: defaultdict[int, list[float]] = defaultdict(list)
        for turn in self.decoding(arm):
            by_group[turn.group].append(turn.tokens_per_s)
        return mean(map(median, by_group.values())) if by_group else 0.0

    def decoding(self, arm: str) -> list[AnyTurn]:
        """Returns those of an arm's turns that have a time that counts."""
        return [turn for turn in self.of(arm) if turn.decodes]

    def when(self, turn: AnyTurn) -> float:
        """Seconds from the first turn's begin to when half of ``turn`` was over."""
        return turn.middle - min(taken.began for _, taken in self._taken)

    def ratio(self, arm: str) -> float:
        """Returns tokens/s over plain vLLM's, both undisturbed; the mean over groups.

        Whatever else a machine does only slows, and slows plain vLLM, which waits for
        memory, by other factors than arms that compute. So a step counts as long as a fast
        one (``FAST``) of the same arm and kind (``fast_steps``). How often steps were of a
        kind, and how many tokens came of them, is counted over all turns.

        0, where no group has texts that go on after their first tokens.
        """
        mine, plain = self._undisturbed(arm), self._undisturbed(self._plain)
        both = mine.keys() & plain.keys()
        return mean(mine[group] / plain[group] for group in both) if both else 0.0

    def _undisturbed(self, arm: str) -> dict[int, float]:
        """Returns, by group of prompts, an arm's tokens/s if all its steps were fast.

        Groups whose texts all end with their first tokens are left out.
        """
        fast = fast_steps(self.steps(arm))
        tokens: Counter[int] = Counter()
        seconds: defaultdict[int, float] = defaultdict(float)
        for turn in self.decoding(arm):
            tokens[turn.group] += turn.tokens
            seconds[turn.group] += sum(fast[kind] for kind, _ in turn.laps())
        return {group: tokens[group] / seconds[group] for group in tokens}

    def steps(self, arm: str) -> dict[Kind, list[float]]:
        """Returns the seconds of an arm's steps, by their kind in ascending order."""
        found: defaultdict[Kind, list[float]] = defaultdict(list)
        for turn in self.of(arm):
            for kind, seconds in turn.laps():
                found[kind].append(seconds)
        return dict(sorted(found.items()))


def fast_steps(steps: dict[Kind, list[float]]) -> dict[Kind, float]:
    """Returns the seconds of an undisturbed step, by its kind.

    For a kind that is often met, that is a fast step (``FAST``). The fastest of n steps of
    a rare kind is to be expected at quantile 1 / (n + 1): it is taken to be as far above a
    fast step as the arm's steps of often met kinds are at that quantile. Else arms of many
    kinds would be slower than arms of one for no other reason.

    Args:
        steps: seconds of an arm's steps, by their kind.
    """
    fast = {kind: at(laps, FAST) for kind, laps in steps.items()}
    above = [
        seconds / fast[kind]
        for kind, laps in steps.items()
        if len(laps) >= OFTEN
        for seconds in laps
    ]
    if above:
        for kind, laps in steps.items():
            fast[kind] /= max(1.0, at(above, 1.0 / (len(laps) + 1)))
    return fast


def _agree(text: list[int], other: list[int]) -> bool:
    """Whether two texts are the same as far as both go; False where one is empty."""
    both = min(len(text), len(other))
    return both > 0 and text[:both] == other[:both]


def at(laps: list[float], share: float) -> float:
    """Returns the quantile ``share`` of some times; between two of them, the faster."""
    return float(np.quantile(laps, share, method="lower"))
