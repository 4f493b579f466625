"""The engine's own time between steps."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_propd.core.sizing.controller import DynamicSizing
from vllm_propd.core.sizing.dynamic_drafting import Drafted
from vllm_propd.core.sizing.engine_overhead import WINDOW, EngineOverhead
from vllm_propd.core.sizing.protocol import StepLoad
from vllm_propd.core.sizing.step_cost import StepCost


def test_idle_times_are_no_gaps() -> None:
    gaps = EngineOverhead()
    assert gaps.plain == gaps.extra == 0.0
    for seconds in (0.001, 9.0, 0.001, 0.002, 7.0):
        gaps.add(drafted=False, seconds=seconds)
    assert gaps.plain == 0.002


def test_what_drafting_adds_is_remembered_while_all_steps_draft() -> None:
    gaps = EngineOverhead()
    gaps.add(drafted=True, seconds=0.003)
    assert (gaps.plain, gaps.extra) == (0.003, 0.0), "nothing else is known"
    for _ in range(WINDOW):
        gaps.add(drafted=False, seconds=0.002)
        gaps.add(drafted=True, seconds=0.003)
    assert (gaps.plain, gaps.extra) == (0.002, pytest.approx(0.001))
    for _ in range(WINDOW):  # more requests
        gaps.add(drafted=True, seconds=0.006)
    assert gaps.plain == pytest.approx(0.005)
    assert gaps.extra == pytest.approx(0.001)


def test_waiting_for_requests_is_no_time_of_the_engines() -> None:
    """Short requests, one after another, half a second apart: no step goes on with one."""
    now, cost = [0.0], StepCost(np.array([1, 64]), np.array([0.01, 0.02]))
    sizing = DynamicSizing(cost, None, 8, 100, clock=lambda: now[0])
    for _ in range(2 * WINDOW):
        sizing.begin(now[0], StepLoad(1, 20, 19, 0, fresh=True))
        sizing.leave(Drafted(now[0]))
        now[0] += 0.5
    assert sizing.overhead.plain == 0.0
    sizing.begin(now[0], StepLoad(1, 1, 0, 20))
    assert sizing.overhead.plain == 0.5, "and what lies between two tokens is"
