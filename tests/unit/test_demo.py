"""The demonstration, as far as it goes without an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers_on_disk import MODEL
from typer.testing import CliRunner

from vllm_propd.bench.timing.turn import Turn
from vllm_propd.bench.timing.turns import Turns
from vllm_propd.cli import app, show
from vllm_propd.demo import chat, run
from vllm_propd.demo.picture import draw_tree
from vllm_propd.demo.run import _result


def test_text_with_dollar_signs_is_no_formula(tmp_path: Path) -> None:
    tree: dict[str, Any] = {
        "root": 0, "token": [1], "parent": [0], "depth": [1], "accepted": [1],
        "verified": 1, "kept": [1], "bonus": 2,
    }  # fmt: skip
    formula = r"$\no$"
    draw_tree(tree, lambda token: formula, formula, tmp_path / "tree.png")
    assert (tmp_path / "tree.png").stat().st_size > 1000


@pytest.mark.parametrize("differs", [0, 1, 2])
def test_a_text_that_differs_in_one_turn_is_not_the_same(differs: int) -> None:
    turns: Turns[Turn] = Turns(plain="plain vLLM")
    for place in range(3):
        turns.add("plain vLLM", Turn(seconds=1.0, tokens=2, texts=[[1, 2], [3]]))
        other = [[1, 2], [4 if place == differs else 3]]
        turns.add("ProPD", Turn(seconds=1.0, tokens=2, texts=other))
    found = _result(["plain vLLM", "ProPD"], turns, MODEL)
    assert [row["identical_to_plain"] for row in found["arms"]] == [True, False]
    assert not found["identical"]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Which demonstrations have run; there is a chat model, and heads of it."""
    found: list[str] = []
    for path in (tmp_path / "chatty", tmp_path / "heads"):
        path.mkdir()
        (path / "config.json").write_text("{}")
    monkeypatch.setattr(show, "PUBLISHED", tmp_path / "chatty")
    monkeypatch.setattr(show, "HEADS", tmp_path / "heads")
    monkeypatch.setattr(run, "run_demo", lambda *args: found.append("small"))
    monkeypatch.setattr(chat, "run_chat_demo", lambda *args: found.append(args[1].name))
    return found


def test_the_small_model_is_only_for_those_who_asked_for_no_heads(
    ran: list[str], tmp_path: Path
) -> None:
    def exits(*options: str) -> int:
        return CliRunner().invoke(app, ["demo", *options]).exit_code

    assert exits() == exits("--heads", str(tmp_path / "own")) == 0
    (tmp_path / "chatty" / "config.json").unlink()
    assert exits() == 0 and exits("--heads", str(tmp_path / "own")) == 1
    assert ran == ["heads", "own", "small"]


def test_heads_that_are_not_there_are_refused_before_an_engine_starts(
    tmp_path: Path,
) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        chat.run_chat_demo(MODEL, tmp_path / "nowhere", tmp_path / "out", 4)
