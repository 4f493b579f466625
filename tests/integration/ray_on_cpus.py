"""Lets vLLM's Ray executor, which hands out GPUs, have ranks on CPUs.

Ray is told of GPUs that are not there, and vLLM that its CPU platform's devices go by that
name. All else is the executor as it is.
"""

from vllm_propd.core import numba_beside_vllm  # noqa: F401 - vLLM imports numba

# isort: split

from typing import Any

from vllm.platforms import current_platform

DEVICE = "GPU"


def pretend() -> None:
    """What each of Ray's processes runs first."""
    type(current_platform).ray_device_key = DEVICE


def refuse(worker: Any) -> None:
    """What vLLM asks after each step, in a message of its own, fails from now on."""
    worker.take_draft_token_ids = None
