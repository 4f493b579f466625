"""Texts against plain vLLM's: equal, or parting where plain vLLM was not sure."""

from __future__ import annotations

import json
from typing import Any

from gpu_first_run.setting import Notes, Setting

TIE = 0.05
"""Between plain vLLM's two best log probabilities: nearer ones may fall either way."""


def keep_plain(
    setting: Setting, tokens: list[list[int]], margin: list[list[float]]
) -> None:
    """Leaves plain vLLM's tokens to other items, also of later runs."""
    left = {"of": _made_by(setting), "tokens": tokens, "margins": margin}
    (setting.folder / "plain.json").write_text(json.dumps(left))


def _made_by(setting: Setting) -> list[str]:
    return [str(setting.model), setting.device, str(setting.options(False)["dtype"])]


def _plain(setting: Setting) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads((setting.folder / "plain.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return found if found["of"] == _made_by(setting) else None


def compared(setting: Setting, ours: list[list[int]]) -> dict[str, Any] | None:
    """Tokens against those that the item ``plain eager`` has left, if it has left any."""
    plain = _plain(setting)
    if plain is None:
        return None
    equal, ties, tokens_equal, wrong = 0, 0, 0, []
    for number, tokens in enumerate(ours):
        wanted, margin = plain["tokens"][number], plain["margins"][number]
        pairs = enumerate(zip(wanted, tokens, strict=True))
        at = next((i for i, (a, b) in pairs if a != b), None)
        tokens_equal += len(tokens) if at is None else at
        if at is None:
            equal += 1
        elif margin[at] < TIE:
            ties += 1
        else:
            wrong.append({"prompt": number, "at": at, "margin": round(margin[at], 3)})
    return {
        "prompts": len(ours), "equal": equal, "part_at_ties": ties, "wrong": wrong,
        "tokens": sum(map(len, ours)), "tokens_equal": tokens_equal,
    }  # fmt: skip


def check_texts(setting: Setting, notes: Notes, name: str, ours: list[list[int]]) -> bool:
    """Notes how many texts are plain vLLM's, and how many tokens before the first others.

    Returns:
        Whether none is wrong; true where there is nothing to compare with.
    """
    found = compared(setting, ours)
    if found is None:
        notes[name] = "nothing to compare with: run plain eager"
        return True
    text = f"{found['equal']} of {found['prompts']} equal"
    if found["part_at_ties"]:
        text += f", {found['part_at_ties']} part at ties"
    if found["wrong"]:
        text += f", {len(found['wrong'])} WRONG"
    if found["tokens_equal"] < found["tokens"]:
        text += f"; {found['tokens_equal']} of {found['tokens']} tokens before they part"
    notes[name] = text
    if found["wrong"]:
        notes[f"{name}, wrong"] = found["wrong"]
    return not found["wrong"]
