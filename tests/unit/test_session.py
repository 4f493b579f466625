"""A session's turn ends in the worker as a request does, though its id goes on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_propd.core.drafting.candidates import Candidates
from vllm_propd.core.drafting.drafter import Drafter
from vllm_propd.core.sources.combined import Sources
from vllm_propd.engine.runner import ProPDRunner

VOCABULARY = 50


def texts_of(name: str, prompt: list[int], output: list[int], put_out: int) -> Any:
    """One greedy sequence, with what a step has put out in its text."""
    text = prompt + output
    return SimpleNamespace(
        ids=[name],
        tokens=np.array([text], np.int32),
        rows=np.zeros(1, np.int64),
        lengths=np.array([len(text)]),
        begins=np.array([len(prompt)]),
        outputs=[output],
        put_out=np.array([put_out]),
        roots=np.array(text[-1:]),
        salts=np.zeros(1, np.int64),
        sampled=np.zeros(1, bool),
        steered=np.zeros(1, bool),
        chain=np.zeros(1, bool),
    )


class Prices:
    """Takes note of the text that candidates are graded by."""

    def __init__(self) -> None:
        self.right: list[bool] = []

    def values(self, sampled: Any, log_probs: Any) -> Any:
        return log_probs

    def observe(self, sampled: bool, right: Any, log_probs: Any) -> None:
        self.right += right[:, :, 0].ravel().tolist()


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A runner that holds one session's turn, and vLLM's own half of the next."""

    def clear(self: Any, req_id: str, new_req_data: Any) -> Any:
        self.requests[req_id].output_token_ids.clear()
        return self.requests[req_id]

    monkeypatch.setattr(GPUModelRunner, "_update_streaming_request", clear)
    runner = object.__new__(ProPDRunner)
    sources, prices = Sources(VOCABULARY, True, True, False), Prices()
    trees = Drafter(sources, prices, learns=True)  # type: ignore[arg-type]
    fields: dict[str, Any] = {
        "drafter": SimpleNamespace(trees=trees),
        "requests": {"session": SimpleNamespace(output_token_ids=[10, 11, 12, 13])},
        "_trees": {"session": None},
    }
    for name, value in fields.items():
        setattr(runner, name, value)
    return runner


def test_a_turns_last_words_are_known_to_others(runner: Any) -> None:
    """The worker drafts nothing for a turn that has ended, and does not see it again."""
    sources, output = runner.drafter.trees.sources, [10, 11]
    sources.see(texts_of("session", [1, 2, 3], output, 2))
    state = runner._update_streaming_request("session", None)
    assert state.output_token_ids == [] and not runner._trees
    prompt = [1, 2, 3, 10, 11, 12, 30, 31]
    sources.see(texts_of("session", prompt, [40], 1))
    other = texts_of("other", [1], [10, 11], 1)
    path, _ = sources.looked_up(other, sources.find(other, lambda: None))
    assert path[0, :3].tolist() == [12, 13, -1]


def test_a_turns_candidates_are_not_graded_by_the_next_turns_text(runner: Any) -> None:
    trees = runner.drafter.trees
    best = np.array([[[11], [12], [13]]])
    said = Candidates.independent(best, np.zeros(best.shape, np.float32))
    sizes = np.array([3])
    trees.draft(texts_of("session", [1, 2, 3], [10], 1), said, sizes)
    runner._update_streaming_request("session", None)
    # Heads are asked late in the next turn, at a place that is beyond the candidates'.
    later = texts_of("session", [1, 2, 3, 10, 30], [20 + i for i in range(9)], 9)
    trees.draft(later, said, sizes)
    assert not trees.prices.right
    later = texts_of("session", [1, 2, 3, 10, 30], [*later.outputs[0], 11, 12, 13], 3)
    trees.draft(later, said, sizes)
    assert trees.prices.right == [True] * 3
