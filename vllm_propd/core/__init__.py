"""What is ProPD itself: trees, growth, acceptance, tree attention. No vLLM here."""

from vllm_propd.core import numba_beside_vllm  # noqa: F401 - before what imports numba
