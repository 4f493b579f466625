"""Writes docs/ledger.md, what ProPD relies on in vLLM, from the ledger.

    python scripts/ledger_page.py

A test checks that the page is what this script writes.
"""

from __future__ import annotations

from pathlib import Path

from vllm_propd.engine.symbols import BEHAVIOURS
from vllm_propd.engine.symbols.__main__ import as_markdown
from vllm_propd.engine.symbols.behaviour import Behaviour

PAGE = Path(__file__).parents[1] / "docs" / "ledger.md"

HEAD = """# What ProPD relies on in vLLM

Symbols that ProPD calls, reads, overrides or patches stand in `vllm_propd/engine/symbols/`,
with their parameters; tests compare them with the installed vLLM. This page is the rest:
what vLLM 0.32 *does*, which no signature tells. Each line names the test (in `tests/`) that
fails when it ends. Links lead to the file that does it.

`python -m vllm_propd.engine.symbols WHEEL_OR_FOLDER` compares symbols and places with
another release's sources, and with `--since` lists those of these whose code has changed:
`docs/vllm_versions.md`.

<!-- Written by scripts/ledger_page.py. -->

"""


def row(one: Behaviour) -> list[str]:
    """A behaviour's line."""
    place = f"[`{one.path.rpartition(':')[2]}`]({one.link})"
    test = one.test.removeprefix("tests/")
    return [place, one.what, one.why, one.retired_by, f"`{test}`"]


def page() -> str:
    """The whole page."""
    head = ["vLLM's", "does", "what rests on it", "retired by", "test"]
    return HEAD + as_markdown([head, *map(row, BEHAVIOURS)])


if __name__ == "__main__":
    PAGE.write_text(page())
