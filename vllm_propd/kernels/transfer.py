"""Arrays to the device in one copy, and back, without waiting for what it is doing.

A copy from pageable memory waits, and every copy costs a launch: what a step sends is
packed into one pinned buffer. PyTorch keeps such buffers, and gives none away before its
copy is over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

ALIGNED = 16
"""The alignment, in bytes, of each array's start in the buffer."""

Arrays = Mapping[str, np.ndarray]
Tensors = dict[str, torch.Tensor]


def to_device(arrays: Arrays, device: torch.device) -> Tensors:
    """Sends arrays to the device in one copy; what runs there later finds them.

    Args:
        arrays: arrays by name, of types that torch has.
        device: where to. On a CPU nothing is copied: tensors are views of the arrays.
    """
    if device.type == "cpu":
        return {name: torch.from_numpy(values) for name, values in arrays.items()}
    here = packed(arrays, pin=True)
    return unpacked(here.to(device, non_blocking=True), arrays)


def packed(arrays: Arrays, pin: bool) -> torch.Tensor:
    """Packs all arrays' bytes, one after another: ``[bytes]`` uint8 on the host.

    Args:
        arrays: arrays by name.
        pin: whether to use memory that a device can read by itself.
    """
    size = sum(_room(values) for values in arrays.values())
    buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pin)
    all_bytes, start = buffer.numpy(), 0
    for values in arrays.values():
        flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        all_bytes[start : start + len(flat)] = flat
        start += _room(values)
    return buffer


def unpacked(buffer: torch.Tensor, arrays: Arrays) -> Tensors:
    """Returns the arrays in a buffer, as views of it.

    Args:
        buffer: ``[bytes]`` uint8, as ``packed`` has laid it out, on any device.
        arrays: the arrays that were packed, for their types and shapes.
    """
    found, start = {}, 0
    for name, values in arrays.items():
        flat = buffer[start : start + values.nbytes]
        dtype = torch.from_numpy(np.empty(0, values.dtype)).dtype
        found[name] = flat.view(dtype).view(values.shape)
        start += _room(values)
    return found


def _room(values: np.ndarray) -> int:
    return -(-values.nbytes // ALIGNED) * ALIGNED


def to_host(values: torch.Tensor) -> Callable[[], np.ndarray[Any, Any]]:
    """Begins to copy a tensor to the host.

    Returns:
        A function that waits for the copy, not for later work of the device, and returns
        the array.
    """
    if values.device.type == "cpu":
        return lambda: values.numpy()
    here = torch.empty_like(values, device="cpu", pin_memory=True)
    here.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> np.ndarray[Any, Any]:
        copied.synchronize()
        return here.numpy()

    return wait
