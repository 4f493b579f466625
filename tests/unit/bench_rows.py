"""A benchmark's row as it could have been measured."""

from __future__ import annotations

from typing import Any

from vllm_propd.bench.results import Row


def measured(arm: str, ratio: float, **fields: Any) -> Row:
    """A row of ``arm``, ``ratio`` times as fast as plain vLLM; ``fields`` say the rest."""
    given: dict[str, Any] = {
        "tokens_per_s": 10 * ratio,
        "tokens_per_s_min": 9 * ratio,
        "tokens_per_s_max": 11 * ratio,
        "ratio_to_plain": ratio,
        "rounds": 3,
        "tokens_per_step": 2 * ratio,
        "drafted_per_step": 48,
        "host_ms_per_step": 1.0,
        "measured_step_ms": [],
        "estimated_step_ms": [],
        "tree_sizes": [],
        "peak_rss_mib": 500,
        "config": None,
        "seed": 0,
    }
    return Row(arm=arm, **{**given, **fields})
