"""Arrays to the device and back, without waiting for what it is doing.

``Tensor.to`` waits: a step would stop at every array that it sends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch


def sent(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """The same on the device; what runs there later finds it. On a CPU, a view."""
    return torch.from_numpy(values).to(device, non_blocking=True)


def fetched(values: torch.Tensor) -> Callable[[], np.ndarray[Any, Any]]:
    """Begins to copy a tensor to the host.

    Returns:
        What waits for the copy, not for what the device has been given since, and gives it.
    """
    if values.device.type == "cpu":
        return values.numpy
    here = torch.empty_like(values, device="cpu", pin_memory=True)
    here.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> np.ndarray[Any, Any]:
        copied.synchronize()
        return here.numpy()

    return wait
