"""Streaming-input sessions: a turn that stops inside an accepted path.

A session's next turn begins behind what its last one has computed, without the token that
was put out last. vLLM takes for that the number of computed tokens, which with drafts may
be beyond the stop: the text's end, and what was accepted behind it, would stay.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from vllm_propd.engine.integration.config_patch import is_propd
from vllm_propd.engine.integration.patches import Patch


def _cut_at_the_stop(original: Any) -> Any:
    """Lets a session's turn with drafts end where a plain one would."""

    def _handle_stopped_request(self: Scheduler, request: Request) -> bool:
        if request.resumable and is_propd(self.vllm_config.speculative_config):
            kept = request.num_tokens - 1
            request.num_computed_tokens = min(request.num_computed_tokens, kept)
        finished: bool = original(self, request)
        return finished

    return _handle_stopped_request


PATCHES: tuple[Patch, ...] = ((Scheduler, "_handle_stopped_request", _cut_at_the_stop),)
