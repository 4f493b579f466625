"""The command ``vllm-propd`` as it is installed: first what it needs, then ``cli``.

A serving process imports none of it, so it comes with an extra of its own.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

EXTRA = "tools"


def missing() -> list[str]:
    """Returns the distributions of extra ``tools`` that are not installed."""
    found = []
    for line in requires("vllm-propd") or []:
        requirement = Requirement(line)
        if requirement.marker and requirement.marker.evaluate({"extra": EXTRA}):
            try:
                version(requirement.name)
            except PackageNotFoundError:
                found.append(requirement.name)
    return found


def main() -> None:
    """Runs the command ``vllm-propd``.

    Raises:
        SystemExit: the extra is not installed, or the command has ended.
    """
    if names := missing():
        raise SystemExit(
            f"vllm-propd: not installed: {', '.join(names)}. The command line needs them, "
            f'serving does not: pip install "vllm-propd[{EXTRA}]"'
        )
    from vllm_propd.cli import app

    app()
