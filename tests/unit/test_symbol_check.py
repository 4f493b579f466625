"""The ledger's check against sources of another vLLM: small ones, written here."""

import re
import runpy
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from vllm_propd.engine.symbols.__main__ import counts
from vllm_propd.engine.symbols.behaviour import Behaviour
from vllm_propd.engine.symbols.check import difference, rewritten
from vllm_propd.engine.symbols.sources import Sources
from vllm_propd.engine.symbols.symbol import Symbol

FILES = {
    "__init__.py": "from .config import *\n",
    "_version.py": "__version__ = version = '9.1.0'\n",
    "config/__init__.py": "from vllm.config.engine import EngineConfig, Mode\n",
    "config/engine.py": """
import enum
from typing import TYPE_CHECKING, ClassVar
from dataclasses import dataclass, field
from pydantic import Field

class Mode(enum.Enum):
    FAST = 1

@dataclass
class Base:
    name: str
    known: ClassVar[int] = 0
    made: int = field(init=False)

@dataclass
class EngineConfig(Base):
    size: int = 3
    parts: list = field(default_factory=list)
    shape: str = Field(description="needed")

    @property
    def area(self): ...

    @classmethod
    def of(cls, text, *, strict=False): ...
""",
    "worker/runner.py": """
import torch
from typing import overload
from ..config import engine as _engine
from vllm.worker.base import Shared
from vllm.worker import base

LIMIT: int = 7
if torch.cuda:
    try:
        from vllm.worker.base import quick
    except ImportError:
        quick = None

def build(config, *names, deep, wide=1, **others): ...
@overload
def build(config: int): ...

class Runner(Shared, torch.nn.Module):
    twice = Shared.step
    forward_cuda = forward = lambda self: None

    def __init__(self, device, size=1):
        self.device, (self.rows, _) = device, (1, 2)
        super().__init__()

    def run(self, tokens, positions): ...
    again = run

def compiled(cls, sizes=()):
    def __init__(self):
        self.tag = cls.__name__
        self.code: object = None
    cls.__init__ = __init__
    return cls

class Inner(base.Deep[int]):
    class Options(_engine.EngineConfig): ...
""",
    "worker/base.py": """
class Root:
    def step(self, batch): ...
    def late(self): self.graph = None

class Shared(Root):
    kind: str

class Deep(Shared):
    def step(self, batch, mode): ...

def quick(): ...
""",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        file = tmp_path / "vllm" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path


def told(
    folder: Path, path: str, parameters: str = "", use: str = "called", attributes: str = ""
) -> str:
    """What is said of an entry; nothing, where it is as recorded."""
    symbol = Symbol(path, use, parameters, "what", "why", "never", attributes)  # type: ignore[arg-type]
    found = difference(Sources.at(folder), symbol)
    return "" if found is None else f"{found.status} {found.detail}".strip()


AS_RECORDED = [
    ("vllm.worker.runner:build", "config names deep wide others", "overridden"),
    ("vllm.worker.runner:build", "deep config", "called"),
    ("vllm.worker.runner:quick", "", "called"),
    ("vllm.worker.runner:LIMIT", "", "read"),
    ("vllm.worker.runner:Runner", "device size", "called"),
    ("vllm.worker.runner:Runner.step", "self batch", "overridden"),  # inherited
    ("vllm.worker.runner:Runner.twice", "self batch", "overridden"),
    ("vllm.worker.runner:Runner.again", "self tokens positions", "overridden"),
    ("vllm.worker.runner:Runner.forward_cuda", "", "read"),
    ("vllm.worker.runner:Runner.rows", "", "read"),
    ("vllm.worker.runner:Inner.step", "self batch mode", "overridden"),
    ("vllm.worker.runner:Inner.Options.of", "text strict", "overridden"),
    ("vllm.worker:runner.Runner.kind", "", "read"),
    ("vllm.config:EngineConfig", "name size parts shape", "patched"),
    ("vllm:EngineConfig.area", "", "read"),
    ("vllm.config:Mode.FAST", "", "read"),
]


@pytest.mark.parametrize(("path", "parameters", "use"), AS_RECORDED)
def test_as_recorded(folder: Path, path: str, parameters: str, use: str) -> None:
    assert told(folder, path, parameters, use) == ""


DIFFERENT = [
    (
        "vllm.worker.runner:Runner.run",
        "self tokens hidden",
        "overridden",
        "changed without hidden; new: positions",
    ),
    (
        "vllm.worker.runner:Runner.run",
        "self positions tokens",
        "overridden",
        "changed in another order: self positions tokens -> self tokens positions",
    ),
    ("vllm.worker.runner:Runner.run", "self tokens", "read", ""),
    ("vllm.worker.runner:Runner.run", "self tokens", "called", "changed new: positions"),
    ("vllm.worker.runner:build", "config", "called", "changed new: deep"),
    ("vllm.config:EngineConfig", "name shape made", "called", "changed without made"),
    ("vllm.config:EngineConfig", "name", "called", "changed new: shape"),
    ("vllm.worker.runner:LIMIT", "self", "read", "changed without self"),
    ("vllm.runner:build", "", "called", "moved vllm.worker.runner:build"),
    ("vllm.old:EngineConfig.of", "", "called", "moved vllm.config.engine:EngineConfig.of"),
    ("vllm.worker.runner:Root.step", "", "called", "moved vllm.worker.base:Root.step"),
    ("vllm.old:LIMIT", "", "read", "moved vllm.worker.runner:LIMIT"),
    ("vllm.worker.runner:Runner.walk", "", "called", "gone"),
    ("vllm.config:Mode.SLOW", "", "read", "gone"),
    ("vllm.old:nothing", "", "called", "gone"),
]


@pytest.mark.parametrize(("path", "parameters", "use", "expected"), DIFFERENT)
def test_different(
    folder: Path, path: str, parameters: str, use: str, expected: str
) -> None:
    assert told(folder, path, parameters, use) == expected


def test_attributes_are_those_of_instances(folder: Path) -> None:
    runner = "vllm.worker.runner:Runner"
    known = "device rows kind graph twice"
    assert told(folder, runner, "device", "read", known) == ""
    lost = told(folder, runner, "device", "read", f"{known} batch _")
    assert lost == "changed instances without _ batch"


def test_attributes_of_a_decorator_are_those_that_it_gives(folder: Path) -> None:
    decorator = "vllm.worker.runner:compiled"
    assert told(folder, decorator, "cls sizes", "replaced", "tag code") == ""
    lost = told(folder, decorator, "cls sizes", "replaced", "tag program")
    assert lost == "changed instances without program"


def test_a_behaviour_is_where_it_was(folder: Path) -> None:
    sources = Sources.at(folder)
    kept, gone = (
        Behaviour(f"vllm.worker.base:{name}", "", "", "", "") for name in ("quick", "slow")
    )
    assert difference(sources, kept) is None
    found = difference(sources, gone)
    assert found is not None
    assert found.status == "gone"
    assert kept.link.endswith("/blob/v0.32.0/vllm/worker/base.py")


def test_wheels_sdists_and_folders_are_alike(folder: Path, tmp_path: Path) -> None:
    wheel, sdist = tmp_path / "a.whl", tmp_path / "a.tar.gz"
    with zipfile.ZipFile(wheel, "w") as zipped, tarfile.open(sdist, "w:gz") as packed:
        for file in folder.rglob("*.py"):
            zipped.write(file, file.relative_to(folder))
            packed.add(file, Path("vllm-9.1.0") / file.relative_to(folder))
    found = [Sources.at(path) for path in (folder, folder / "vllm", wheel, sdist)]
    assert all(one.version == "9.1.0" for one in found)
    assert all(one.texts == found[0].texts for one in found)
    assert set(found[0].texts) == {
        "vllm", "vllm._version", "vllm.config", "vllm.config.engine",
        "vllm.worker.runner", "vllm.worker.base",
    }  # fmt: skip


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """``python -m vllm_propd.engine.symbols``, which must not import what is heavy."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['symbols', *{arguments!r}]\n"
        "try: runpy.run_module('vllm_propd.engine.symbols', run_name='__main__')\n"
        "finally:\n"
        "    heavy = {'vllm', 'torch', 'numba', 'transformers'} & {*sys.modules}\n"
        "    assert not heavy, heavy\n"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_the_command_says_what_differs_and_fails(folder: Path) -> None:
    found = command(str(folder), "--markdown")
    assert found.returncode == 1, found.stderr
    assert "## vLLM 9.1.0" in found.stdout
    assert "| gone | `vllm.v1.sample.sampler:Sampler.forward` | called |" in found.stdout


def test_a_folder_without_vllm_is_one_error(tmp_path: Path) -> None:
    found = command(str(tmp_path))
    assert found.returncode == 2
    # In a box whose lines end where the terminal, or what pytest-xdist says of one, does.
    text = " ".join(found.stderr.replace("│", " ").split())
    assert "has no package 'vllm'" in text


def test_behaviours_whose_code_has_changed_are_named(folder: Path) -> None:
    old = Sources.at(folder)
    base = folder / "vllm" / "worker" / "base.py"
    text = base.read_text()
    base.write_text("# Elsewhere, and said otherwise.\n\n" + text.replace("...", "...  #"))
    behaviours = [
        Behaviour(f"vllm.worker.base:{name}", "", "", "", "")
        for name in ("quick", "Root.late", "Deep.step", "gone")
    ]
    assert rewritten(old, Sources.at(folder), behaviours) == []
    base.write_text(text.replace("graph = None", "graph = 1"))
    assert rewritten(old, Sources.at(folder), behaviours) == [behaviours[1]]


ROOT = Path(__file__).parents[2]


def test_other_releases_were_compared_with_the_whole_ledger() -> None:
    page = (ROOT / "docs" / "vllm_versions.md").read_text()
    compared = dict(re.findall(r"^\| ([a-z ]+) \| (\d+) \|", page, re.M))
    ledger = {name: number for name, number, *_ in counts([])[1:]}
    assert compared == ledger, "run the command on that page again"


def test_the_ledgers_page_is_up_to_date() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "ledger_page.py"))
    assert script["PAGE"].read_text() == script["page"](), "run scripts/ledger_page.py"
