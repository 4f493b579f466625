"""Drafts reach the scheduler with the step's output.

After each step of an engine that speculates, vLLM's engine core asks the worker for the
drafts. Where the worker is another process (the default), that is one more message a
step, also when nothing is drafted. So our runner puts the drafts into the output, and the
executor answers from there. Other proposers' outputs hold none: their executor asks.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput

from vllm_propd.engine.patch_once import patch_once

DRAFTS = "_propd_drafts"
"""The attribute of an output, and of the executor until it is asked."""


def enclose(output: ModelRunnerOutput, drafts: DraftTokenIds | None) -> None:
    """Puts a step's drafts into its output."""
    setattr(output, DRAFTS, drafts)


def patch_executor() -> None:
    """Teaches the executors of worker processes, Ray's among them, to look there."""
    patch_once(MultiprocExecutor, "sample_tokens", _take_out)
    patch_once(MultiprocExecutor, "take_draft_token_ids", _answer)


def _take_out(original: Any) -> Any:
    def sample_tokens(self: MultiprocExecutor, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        if hasattr(output, DRAFTS):
            setattr(self, DRAFTS, getattr(output, DRAFTS))
        return output

    return sample_tokens


def _answer(original: Any) -> Any:
    def take_draft_token_ids(self: MultiprocExecutor) -> DraftTokenIds | None:
        kept = vars(self)
        drafts: DraftTokenIds | None
        drafts = kept.pop(DRAFTS) if DRAFTS in kept else original(self)
        return drafts

    return take_draft_token_ids
