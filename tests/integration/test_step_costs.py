"""How the start-up table of step costs is timed."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest

from vllm_propd.engine import costs
from vllm_propd.engine.costs import CostTable


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


def test_a_table_of_a_bad_minute_does_not_stay() -> None:
    known = CostTable(
        tokens=[1, 16, 256], step_s=[0.05, 0.25, 0.9], sequences=[1, 8],
        draft_s=[9e-3, 0.1], lower_s=[0.02, 0.03, 0.2], upper_s=[0.04, 0.05, 0.7],
    )  # fmt: skip
    again = CostTable(
        tokens=[1, 16], step_s=[0.06, 0.08], sequences=[1, 8], draft_s=[0.02, 0.03],
        lower_s=[0.01, 0.04], upper_s=[0.05, 0.05],
    )  # fmt: skip
    assert known.least(again) == CostTable(
        tokens=[1, 16, 256], step_s=[0.05, 0.08, 0.9], sequences=[1, 8],
        draft_s=[9e-3, 0.03], lower_s=[0.01, 0.03, 0.2], upper_s=[0.04, 0.05, 0.7],
    )  # fmt: skip
