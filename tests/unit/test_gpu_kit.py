"""The kit for a GPU's machine: it fits the calls that carry it, and arrives whole."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KIT = ROOT / "scripts" / "gpu_kit"
MIB = 1 << 20
CALL = 62 * MIB
"""What a call may hold: 64 MiB, of which two are for what comes later."""

TOOLS = (
    "bash", "mkdir", "cp", "awk", "sha256sum", "python3", "date", "cat", "tar", "rm",
)  # fmt: skip
"""That the other machine is known to need."""

pytestmark = pytest.mark.skipif(
    not (ROOT / ".git").exists(), reason="what travels is what git knows"
)


def run(*command: str | Path, **environment: str) -> str:
    return subprocess.run(
        [str(part) for part in command], env={**os.environ, **environment},
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip


def test_a_piece_fits_a_call_beside_the_checkout() -> None:
    tracked = run("git", "-C", ROOT, "ls-files", "-z").split("\0")
    paths = [ROOT / name for name in tracked if name]
    size = sum(path.lstat().st_size for path in paths if path.is_file())
    piece = int(run("bash", KIT / "pieces.sh", "--piece"))
    assert size + piece < CALL
    assert piece > 24 * MIB  # five calls would be too many


def packed(folder: Path, out: Path, piece: int) -> list[Path]:
    run("bash", KIT / "pieces.sh", folder, out, PIECE=str(piece))
    return sorted(out.iterdir())


def made(folder: Path) -> dict[str, bytes]:
    files = {"vllm/core.so": os.urandom(300_000), "note.txt": b"all there"}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return files


@pytest.mark.parametrize("xz", [True, False], ids=["xz", "no xz"])
def test_what_is_packed_arrives(tmp_path: Path, xz: bool) -> None:
    files = made(tmp_path / "kit")
    pieces = packed(tmp_path / "kit", tmp_path / "out", 120_000)
    assert [piece.name for piece in pieces] == ["0", "1", "2"]
    assert all(len(list(piece.glob("kit.tar.xz.*"))) == 1 for piece in pieces)
    tools = tmp_path / "tools"
    tools.mkdir()
    # Python itself: what a PATH names may be a script (pyenv's) that needs other tools.
    python = Path(sys.executable).resolve()
    for name in TOOLS:
        tool = python if name == "python3" else shutil.which(name) or name
        (tools / name).symlink_to(tool)
    if xz:
        (tools / "xz").symlink_to(shutil.which("xz") or "xz")
    site = tmp_path / "there" / "site"
    for at, piece in enumerate(pieces):
        said = run("bash", KIT / "take.sh", piece, site, PATH=str(tools))
        assert ("waiting for" in said) == (at < 2)
    found = {name: (site / name).read_bytes() for name in files}
    assert found == files
    assert not site.with_name("site.pieces").exists()


def test_a_broken_piece_is_told_of(tmp_path: Path) -> None:
    made(tmp_path / "kit")
    pieces = packed(tmp_path / "kit", tmp_path / "out", 200_000)
    (broken,) = pieces[0].glob("kit.tar.xz.*")
    broken.write_bytes(broken.read_bytes()[:-1])
    run("bash", KIT / "take.sh", pieces[0], tmp_path / "site")
    with pytest.raises(subprocess.CalledProcessError):
        run("bash", KIT / "take.sh", pieces[1], tmp_path / "site")
    assert not list((tmp_path / "site").iterdir())


def test_fewer_pieces_leave_no_old_ones(tmp_path: Path) -> None:
    made(tmp_path / "kit")
    for piece, count in ((100_000, 4), (200_000, 2)):
        assert len(packed(tmp_path / "kit", tmp_path / "out", piece)) == count
