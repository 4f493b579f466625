"""An entry of the ledger for a symbol of vLLM that ProPD touches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

EXACT = ("patched", "overridden")
"""Ways of touching a symbol for which all its parameters count, and their order."""


@dataclass(frozen=True)
class Symbol:
    """One symbol of vLLM that ProPD touches.

    Attributes:
        path: ``module:qualified.name``.
        use: how it is touched.
        parameters: its parameters (of a dataclass: its fields) that must exist, by name,
            with spaces between; for ``patched`` and ``overridden`` ones exactly these,
            in this order; for ``called`` ones no other may be required.
        what, why, retired_by: what we do with it, why, and what would let us stop; one
            line each.
        attributes: attributes of its instances that we use, with spaces between; of a
            decorator of classes, those that it gives to theirs.
    """

    path: str
    use: Literal["patched", "overridden", "replaced", "called", "read"]
    parameters: str
    what: str
    why: str
    retired_by: str
    attributes: str = ""
