"""How the start-up table of step costs is timed."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest

from vllm_propd.engine import costs


@pytest.mark.parametrize("slow_from", range(0, 40, 3))
def test_a_slow_moment_spoils_no_size(
    monkeypatch: pytest.MonkeyPatch, slow_from: int
) -> None:
    now, calls = 0.0, 0

    def work(seconds: float) -> None:
        nonlocal now, calls
        calls += 1
        first = calls <= 4  # prepares its shape
        slow = slow_from <= calls < slow_from + 4
        now += seconds * (10 if first else 5 if slow else 1)

    monkeypatch.setattr(costs, "time", SimpleNamespace(perf_counter=lambda: now))
    sizes = {1: 0.05, 8: 0.06, 48: 0.2, 256: 0.9}
    works = {("step_s", size): partial(work, seconds) for size, seconds in sizes.items()}
    found = costs._timed(works, lambda: None, quiet=True)
    assert {size: seconds for (_, size), seconds in found.items()} == pytest.approx(sizes)
    assert calls == 3 * (1 + costs.OFTEN) + 1 + costs.REPEATS
