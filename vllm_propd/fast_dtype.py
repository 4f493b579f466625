"""The floating-point type that products are fastest in."""

from __future__ import annotations

from typing import Literal

from torch.backends.cpu import get_cpu_capability


def fast_dtype(device_type: str) -> Literal["bfloat16", "float32"]:
    """Returns the dtype that products are fastest in: bfloat16 on most devices.

    It is float32 on CPUs without AVX-512, where PyTorch's products of bfloat16 take twice
    as long, and vLLM multiplies a row at a time.

    Args:
        device_type: as PyTorch names it.
    """
    slow = device_type == "cpu" and get_cpu_capability() == "AVX2"
    return "float32" if slow else "bfloat16"
