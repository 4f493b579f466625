"""An item's own process, as it ends: what it was doing is said, and it cleans up."""

from __future__ import annotations

import faulthandler
import signal
import sys
from typing import Any

LIMIT = "PROPD_FIRST_RUN_LIMIT"
"""Of the environment: an item's seconds."""

BEFORE_S = 3.0
"""Of the time-out, that where all threads are is said: from outside nobody could tell."""


def ends_in_order(limit: float) -> None:
    """Says where a process hangs; being asked to end, it runs what is in ``finally``.

    Args:
        limit: seconds that it has from now on.
    """

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)
    faulthandler.enable()
    later = max(limit - BEFORE_S, limit / 2)
    faulthandler.dump_traceback_later(later, file=sys.stderr)
