"""A table of step costs that was kept, beside what is measured at the next start."""

from __future__ import annotations

from vllm_propd.engine.startup.cost_table import CostTable


def table(tokens: list[int], step_s: list[float]) -> CostTable:
    return CostTable(tokens=tokens, step_s=step_s, sequences=[1])


def test_the_least_of_both_is_taken() -> None:
    kept = table([1, 2, 4, 8], [0.06, 0.07, 0.09, 0.20])
    found = kept.least(table([1, 2], [0.05, 0.08]))
    assert found.tokens == kept.tokens
    assert found.step_s == [0.05, 0.07, 0.09, 0.20]


def test_a_table_that_broke_off_early_grows() -> None:
    kept = table([1, 2], [0.4, 1.3])
    found = kept.least(table([1, 2, 4, 8], [0.06, 0.07, 0.09, 0.11]))
    assert found.tokens == [1, 2, 4, 8]
    assert found.step_s == [0.06, 0.07, 0.09, 0.11]


def test_a_table_of_a_bad_moment_is_known() -> None:
    """Its long steps, which are not timed again, would stand beside short ones' mended."""
    kept = table([1, 2, 4, 64], [0.10, 0.12, 0.14, 0.60])
    assert kept.is_outdone(table([1, 2, 4], [0.05, 0.06, 0.07]))
    assert not kept.is_outdone(table([1, 2, 4], [0.05, 0.12, 0.13]))
    assert not kept.is_outdone(table([1, 2, 4], [0.20, 0.24, 0.28]))
