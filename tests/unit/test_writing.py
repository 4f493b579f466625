"""Answers on disk: what a killed run has written stays, whenever it is killed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllm_propd.engine.target_text import Written
from vllm_propd.resume import write_whole
from vllm_propd.training.data.writing import answers


class Killed(Exception):
    """Ends a run where a test wants it to end."""


class Writer:
    """Answers each prompt with itself, twice; may be killed."""

    def __init__(self, dies_after: int | None = None):
        self.dies_after, self.asked = dies_after, 0

    def write(
        self,
        prompts: list[list[int]],
        *args: Any,
        on_text: Callable[[Written], None],
        **keys: Any,
    ) -> None:
        for place, prompt in enumerate(prompts):
            if self.asked == self.dies_after:
                raise Killed
            self.asked += 1
            on_text(Written(place, prompt * 2, True))


PROMPTS = [[place, place + 1] for place in range(20)]


def test_what_was_answered_is_not_asked_again(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    for dies_after, asked in ((7, 7), (5, 5), (0, 0), (None, 8)):
        writer = Writer(dies_after)
        if dies_after is None:
            found = answers(writer, PROMPTS, file, "")  # type: ignore[arg-type]
        else:
            with pytest.raises(Killed):
                answers(writer, PROMPTS, file, "")  # type: ignore[arg-type]
        assert writer.asked == asked
    assert found == (PROMPTS, [prompt * 2 for prompt in PROMPTS])


def test_a_line_that_was_cut_off_is_written_anew(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("[3, [1, 2]]\n[4, [1, 2")
    writer = Writer()
    _, texts = answers(writer, PROMPTS[:6], file, "")  # type: ignore[arg-type]
    assert writer.asked == 5
    assert texts[3] == [1, 2] and texts[4] == PROMPTS[4] * 2
    assert answers(Writer(0), PROMPTS[:6], file, "")[1] == texts  # type: ignore[arg-type]


def test_a_kill_while_the_file_is_made_anew_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.jsonl"
    answers(Writer(), PROMPTS, file, "")  # type: ignore[arg-type]
    before = file.read_text()

    def killed(path: Path, target: Path) -> None:
        raise Killed

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(Killed):
        answers(Writer(), PROMPTS, file, "")  # type: ignore[arg-type]
    with pytest.raises(Killed):
        write_whole(file, "")
    assert file.read_text() == before
