"""Writes the README's table of settings from the config class.

    python scripts/readme_table.py

A test checks that the README is what this script writes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from vllm_propd.config import ProPDConfig

README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- settings: scripts/readme_table.py -->\n", "<!-- end of settings -->\n"


def type_name(field: FieldInfo) -> str:
    """A field's type as a reader wants it."""
    kind = field.annotation
    if get_origin(kind) is Literal:
        return " or ".join(f"`{choice}`" for choice in get_args(kind))
    if kinds := [arg for arg in get_args(kind) if arg is not type(None)]:
        kind = kinds[0]
    return getattr(kind, "__name__", str(kind))


def table() -> str:
    """The settings as a Markdown table."""
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in ProPDConfig.model_fields.items():
        default = "" if field.default is None else f"`{field.default}`"
        if isinstance(field.default, bool):
            default = default.lower()
        rows.append(f"| `{name}` | {type_name(field)} | {default} | {field.description} |")
    rows.append(
        "| `config` | str | | A YAML file of these keys (see `configs/`); keys given "
        "beside it win. |"
    )
    return "\n".join(rows) + "\n"


def rewritten(readme: str) -> str:
    """The README's text with the table as it should be."""
    before, _, rest = readme.partition(START)
    _, _, after = rest.partition(END)
    return before + START + table() + END + after


if __name__ == "__main__":
    README.write_text(rewritten(README.read_text()))
