"""Work in a folder: one process at a time, whatever has become of the one before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vllm_propd.resume import alone_in

KILLED = """
import os, signal, sys
from pathlib import Path
from vllm_propd.resume import alone_in
with alone_in(Path(sys.argv[1]), "--out"):
    print("in", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_one_process_is_at_work(tmp_path: Path) -> None:
    with (
        alone_in(tmp_path, f"--out {tmp_path}"),
        pytest.raises(ValueError, match=f"--out {tmp_path}: another process is at work"),
        alone_in(tmp_path, f"--out {tmp_path}"),
    ):
        pass
    with alone_in(tmp_path, "--out"):
        pass


def test_a_killed_one_is_out(tmp_path: Path) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, check=False
    )
    assert killed.stdout == b"in\n" and killed.returncode < 0
    with alone_in(tmp_path, "--out"):
        pass
