"""Arms take turns: whose it is, and what comes of all of them together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import reduce
from operator import iadd
from statistics import mean
from typing import Generic, TypeVar

from vllm_propd.bench.turn import Turn

Taker = TypeVar("Taker")
AnyTurn = TypeVar("AnyTurn", bound=Turn)


def in_turns(arms: Sequence[Taker], needs: Callable[[Taker], bool]) -> Iterator[Taker]:
    """Whose turn it is: A B C A D E, A B C A D E, ... A.

    Args:
        arms: the first is what the others are compared with, and has more turns: what its
            fastest are like decides all ratios.
        needs: whether an arm has not had turns enough; asked before each round.
    """
    first, *others = arms
    while left := [arm for arm in others or arms if needs(arm)]:
        for i in range(0, len(left), 2):
            yield first
            yield from left[i : i + 2]
    yield first


def turns_in(arms: int, rounds: int) -> int:
    """How many ``in_turns`` gives, where every arm needs one a round."""
    return rounds * (arms - 1 + max(arms // 2, 1)) + 1


class Turns(Generic[AnyTurn]):
    """All turns that count, in the order in which they were taken."""

    def __init__(self, plain: str = "plain"):
        self._plain = plain
        self._taken: list[tuple[str, AnyTurn]] = []

    def add(self, arm: str, turn: AnyTurn) -> None:
        """The next turn is over."""
        self._taken.append((arm, turn))

    def of(self, arm: str) -> list[AnyTurn]:
        """An arm's."""
        return [turn for name, turn in self._taken if name == arm]

    @property
    def plain(self) -> list[AnyTurn]:
        """Those of what is compared with."""
        return self.of(self._plain)

    def share(self, arm: str, rounds: int, seconds: float = 0.0) -> float:
        """Of the rounds and seconds that an arm needs at least, what it has had: 0 to 1."""
        turns = self.of(arm)
        had = sum(turn.seconds for turn in turns)
        return min(len(turns) / rounds, had / seconds if seconds else 1.0, 1.0)

    def latest(self, arm: str) -> AnyTurn:
        """An arm's last turn; the last with each group of prompts, where there are more."""
        by_group = {turn.group: turn for turn in self.of(arm)}
        first, *others = (by_group[group] for group in sorted(by_group))
        return reduce(iadd, others, deepcopy(first))

    def when(self, turn: AnyTurn) -> float:
        """Seconds from the first turn's begin to when half of ``turn`` was over."""
        return turn.middle - self._taken[0][1].began

    def ratio(self, arm: str) -> float:
        """Tokens/s over plain vLLM's; the mean over the groups of prompts.

        With each group the fastest turn of both arms counts: whatever else a machine does
        only slows, and slows plain vLLM, which waits for memory, by other factors than
        arms that compute. What both do undisturbed is what two benchmarks agree on.
        """
        mine, plain = self._fastest(arm), self._fastest(self._plain)
        return mean(mine[group] / plain[group] for group in mine)

    def _fastest(self, arm: str) -> dict[int, float]:
        """By group of prompts, tokens/s of an arm's fastest turn."""
        found: dict[int, float] = {}
        for turn in self.of(arm):
            found[turn.group] = max(found.get(turn.group, 0.0), turn.tokens_per_s)
        return found
