"""What an arm's engine says of its steps, with an engine that has its tokens ready."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams

from vllm_propd.bench.arms import Arm
from vllm_propd.bench.engines import ArmEngine
from vllm_propd.bench.timing.turn import DraftCounter, Turn


class Ready:
    """Stands for vLLM's engine: a token of each request a step, two drafts for each."""

    def __init__(self, drafts: DraftCounter):
        self.drafts, self.left = drafts, {}  # type: ignore[var-annotated]
        self.out: dict[str, list[int]] = {}

    def add_request(self, name: str, prompt: Any, params: SamplingParams) -> None:
        length = prompt["prompt_token_ids"][0]
        self.left[name] = min(length, params.max_tokens or length)

    def has_unfinished_requests(self) -> bool:
        return any(self.left.values())

    def abort_request(self, names: list[str]) -> None:
        self.left.clear()

    def step(self) -> list[Any]:
        running = [name for name, left in self.left.items() if left]
        for name in running:
            self.left[name] -= 1
            self.out.setdefault(name, []).append(7)
        self.drafts.drafted += 2 * len(running)
        return [
            SimpleNamespace(
                request_id=name, outputs=[SimpleNamespace(token_ids=self.out[name])]
            )
            for name in running
        ]


def turn_of(lengths: list[int], full: bool) -> Turn:
    """A turn with texts of such lengths, of which 4 tokens each are wanted."""
    drafts = DraftCounter()
    engine: Any = SimpleNamespace(
        llm=SimpleNamespace(llm_engine=Ready(drafts)),
        drafts=drafts,
        timed=False,
        requests=0,
        take_over=lambda: None,
    )
    one = ArmEngine(Arm("plain", None), engine)
    return one.run([[n] for n in lengths], SamplingParams(max_tokens=4), full)


@pytest.mark.parametrize("full", [False, True])
def test_a_turn_knows_whether_its_batch_was_kept_full(full: bool) -> None:
    assert turn_of([12, 12], full).full is full


def test_a_steps_kind_is_its_sequences_and_their_drafts() -> None:
    turn = turn_of([2, 4, 3], full=False)
    assert list(map(len, turn.texts)) == [2, 4, 3]
    # After the step of all first tokens.
    assert turn.step_kinds == [(3, 6), (2, 4), (1, 2)]
