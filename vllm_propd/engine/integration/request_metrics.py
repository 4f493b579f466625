"""What is known of a request at its end, in its ``metrics``: for those who keep only these.

Ray's vLLM stage hands on a request's text, tokens and ``RequestOutput.metrics``, and drops
why it ended and what became of its drafts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm.outputs import CompletionOutput
from vllm.v1.engine.output_processor import RequestState
from vllm.v1.metrics.stats import RequestStateStats

from vllm_propd.engine.integration.patches import Patch


@dataclass
class AnsweredStats(RequestStateStats):
    """vLLM's statistics of a request that has ended.

    Attributes:
        finish_reason: as ``CompletionOutput`` has it.
        speculative_decoding: as vLLM's server has it in ``metrics``; None: not asked for
            (``per_request_spec_decode_metrics``).
    """

    finish_reason: str | None = None
    speculative_decoding: dict[str, Any] | None = None


def _completed(original: Callable[..., CompletionOutput]) -> Callable[..., Any]:
    def completed(self: RequestState, *args: Any, **kwargs: Any) -> CompletionOutput:
        output = original(self, *args, **kwargs)
        if output.finish_reason is not None and self.stats is not None:
            drafts = output.spec_decode_metrics
            self.stats = AnsweredStats(
                **vars(self.stats),
                finish_reason=output.finish_reason,
                speculative_decoding=None if drafts is None else drafts.to_dict(),
            )
        return output

    return completed


PATCHES: tuple[Patch, ...] = ((RequestState, "_new_completion_output", _completed),)
