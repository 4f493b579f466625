"""Writes Python's own library as data for ``vllm-propd train``: one JSON row a file.

    python scripts/library_text.py --out DIR    # DIR/train.jsonl, DIR/held_out.jsonl

Held-out files are never trained on, by the models of this repo or by their heads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from vllm_propd.corpus import library_files, read_text

SPLITS: tuple[Literal["train", "held_out"], ...] = ("train", "held_out")


def main(out: Annotated[Path, typer.Option(help="Folder to write.")]) -> None:
    """Write both splits."""
    out.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        with (out / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for path in library_files(split):
                file.write(json.dumps({"text": read_text(path)}) + "\n")


if __name__ == "__main__":
    typer.run(main)
