"""What runs on the device: tree attention and the early head's counts."""

from vllm_propd.core import numba_beside_vllm  # noqa: F401 - before what imports numba
