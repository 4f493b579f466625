"""An entry of the ledger for what no signature tells."""

from __future__ import annotations

from dataclasses import dataclass

RELEASE = "https://github.com/vllm-project/vllm/blob/v0.32.0/"

OWN = "tests/integration/test_behaviours.py::"
"""Where the tests are that nothing else would need."""


@dataclass(frozen=True)
class Behaviour:
    """Something that vLLM does, and that we rely on.

    Attributes:
        path: ``module:qualified.name`` of the code that does it, where it is defined.
        what, why, retired_by: one line each.
        test: the test that fails when vLLM does it no longer: ``file::name``.
        package: the module is a package's own file.
    """

    path: str
    what: str
    why: str
    retired_by: str
    test: str
    package: bool = False

    @property
    def link(self) -> str:
        """The file in vLLM's repository, at the release that this is made for."""
        module = self.path.partition(":")[0].replace(".", "/")
        return f"{RELEASE}{module}{'/__init__' if self.package else ''}.py"
