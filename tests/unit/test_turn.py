"""What a turn says of itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vllm_propd.bench.timing import step_profiler
from vllm_propd.bench.timing.step_profiler import Work, install, take
from vllm_propd.bench.timing.turn import Turn


def test_parts_of_steps_of_several_kinds_add_up() -> None:
    """Of four steps three are whole, of 10 ms, and one is in halves, of 1 + 2 + 5 ms."""
    whole = {"prepare": 0.001, "forward": 0.010}
    halves = {"prepare": 0.001, "split": 0.001, "lower half": 0.002, "upper half": 0.005}
    turn = Turn(step_seconds=[0.012] * 3, parts=[whole] * 3)
    turn += Turn(step_seconds=[0.010], parts=[halves])
    assert turn.step_ms() == pytest.approx(
        {
            "prepare": 1.0, "forward": 7.5, "split": 0.25, "lower half": 0.5,
            "upper half": 1.25, "rest": 1.0, "step": 11.5,
        }
    )  # fmt: skip
    assert turn.host_ms() == pytest.approx(2.0)


def test_turns_that_pruned_nothing_say_nothing_of_the_work() -> None:
    turn = Turn(work=Work(trees=2, rows=10, kept=4, layers=6, early_layer=1))
    turn += Turn()
    assert turn.work.ratio == pytest.approx((10 + 4 * 5) / 60)


class Runner:
    """As many of a runner's methods as are timed in every step, and their own clock."""

    now = 0.0

    def _prepare_inputs(self) -> None:
        self._model_forward()  # a part inside another is not counted twice
        self.now += 1.0

    def _model_forward(self) -> None:
        self.now += 10.0

    def _sample(self) -> None:
        pass

    def propose_draft_token_ids(self) -> None:
        self.now += 3.0


def test_a_step_has_its_own_laps(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Runner()
    clock = SimpleNamespace(perf_counter=lambda: runner.now)
    monkeypatch.setattr(step_profiler, "time", clock)
    worker = SimpleNamespace(model_runner=runner)
    install(worker)
    install(worker)  # as when settings change
    runner._model_forward()  # of no step
    for _ in range(2):
        runner._prepare_inputs()
        runner.propose_draft_token_ids()
    runner.propose_draft_token_ids()
    ((first_ended, first), (second_ended, second)), _ = take(worker)
    assert first == {"forward": 10.0, "split": 1.0, "draft": 3.0}
    assert second == {"forward": 10.0, "split": 1.0, "draft": 6.0}
    assert (first_ended, second_ended) == (24.0, 41.0)
    assert take(worker)[0] == []


def test_a_turn_of_first_tokens_only_has_no_speed() -> None:
    turn = Turn(whole_s=0.5, texts=[[7], [8]])
    assert not turn.decodes
    assert turn.tokens_per_s == turn.tokens_per_step == 0.0
    assert turn.laps() == []
    assert Turn(seconds=2.0, tokens=6).laps() == [((0, 0), 2.0)]


def test_a_first_token_is_the_prefills() -> None:
    assert Turn(tokens=9, steps=3).tokens_per_step == 3.0
    assert Turn(tokens=9, prefilled=3, steps=3).tokens_per_step == 2.0
