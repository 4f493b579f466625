"""The text of vLLM's modules: from a folder, a wheel or an sdist."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

PACKAGE = "vllm"


def read(path: Path) -> dict[str, str]:
    """Returns each module's text by its path from ``vllm/`` on; empty: there is no vLLM."""
    if path.is_dir():
        return _of_folder(path)
    if zipfile.is_zipfile(path):
        return _of_wheel(path)
    if path.is_file() and tarfile.is_tarfile(path):
        return _of_sdist(path)
    return {}


def _of_folder(path: Path) -> dict[str, str]:
    package = path / PACKAGE if (path / PACKAGE).is_dir() else path.resolve()
    if package.name != PACKAGE:
        return {}
    return {
        f"{PACKAGE}/{file.relative_to(package).as_posix()}": file.read_text("utf-8")
        for file in package.rglob("*.py")
    }


def _of_wheel(path: Path) -> dict[str, str]:
    with zipfile.ZipFile(path) as wheel:
        return {
            name: wheel.read(name).decode()
            for name in wheel.namelist()
            if name.startswith(f"{PACKAGE}/") and name.endswith(".py")
        }


def _of_sdist(path: Path) -> dict[str, str]:
    files = {}
    with tarfile.open(path) as sdist:
        for member in sdist:
            _, _, name = member.name.partition("/")
            if name.startswith(f"{PACKAGE}/") and name.endswith(".py"):
                opened = sdist.extractfile(member)
                if opened is not None:
                    files[name] = opened.read().decode()
    return files
