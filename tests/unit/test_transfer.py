"""Arrays packed into one buffer come out as they were."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm_propd.kernels.transfer import ALIGNED, packed, to_device, to_host, unpacked


def arrays(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    types = (np.int64, np.int32, np.float32, np.bool_, np.uint8, np.float64)
    shapes: list[tuple[int, ...]] = [(0,), (1,), (5,), (3, 7), (2, 0), (4, 1, 3)]
    found = {}
    for number, dtype in enumerate(types):
        shape = shapes[int(rng.integers(len(shapes)))]
        values = (rng.integers(0, 100, shape) > 40) if dtype is np.bool_ else None
        if values is None:
            values = rng.integers(0, 100, shape).astype(dtype)
        found[str(number)] = values
    found["strided"] = rng.integers(0, 9, (6, 4))[::2, 1]
    return found


@pytest.mark.parametrize("seed", range(12))
def test_arrays_come_out_as_they_were(seed: int) -> None:
    sent = arrays(seed)
    buffer = packed(sent, pin=False)
    assert buffer.dtype == torch.uint8 and len(buffer) % ALIGNED == 0
    found = unpacked(buffer.clone(), sent)  # as if it had been copied
    assert list(found) == list(sent)
    for name, values in sent.items():
        assert found[name].numpy().dtype == values.dtype
        np.testing.assert_array_equal(found[name].numpy(), values, name)
        assert found[name].storage_offset() * values.itemsize % ALIGNED == 0


def test_nothing_is_copied_to_a_cpu() -> None:
    values = np.arange(4)
    found = to_device({"values": values}, torch.device("cpu"))
    found["values"][0] = 7
    assert values[0] == 7
    assert to_host(found["values"])().tolist() == [7, 1, 2, 3]
