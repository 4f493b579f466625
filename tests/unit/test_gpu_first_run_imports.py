"""The first run's items without engines: what would be hopeless, and tests' output."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from gpu_first_run import imports
from gpu_first_run.setting import Setting


def stub(monkeypatch: pytest.MonkeyPatch, version: int | None) -> None:
    """What vLLM says of its FlashAttention: a version, or none."""
    monkeypatch.setitem(
        sys.modules,
        "vllm.v1.attention.backends.fa_utils",
        SimpleNamespace(get_flash_attn_version=lambda: version),
    )
    monkeypatch.setitem(
        sys.modules,
        "vllm.vllm_flash_attn.flash_attn_interface",
        SimpleNamespace(fa_version_unsupported_reason=lambda asked: f"no {asked}: ABI"),
    )


@pytest.mark.parametrize(
    ("major", "version", "reason"),
    [
        (9, 3, None),
        (9, None, "3 does not load, vLLM has None: no 3: ABI"),
        (9, 2, "3 does not load, vLLM has 2: no 3: ABI"),
        (8, 2, None),
        (8, None, "2 does not load, vLLM has None: no 2: ABI"),
        (10, None, "4 does not load, vLLM has None: no 4: ABI"),
    ],
)
def test_without_flash_attention_there_is_no_point(
    major: int, version: int | None, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub(monkeypatch, version)
    assert imports.lacking_attention(major) == reason


TESTS = """
import time

def test_right():
    pass

def test_wrong():
    assert 1 == 2
"""


def test_what_tests_print_is_there_as_it_comes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also of files beside one that does not even import."""
    paths = [tmp_path / "test_some.py", tmp_path / "test_broken.py"]
    paths[0].write_text(TESTS)
    paths[1].write_text("import nowhere_to_be_found")
    notes = Setting("cpu", tmp_path, tmp_path).notes("kernel tests")
    with pytest.raises(SystemExit):
        imports.run_tests([*map(str, paths)], {**os.environ}, notes)
    found = Setting("cpu", tmp_path, tmp_path).found("kernel tests")
    assert "1 failed, 1 passed, 1 error" in found["tests"]
    assert len(found["failed"]) == 2
    assert "test_right PASSED" in capfd.readouterr().out


def test_the_kernels_tests_are_there() -> None:
    for name in (*imports.ON_GPU, imports.QUICK):
        assert (imports.ROOT / name).is_file()
