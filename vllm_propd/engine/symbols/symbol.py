"""One entry of the ledger."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

EXACT = ("patched", "overridden")
"""Ways of touching a symbol for which all its parameters count, and their order."""


@dataclass(frozen=True)
class Symbol:
    """One touched symbol.

    Attributes:
        path: ``module:qualified.name``.
        use: how it is touched.
        parameters: its parameters (of a dataclass: its fields) that must exist, by name,
            with spaces between; for ``patched`` and ``overridden`` ones exactly these,
            in this order; for ``called`` ones no other may be required.
        what, why, retired_by: one line each.
        attributes: those of its instances that we use, likewise.
    """

    path: str
    use: Literal["patched", "overridden", "replaced", "called", "read"]
    parameters: str
    what: str
    why: str
    retired_by: str
    attributes: str = ""
