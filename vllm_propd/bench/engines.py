"""Running engines, and the arms that take turns in them."""

from __future__ import annotations

import time
from typing import Any

from rich.progress import Progress
from vllm import LLM, SamplingParams

from vllm_propd.bench import stopwatch
from vllm_propd.bench.arms import Arm, most_nodes
from vllm_propd.bench.stopwatch import Work
from vllm_propd.bench.turn import DraftCounter, Recording, Turn
from vllm_propd.config import ProPDConfig
from vllm_propd.engine.doors import find_config
from vllm_propd.engine.support import check_engine

NEVER_FULL = 1 << 30
"""Steps of a recording that holds all."""


class Engine:
    """A running engine.

    Args:
        config: vLLM's speculative config.
        options: the other arguments of ``vllm.LLM``.
        timed: with stopwatches in the worker (they need
            ``VLLM_ALLOW_INSECURE_SERIALIZATION=1``).
    """

    def __init__(
        self, config: dict[str, Any] | None, options: dict[str, Any], timed: bool = False
    ):
        self.timed = timed
        self.llm = LLM(**options, speculative_config=config)
        self.requests, self.drafts = 0, DraftCounter()
        self.llm.llm_engine.logger_manager = self.drafts
        self._settings: ProPDConfig | None = None
        self._watch()

    def settings(self, keys: dict[str, Any]) -> ProPDConfig:
        """What keys of method propd mean here.

        Raises:
            ValueError: what is wrong with them.
        """
        engine = self.llm.llm_engine
        keys = {key: value for key, value in keys.items() if key != "method"}
        settings = find_config(keys, engine.model_config.model)
        return check_engine(engine.vllm_config, settings)

    def use(self, settings: ProPDConfig) -> None:
        """Goes on with other settings of method propd, if they are others."""
        if settings != self._settings:
            sent = settings.model_dump_json(exclude_unset=True)
            self.llm.collective_rpc("use_settings", args=(sent,))
            self._settings = settings
            self._watch()

    def _watch(self) -> None:
        """Puts stopwatches into the worker, anew where what they time has changed."""
        if self.timed:
            self.llm.collective_rpc(stopwatch.install)

    def close(self) -> None:
        """Ends the engine's processes."""
        self.llm.llm_engine.engine_core.shutdown()


class ArmEngine:
    """An arm, and the engine that runs it; ProPD's arms may share one.

    Args:
        arm: what to compare.
        engine: of this method.
    """

    def __init__(self, arm: Arm, engine: Engine):
        self.arm, self.engine = arm, engine
        keys = arm.speculative_config if arm.is_ours else None
        self._settings = engine.settings(keys) if keys else None

    def _take_over(self) -> None:
        """Whatever arm ran before, this one is next."""
        if self._settings is not None:
            self.engine.use(self._settings)

    def run(self, prompts: list[list[int]], params: SamplingParams) -> Turn:
        """Generates all prompts together."""
        self._take_over()
        llm, turn, drafts = self.engine.llm, Turn(), self.engine.drafts
        engine = llm.llm_engine
        drafts.reset()
        recording = self.engine.timed and self.arm.is_ours
        if recording:
            llm.collective_rpc("start_sizing_records")
        names = [str(self.engine.requests + i) for i in range(len(prompts))]
        self.engine.requests += len(prompts)
        texts: dict[str, list[int]] = {}
        seen = dict.fromkeys(names, 0)
        started = time.perf_counter()
        for name, prompt in zip(names, prompts, strict=True):
            engine.add_request(name, {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            step_started = time.perf_counter()
            outputs = engine.step()
            if outputs:
                turn.step_seconds.append(time.perf_counter() - step_started)
            for output in outputs:
                ids = output.outputs[0].token_ids
                if len(ids) > seen[output.request_id]:
                    turn.steps += seen[output.request_id] > 0
                    seen[output.request_id] = len(ids)
                if output.finished:
                    texts[output.request_id] = list(ids)
        turn.seconds = time.perf_counter() - started
        if self.engine.timed:
            turn.parts, work = llm.collective_rpc(stopwatch.take)[0]
            turn.work = Work(**work)
        if recording:
            turn.records = llm.collective_rpc("take_sizing_records")[0]
        turn.texts = [texts[name] for name in names]
        turn.tokens = sum(map(len, turn.texts))
        turn.drafted, turn.drafts = drafts.drafted, drafts.drafts
        turn.accepted_at = drafts.accepted_at
        return turn

    def run_all(
        self, prompts: list[list[int]], batch_size: int, params: SamplingParams
    ) -> Turn:
        """Generates the prompts, ``batch_size`` of them together."""
        turn = Turn()
        for start in range(0, len(prompts), batch_size):
            turn += self.run(prompts[start : start + batch_size], params)
        return turn

    def record(
        self, prompts: list[list[int]], params: SamplingParams
    ) -> tuple[Turn, Recording]:
        """The same, telling of every tree; ProPD's arms only."""
        self._take_over()
        llm = self.engine.llm
        llm.collective_rpc("start_recording", args=(NEVER_FULL,))
        turn = self.run(prompts, params)
        return turn, llm.collective_rpc("take_recording")[0]

    def peak_rss_mib(self) -> float:
        """The most memory that the workers have held, together, MiB."""
        return sum(self.engine.llm.collective_rpc(stopwatch.peak_rss))


def start_engines(
    arms: list[Arm], options: dict[str, Any], bar: Progress, timed: bool = False
) -> list[ArmEngine]:
    """Engines for the arms, one after the other: one for all of ProPD's.

    Args:
        arms: what to compare.
        options: arguments of ``vllm.LLM`` that all share.
        bar: shows how far it is.
        timed: see ``Engine``.
    """
    task = bar.add_task("starting engines", total=len(arms))
    engines: list[ArmEngine] = []
    shared: Engine | None = None
    ours = [arm for arm in arms if arm.is_ours]
    for arm in arms:
        bar.update(task, description=f"starting {arm.name}")
        config = arm.speculative_config
        if config is not None and arm.is_ours:
            largest = {**config, "num_speculative_tokens": most_nodes(ours)}
            shared = shared or Engine(largest, options, timed)
        engine = shared if arm.is_ours else Engine(config, options, timed)
        assert engine is not None
        engines.append(ArmEngine(arm, engine))
        bar.advance(task)
    return engines


def close_engines(engines: list[ArmEngine]) -> None:
    """Ends all engines' processes."""
    for engine in {id(one.engine): one.engine for one in engines}.values():
        engine.close()
