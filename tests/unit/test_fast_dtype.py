"""Products are in bfloat16, but not where that is slow."""

from __future__ import annotations

import pytest

from vllm_propd import fast_dtype


@pytest.mark.parametrize(
    ("capability", "device_type", "expected"),
    [
        ("AVX2", "cpu", "float32"),
        ("AVX512", "cpu", "bfloat16"),
        ("DEFAULT", "cpu", "bfloat16"),
        ("AVX2", "cuda", "bfloat16"),
    ],
)
def test_cpus_without_avx512_multiply_float32(
    monkeypatch: pytest.MonkeyPatch, capability: str, device_type: str, expected: str
) -> None:
    monkeypatch.setattr(fast_dtype, "get_cpu_capability", lambda: capability)
    assert fast_dtype.fast_dtype(device_type) == expected
