"""Structured output: what vLLM does by the rows of a chain of drafts."""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger

logger = init_logger("vllm.propd.grammar")


def needs_chain(runner: Any, request_id: str) -> bool:
    """Whether a request's draft list is checked, and its logits masked, as a chain.

    Args:
        runner: the worker's model runner.
        request_id: of a request that it knows.
    """
    params = runner.requests[request_id].sampling_params
    if params is None or params.structured_outputs is None:
        return False
    logger.info_once("ProPD: requests with structured output are drafted a chain")
    return True


def keeps_all_rows(runner: Any) -> bool:
    """Whether vLLM masks logits by the rows of scheduled drafts: none may be missing."""
    if not any(needs_chain(runner, i) for i in runner.input_batch.req_ids):
        return False
    logger.info_once("ProPD: steps with structured output are not pruned")
    return True
