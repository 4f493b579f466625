"""One entry of the ledger."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Symbol:
    """One touched symbol.

    Attributes:
        path: ``module:qualified.name``.
        use: how it is touched.
        parameters: its parameters (of a dataclass: its fields) that must exist, by name,
            with spaces between; for ``patched`` and ``overridden`` ones exactly these,
            in this order.
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
