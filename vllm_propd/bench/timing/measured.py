"""A point of a benchmark, gone through in passes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle

from rich.progress import Progress
from vllm import SamplingParams

from vllm_propd.bench.engines import ArmEngine, at_most
from vllm_propd.bench.settings import BenchSettings
from vllm_propd.bench.timing.chunk import one_by_one, step_by_step
from vllm_propd.bench.timing.paired import Chunks, Timed
from vllm_propd.bench.timing.turn import Turn
from vllm_propd.bench.timing.turns import Turns, in_turns
from vllm_propd.bench.workloads.points import Point

WARM_UP = 0.4
"""The share of an arm's seconds that its warm-up takes, in which what it learns settles."""

SHORT = 16
"""New tokens of a request in the warm-up of an arm that learns nothing."""


def timed(turn: Turn) -> Timed:
    """Returns a turn's tokens and seconds, as its arm's part of a chunk."""
    heads_s, in_vain_s = (
        sum(record[name] for record in turn.records) for name in ("heads_s", "in_vain_s")
    )
    tokens, decoded = sum(map(len, turn.texts)), turn.tokens - turn.prefilled
    return Timed(tokens, turn.whole_s, heads_s, in_vain_s, decoded, turn.steps)


class Measured:
    """What has been measured at a point so far.

    Args:
        point: what every arm generates.
        engines: the arms' engines.
        bar: shows how far it is.
    """

    def __init__(self, point: Point, engines: list[ArmEngine], bar: Progress):
        self.point, self.engines, self._bar = point, engines, bar
        self.turns: Turns[Turn] = Turns()
        self.chunks = Chunks()
        self._seen: set[tuple[str, int]] = set()
        self._task = bar.add_task(point.name, total=len(engines))

    def measure(
        self, share: float, params: SamplingParams, settings: BenchSettings
    ) -> None:
        """Takes turns until each arm has had its share; the first call warms arms up.

        Args:
            share: how much of its rounds and seconds each arm is to have had, 0 to 1.
            params: of every request.
            settings: how many rounds and seconds.
        """
        groups = len(self.point.groups)
        rounds = max(settings.rounds, groups)

        def had(engine: ArmEngine) -> float:
            return self.turns.share(engine.arm.name, rounds, settings.seconds)

        if not self.turns.plain:
            self._warm_up(self.engines, params, WARM_UP * settings.seconds)
        for engine in in_turns(self.engines, lambda engine: had(engine) < share):
            name = engine.arm.name
            group = len(self.turns.of(name)) % groups
            self.turns.add(name, self._turn(engine, params, group))
            self._bar.update(self._task, completed=sum(map(had, self.engines)))

    def pair(
        self,
        engines: list[ArmEngine],
        params: SamplingParams,
        settings: BenchSettings,
        note: Callable[[], None],
        start: int = 0,
    ) -> None:
        """Runs chunks until the arms' medians are known, or ``most_chunks`` are done.

        Prompts of several tasks are all gone through, once.

        Args:
            engines: the arms' engines; where ``start`` is above 0, they are warmed up.
            params: of every request; texts end where the model ends them.
            settings: how many chunks, and how well their medians are to be known.
            note: called after each chunk, to save what there is.
            start: how often the engines have been started anew.
        """
        arms, groups = [engine.arm.name for engine in engines], self.point.groups
        if start or not self.turns.plain:
            self._warm_up(engines, params, WARM_UP * settings.seconds)
            self._seen.clear()
        params = params.clone()
        params.ignore_eos = False
        title = f"{self.point.name}: chunks" + (f", start {start + 1}" if start else "")
        least, most = settings.chunks, settings.most_chunks
        if self.point.tasks:
            least = most = len(groups)
        task = self._bar.add_task(title, total=most)
        for done in range(most):
            if done >= least and self.chunks.are_enough(arms, settings.precision):
                break
            chunk: dict[str, Timed] = {}
            number = len(self.chunks.done)  # over all starts
            group = number % len(groups)
            ordered = engines[:: -1 if self._turns_round(number) else 1]
            for engine in engines:
                self._forget_seen(engine, group)
            run = step_by_step if settings.in_turn else one_by_one
            for engine, turn in zip(
                ordered, run(ordered, groups[group], params), strict=True
            ):
                self._bar.update(task, description=f"{self.point.name}: {engine.arm.name}")
                turn.group = group
                chunk[engine.arm.name] = timed(turn)
                # Without rounds chunks are all there is.
                self.turns.add(engine.arm.name, turn, only_texts=settings.rounds > 0)
            self.chunks.add(chunk, start, group)
            note()
            self._bar.update(task, completed=done + 1)
        self._bar.update(task, completed=most)

    def _turns_round(self, number: int) -> bool:
        """Whether arms run a chunk in the other order, as in every second one of its task.

        Tasks take turns: were it every second one of all, each of six tasks would always
        have the same order. Neighbours begin in different ones, so that all together have
        both as often.
        """
        times, group = divmod(number, len(self.point.groups))
        tasks = self.point.tasks or ("",) * len(self.point.groups)
        first = list(dict.fromkeys(tasks)).index(tasks[group])
        before = tasks[:group].count(tasks[group])
        return (first + before + times) % 2 == 1

    def _warm_up(
        self, engines: list[ArmEngine], params: SamplingParams, least: float
    ) -> None:
        short, groups = at_most(params, SHORT), self.point.warm_up or self.point.groups
        for engine in engines:
            if not engine.arm.learns:
                self._run(engine, groups[0], short)
                continue
            engine.call("forget_texts")
            seconds = 0.0
            for prompts in cycle(groups):
                seconds += self._run(engine, prompts, params).seconds
                if seconds >= least:
                    break
            engine.call("keep_texts")

    def _forget_seen(self, engine: ArmEngine, group: int) -> None:
        """Lets an arm know what it knew after its warm-up, where prompts come again."""
        seen = engine.arm.name, group
        if seen in self._seen and engine.arm.learns:
            engine.call("forget_texts")
        self._seen.add(seen)

    def _turn(self, engine: ArmEngine, params: SamplingParams, group: int = 0) -> Turn:
        self._forget_seen(engine, group)
        turn = self._run(engine, self.point.groups[group], params)
        turn.group = group
        return turn

    def _run(
        self, engine: ArmEngine, prompts: list[list[int]], params: SamplingParams
    ) -> Turn:
        name = f"{self.point.name}: {engine.arm.name}"
        self._bar.update(self._task, description=name)
        return engine.run(prompts, params, full=True)
