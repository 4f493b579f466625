"""An entry of the ledger for what no signature tells."""

from __future__ import annotations

from dataclasses import dataclass

RELEASE = "https://github.com/vllm-project/vllm/blob/v0.32.0/"

OWN = "tests/integration/test_behaviours.py::"
"""The file of the tests that are there for the ledger alone."""


@dataclass(frozen=True)
class Behaviour:
    """Something that vLLM does, and that we rely on.

    Attributes:
        path: ``module:qualified.name`` of the code that does it, where it is defined.
        what, why, retired_by: what vLLM does, why we rely on it, and what would let us
            stop; one line each.
        test: the test that fails when vLLM does it no longer: ``file::name``.
        package: whether the module is a package's ``__init__.py``.
    """

    path: str
    what: str
    why: str
    retired_by: str
    test: str
    package: bool = False

    @property
    def link(self) -> str:
        """The address of the file in vLLM's repository, at the release we are made for."""
        module = self.path.partition(":")[0].replace(".", "/")
        return f"{RELEASE}{module}{'/__init__' if self.package else ''}.py"
