"""Drafts reach the scheduler with the step's output.

After each step of an engine that speculates, vLLM's engine core asks the worker for the
drafts. Where the worker is another process (the default), that is one more message a
step, also when nothing is drafted. So our runner puts the drafts into the output, and the
executor answers from there. Other proposers' outputs in the same process hold none: their
executor asks.
"""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig
from vllm.v1.executor.abstract import Executor
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput

from vllm_propd.engine.integration.config_patch import is_propd
from vllm_propd.engine.integration.patches import Patch, apply

DRAFTS = "_propd_drafts"
"""The attribute that holds drafts in an output, and then in the executor until asked."""


def attach_drafts(output: ModelRunnerOutput, drafts: DraftTokenIds | None) -> None:
    """Puts a step's drafts into its output."""
    setattr(output, DRAFTS, drafts)


def _teach_chosen(original: Any) -> Any:
    """Teaches executors of worker processes, Ray's too, to take drafts from the output.

    It happens when an engine that drafts by ProPD chooses its executor's class: nobody else
    imports Ray's, and others' engines are to start whatever has become of theirs.
    """

    def get_class(vllm_config: VllmConfig) -> type[Executor]:
        chosen: type[Executor] = original(vllm_config)
        ours = is_propd(vllm_config.speculative_config)
        # The worker of a UniProcExecutor is in the same process.
        if ours and not issubclass(chosen, UniProcExecutor):
            apply(
                (
                    (chosen, "sample_tokens", _take_out),
                    (chosen, "take_draft_token_ids", _answer),
                )
            )
        return chosen

    return get_class


def _take_out(original: Any) -> Any:
    def sample_tokens(self: Executor, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        if hasattr(output, DRAFTS):
            setattr(self, DRAFTS, getattr(output, DRAFTS))
        return output

    return sample_tokens


def _answer(original: Any) -> Any:
    def take_draft_token_ids(self: Executor) -> DraftTokenIds | None:
        kept = vars(self)
        drafts: DraftTokenIds | None
        drafts = kept.pop(DRAFTS) if DRAFTS in kept else original(self)
        return drafts

    return take_draft_token_ids


PATCHES: tuple[Patch, ...] = ((Executor, "get_class", _teach_chosen),)
