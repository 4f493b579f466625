"""The first run's kernel times: on tiny shapes they run, and a wrong kernel fails."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cores  # noqa: F401 - before numba counts them
import pytest
import torch
from gpu_first_run import kernel_times
from gpu_first_run.setting import Setting


def found_by(folder: Path) -> dict[str, Any]:
    setting = Setting("cpu", folder, folder)
    kernel_times.time_kernels(setting, setting.notes("kernel times"))
    return setting.found("kernel times")


def test_they_are_checked_and_timed(tmp_path: Path) -> None:
    found = found_by(tmp_path)
    assert len(found["attention"]) == 2 and len(found["a step of 7B shapes"]) == 2
    for kernels in ("attention", "pruning"):
        assert 0 < max(row["error"] for row in found[kernels]) < kernel_times.MOST_ERROR
    times = [v for row in found["pruning"] for k, v in row.items() if k.endswith("_us")]
    assert min(times) > 0 and float(found["flops_per_s"]) > 0


@pytest.mark.parametrize("kernel", ["count_larger", "relative_mass"])
def test_a_wrong_pruning_kernel_is_an_error(
    kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def more(*args: torch.Tensor) -> torch.Tensor:
        return 1 + right(*args)

    right = getattr(kernel_times, kernel)
    monkeypatch.setattr(kernel_times, kernel, more)
    with pytest.raises(SystemExit, match="pruning are off"):
        found_by(tmp_path)


def test_a_wrong_attention_kernel_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prefix_only(*args: torch.Tensor | float) -> None:
        out, prefix = args[6], args[3]
        assert isinstance(out, torch.Tensor) and isinstance(prefix, torch.Tensor)
        out.copy_(prefix)

    monkeypatch.setattr(kernel_times, "attend_in_step", prefix_only)
    with pytest.raises(SystemExit, match="attention are off"):
        found_by(tmp_path)
    found = json.loads((tmp_path / "kernel times.json").read_text())
    assert "error, pruning" not in found
    # What was there before is not lost, and what a planner sees comes first.
    assert len(found["a step of 7B shapes"]) == 2 and len(found["attention"]) == 2


def test_each_row_is_noted_as_it_comes(tmp_path: Path) -> None:
    setting, seen = Setting("cpu", tmp_path, tmp_path), list[int]()

    def rows() -> Iterator[kernel_times.Row]:
        for number in range(3):
            seen.append(len(setting.found("kernel times").get("rows", ())))
            yield {"number": number}

    found = kernel_times.noted(setting.notes("kernel times"), "rows", rows())
    assert seen == [0, 1, 2] and len(found) == 3
