"""Running engines, and the arms that take turns in them."""

from __future__ import annotations

import time
from collections.abc import Generator
from random import Random
from typing import Any, ClassVar

import psutil
from rich.progress import Progress
from vllm import LLM, SamplingParams

from vllm_propd.bench.arms import Arm, shared_config
from vllm_propd.bench.timing import step_profiler
from vllm_propd.bench.timing.step_profiler import Work
from vllm_propd.bench.timing.turn import DraftCounter, Recording, Turn
from vllm_propd.config import METHOD, ProPDConfig

# All engines may run in this process, and vLLM's own arms import numba.
from vllm_propd.core import numba_beside_vllm  # noqa: F401
from vllm_propd.engine.integration.config_patch import find_config
from vllm_propd.engine.integration.support_matrix import check_engine

FASTEST = 3
"""The most tokens that a request of a full batch puts out, as a multiple of its share."""

HUGE_PAGES = {
    "THP_MEM_ALLOC_ENABLE": "1",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
"""The environment of all arms' processes: it turns huge pages on.

Without them equal engines of plain vLLM differed: one, because of the small pages that were
left for its weights, was 10% slower than others all its life. With huge pages all are
alike, and as fast as most were."""

NEVER_FULL = 1 << 30
"""The limit, in steps, of a recording that is to hold every step."""

SETTLES_S = 0.05
"""Seconds to wait after a suspended engine has been resumed.

A worker that goes to sleep as a message comes may miss it, and look again after five
seconds; a worker that has just been resumed is about to go to sleep."""


def _children() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


class Engine:
    """A running engine.

    Other engines may wait beside it with their processes suspended: idle workers would
    poll for a second, on cores that the running one needs.

    Args:
        config: vLLM's speculative config.
        options: the other arguments of ``vllm.LLM``.
        timed: whether the worker gets stopwatches (they need
            ``VLLM_ALLOW_INSECURE_SERIALIZATION=1``).
    """

    def __init__(
        self, config: dict[str, Any] | None, options: dict[str, Any], timed: bool = False
    ):
        self.timed = timed
        self._is_ours = (config or {}).get("method") == METHOD
        self._left = 0.0
        Engine._suspend_running()
        others = _children()
        self.llm = LLM(**options, speculative_config=config)
        self._processes = _children() - others
        Engine._running = self
        self.requests, self.drafts = 0, DraftCounter()
        self.llm.llm_engine.logger_manager = self.drafts
        self._settings: ProPDConfig | None = None
        self._watch()

    def settings(self, keys: dict[str, Any]) -> ProPDConfig:
        """Returns the settings that keys (without ``method``) stand for in this engine.

        Raises:
            ValueError: the keys are wrong, or the engine or the heads do not suit them.
        """
        engine = self.llm.llm_engine
        target = engine.model_config
        settings = find_config(keys, target.model, target.revision)
        return check_engine(engine.vllm_config, settings)

    _running: ClassVar[Engine | None] = None

    @classmethod
    def _suspend_running(cls) -> None:
        if cls._running is not None:
            for process in cls._running._processes:
                process.suspend()
            cls._running._left = time.perf_counter()
            cls._running = None

    def take_over(self) -> None:
        """Suspends the engine that ran before, and resumes this one."""
        if Engine._running is self:
            return
        Engine._suspend_running()
        for process in self._processes:
            process.resume()
        Engine._running = self
        if self._processes:
            time.sleep(SETTLES_S)
        if self._is_ours:
            away = time.perf_counter() - self._left
            self.llm.collective_rpc("leave_out", args=(away,))

    def rest(self) -> None:
        """Suspends this engine, if it runs: its processes work on between two steps."""
        if Engine._running is self:
            Engine._suspend_running()

    def use(self, settings: ProPDConfig) -> None:
        """Switches the engine to these settings of method propd, if they are new to it."""
        if settings != self._settings:
            sent = settings.model_dump_json(exclude_unset=True)
            self.llm.collective_rpc("use_settings", args=(sent,))
            self._settings = settings
            self._watch()

    def _watch(self) -> None:
        """Puts stopwatches into the worker, anew where what they time has changed."""
        if self.timed:
            self.llm.collective_rpc(step_profiler.install)

    def close(self) -> None:
        """Ends the engine's processes."""
        self.take_over()  # who is suspended would not hear that it is to end
        self.llm.llm_engine.engine_core.shutdown()
        Engine._running = None


def at_most(params: SamplingParams, new_tokens: int) -> SamplingParams:
    """Returns a copy of ``params`` that allows at most ``new_tokens`` new tokens."""
    assert params.max_tokens is not None
    params = params.clone()
    params.max_tokens = min(params.max_tokens, new_tokens)
    return params


def seeded(params: SamplingParams, prompts: list[list[int]]) -> list[SamplingParams]:
    """Returns the params of each prompt; of a seed, each gets another one.

    It depends on the prompt and its place alone: all arms draw the same random numbers.
    """
    if params.seed is None:
        return [params] * len(prompts)
    found = [params.clone() for _ in prompts]
    for place, (own, prompt) in enumerate(zip(found, prompts, strict=True)):
        own.seed = Random(f"{params.seed} {place} {prompt}").getrandbits(62)
    return found


class ArmEngine:
    """An arm, and the engine that runs it; ProPD's arms may share one.

    Args:
        arm: what to compare.
        engine: one that runs the arm's method.
    """

    def __init__(self, arm: Arm, engine: Engine):
        self.arm, self.engine = arm, engine
        self._settings = engine.settings(arm.keys) if arm.is_ours else None

    def begin(self, name: str, prompt: list[int], params: SamplingParams) -> None:
        """Adds a request, which goes on as the engine's steps are run."""
        self.take_over()
        self.engine.llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, params)

    def take_over(self) -> None:
        """Makes this arm the one that runs: resumes its engine, and sets its settings."""
        self.engine.take_over()
        if self._settings is not None:
            self.engine.use(self._settings)

    def call(self, method: str, *args: Any) -> Any:
        """Calls a method of the arm's workers; returns what the first one does."""
        self.take_over()
        return self.engine.llm.collective_rpc(method, args=args)[0]

    def run(
        self, prompts: list[list[int]], params: SamplingParams, full: bool = False
    ) -> Turn:
        """Generates all prompts together; see ``steps``."""
        steps = self.steps(prompts, params, full)
        while True:
            try:
                next(steps)
            except StopIteration as over:
                turn: Turn = over.value
                return turn

    def steps(
        self, prompts: list[list[int]], params: SamplingParams, full: bool = False
    ) -> Generator[None, None, Turn]:
        """Generates all prompts together, a step at a time; returns what happened.

        Counting begins when all have a first token. What passes while the caller does
        something else is not counted; before it goes on it calls ``take_over``.

        Args:
            prompts: token ids.
            params: of every request; ``max_tokens`` is two or more.
            full: keep the batch full to the end: faster requests go on until all requests
                together have put out ``max_tokens`` for each. Else the last requests run
                alone, and what is measured is the luck of the slowest one.
        """
        self.take_over()
        llm, turn, drafts = self.engine.llm, Turn(full=full), self.engine.drafts
        engine = llm.llm_engine
        drafts.reset()
        if self.engine.timed:  # what ran ahead of the turn before has been timed, too
            llm.collective_rpc(step_profiler.take)
        recording = self.arm.is_ours
        if recording:
            llm.collective_rpc("start_sizing_records")
        names = [str(self.engine.requests + i) for i in range(len(prompts))]
        self.engine.requests += len(prompts)
        assert params.max_tokens is not None
        wanted = params.max_tokens * len(prompts)
        if full:
            params = params.clone()
            params.max_tokens = FASTEST * params.max_tokens
        texts: dict[str, list[int]] = {name: [] for name in names}
        of_each = seeded(params, prompts)
        resumed = time.perf_counter()
        for name, prompt, own in zip(names, prompts, of_each, strict=True):
            engine.add_request(name, {"prompt_token_ids": prompt}, own)
        put_out = 0
        while engine.has_unfinished_requests() and put_out < wanted:
            step_started = time.perf_counter()
            if prefilled := all(texts.values()):
                turn.began = min(turn.began, step_started)
            drafted = drafts.drafted
            outputs = engine.step()
            if outputs and prefilled:
                turn.step_seconds.append(time.perf_counter() - step_started)
                turn.step_kinds.append((len(outputs), drafts.drafted - drafted))
            for output in outputs:
                before, ids = texts[output.request_id], output.outputs[0].token_ids
                if len(ids) > len(before):
                    put_out += len(ids) - len(before)
                    turn.steps += prefilled
                    turn.tokens += prefilled * (len(ids) - len(before))
                    texts[output.request_id] = list(ids)
            spent = time.perf_counter() - resumed
            turn.whole_s += spent
            turn.seconds += spent * prefilled
            yield
            resumed = time.perf_counter()
        engine.abort_request(names)
        while engine.has_unfinished_requests():
            engine.step()
        if self.engine.timed:
            steps, work = llm.collective_rpc(step_profiler.take)[0]
            laps = [parts for ended, parts in steps if ended > turn.began]
            turn.parts = laps[: len(turn.step_seconds)]  # the worker may be a step ahead
            turn.work = Work(**work)
        if recording:
            turn.records = llm.collective_rpc("take_sizing_records")[0]
        turn.texts = [texts[name] for name in names]
        turn.drafted, turn.drafts = drafts.drafted, drafts.drafts
        turn.accepted_at = drafts.accepted_at
        return turn

    def run_all(
        self, prompts: list[list[int]], batch_size: int, params: SamplingParams
    ) -> Turn:
        """Generates the prompts, ``batch_size`` of them together; see ``run``."""
        turn = Turn()
        for start in range(0, len(prompts), batch_size):
            turn += self.run(prompts[start : start + batch_size], params)
        return turn

    def record(
        self, prompts: list[list[int]], params: SamplingParams
    ) -> tuple[Turn, Recording]:
        """Generates prompts as ``run`` does, and records every tree; ProPD's arms only."""
        self.call("start_recording", NEVER_FULL)
        return self.run(prompts, params), self.call("take_recording")

    def reliability(self) -> list[list[tuple[float, float]]]:
        """Returns (probability said, share found true) by head; ProPD's arms only."""
        return [[(said, true) for said, true in one] for one in self.call("reliability")]

    def peak_rss_mib(self) -> float:
        """Returns the most memory that each worker has held, summed over them, in MiB."""
        self.engine.take_over()
        return sum(self.engine.llm.collective_rpc(step_profiler.peak_rss))


