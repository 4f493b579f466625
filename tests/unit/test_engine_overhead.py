"""The engine's own time between steps."""

from __future__ import annotations

import pytest

from vllm_propd.core.sizing.engine_overhead import WINDOW, EngineOverhead


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
