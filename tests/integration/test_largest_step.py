"""What vLLM measures of a GPU's memory holds whatever a step with trees can need."""

from __future__ import annotations

from typing import Any

import torch
from conftest import engine, greedy, prompts_of, run

from vllm_propd.engine.startup.largest_step import LargestStep, run_largest_step
from vllm_propd.engine.step import propose


class Most:
    """The most rows of logits, and bytes of staged keys and values, of any step so far."""

    def __init__(self, runner: Any):
        self.rows = self.staged = 0
        compute, verify = runner.model.compute_logits, runner._verify

        def watched_logits(hidden_states: torch.Tensor) -> Any:
            self.rows = max(self.rows, len(hidden_states))
            return compute(hidden_states)

        def watched_verify(logits: torch.Tensor | None, step: Any, *args: Any) -> Any:
            parts = [] if step is None else [step, *filter(None, [step.whole])]
            staged = sum(
                kv.key.nbytes + kv.value.nbytes for part in parts for kv in part.staged
            )
            self.staged = max(self.staged, staged)
            return verify(logits, step, *args)

        runner.model.compute_logits, runner._verify = watched_logits, watched_verify

    def take(self) -> tuple[int, int]:
        """Both, which begin anew."""
        found = self.rows, self.staged
        self.rows = self.staged = 0
        return found


def test_no_step_needs_more_than_the_largest_one() -> None:
    with engine(20, max_num_seqs=6, max_num_batched_tokens=160) as llm:
        runner = llm.collective_rpc(lambda worker: worker.model_runner)[0]
        most = Most(runner)
        run_largest_step(runner)
        rows, _ = most.take()
        largest = LargestStep.of(runner)
        assert rows == largest.rows == 80  # five trees of 15 nodes
        run(llm, prompts_of([8] * 5), greedy(40))
        served, staged = most.take()
        # The scheduler's trees were as large as they may be.
        assert served == largest.rows and 0 < staged <= largest.staged
        assert staged > 0.9 * largest.staged


def test_a_crowd_is_drafted_for_in_parts(monkeypatch: Any) -> None:
    with engine(8, propd={"sizing": "dynamic"}) as llm:
        runner = llm.collective_rpc(lambda worker: worker.model_runner)[0]
        drafter, heads = runner.drafter, runner.drafter.num_heads
        hidden = torch.randn(1000, runner.model_config.get_hidden_size())
        compute, seen = runner.model.compute_logits, []

        def watched(states: torch.Tensor) -> torch.Tensor:
            seen.append(len(states))
            return compute(states)

        monkeypatch.setattr(runner.model, "compute_logits", watched)
        some = drafter.candidates(hidden)
        assert max(seen) <= propose.ROWS_AT_ONCE and sum(seen) == 1000 * heads
        monkeypatch.setattr(propose, "ROWS_AT_ONCE", 1000 * heads)
        at_once = drafter.candidates(hidden)
        assert some.tokens.shape == at_once.tokens.shape == (1000, heads, 1, 10)
        # Sums may be ordered otherwise.
        assert (some.tokens == at_once.tokens).mean() > 0.999
        assert abs(some.log_probs - at_once.log_probs).max() < 1e-3
