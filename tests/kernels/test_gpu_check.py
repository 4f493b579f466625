"""The check for GPUs runs through on tiny shapes, and fails where a kernel is wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import typer

sys.path.append(str(Path(__file__).parents[2] / "scripts"))

import gpu_check


def test_it_checks_times_and_writes(tmp_path: Path) -> None:
    gpu_check.main(out=tmp_path / "found.json", smoke=True)
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["attention"]) == 2 and len(found["curve"]) == 2
    for kernels in ("attention", "pruning"):
        assert 0 < max(row["error"] for row in found[kernels]) < 5e-3
    times = [v for row in found["pruning"] for k, v in row.items() if k.endswith("_us")]
    assert min(times) > 0 and found["rates"]["flops_per_s"] > 0


@pytest.mark.parametrize("kernel", ["count_larger", "relative_mass"])
def test_a_wrong_pruning_kernel_is_an_error(
    kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def more(*args: torch.Tensor) -> torch.Tensor:
        return 1 + right(*args)

    right = getattr(gpu_check, kernel)
    monkeypatch.setattr(gpu_check, kernel, more)
    with pytest.raises(typer.Exit):
        gpu_check.main(out=tmp_path / "found.json", smoke=True)


def test_a_wrong_kernel_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prefix_only(*args: torch.Tensor | float) -> None:
        out, prefix = args[6], args[3]
        assert isinstance(out, torch.Tensor) and isinstance(prefix, torch.Tensor)
        out.copy_(prefix)

    monkeypatch.setattr(gpu_check, "attend_in_step", prefix_only)
    with pytest.raises(typer.Exit):
        gpu_check.main(out=tmp_path / "found.json", smoke=True)
    assert not (tmp_path / "found.json").exists()