def start_engines(
    arms: list[Arm],
    options: dict[str, Any],
    bar: Progress,
    timed: bool = False,
    shared: bool = True,
) -> list[ArmEngine]:
    """Starts the arms' engines, one after the other; ProPD's arms share one.

    Args:
        arms: what to compare.
        options: arguments of ``vllm.LLM`` that all share.
        bar: shows how far it is.
        timed: see ``Engine``.
        shared: else each of ProPD's arms has an engine of its own, too.

    Raises:
        ValueError: ProPD's arms cannot share one; see ``shared_config``.
    """
    task = bar.add_task("starting engines", total=len(arms))
    engines: list[ArmEngine] = []
    ours_together: Engine | None = None
    ours = [arm for arm in arms if arm.is_ours]
    # Before any engine starts, which takes a while.
    largest = shared_config(ours, options["model"]) if ours and shared else {}
    for arm in arms:
        bar.update(task, description=f"starting {arm.name}")
        config = arm.speculative_config
        if arm.is_ours and shared:
            ours_together = ours_together or Engine(largest, options, timed)
            engines.append(ArmEngine(arm, ours_together))
        else:
            with arm.environment():
                engines.append(ArmEngine(arm, Engine(config, options, timed)))
        bar.advance(task)
    return engines


def close_engines(engines: list[ArmEngine]) -> None:
    """Ends all engines' processes."""
    for engine in {id(one.engine): one.engine for one in engines}.values():
        engine.close()
