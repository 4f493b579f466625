"""Prompts that the model has positions for, with their answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console
from tokenizers_on_disk import tokenizer

from vllm_propd.bench.run import _of_chats
from vllm_propd.bench.settings import BenchSettings
from vllm_propd.bench.setup import engine_options

POSITIONS = 100


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A target of so many positions, as far as it is read before an engine starts."""
    tokenizer().save_pretrained(tmp_path / "target")
    config = {"max_position_embeddings": POSITIONS}
    (tmp_path / "target" / "config.json").write_text(json.dumps(config))
    return tmp_path / "target"


def settings(prompt_tokens: int, **fields: object) -> BenchSettings:
    given = {"batch_sizes": (1,), "max_tokens": 30, "prompt_tokens": prompt_tokens}
    return BenchSettings(**{**given, **fields})  # type: ignore[arg-type]


def test_prompts_and_answers_that_find_positions_are_measured(model: Path) -> None:
    assert engine_options(model, settings(70), 4)["max_model_len"] == POSITIONS
    (model / "config.json").write_text("{}")
    assert engine_options(model, settings(70), 4)["max_model_len"] > POSITIONS


@pytest.mark.parametrize(
    "fields",
    [{"prompt_tokens": 71}, {"workload": True, "prompt_tokens": 8, "lengths": (8, 71)}],
)
def test_prompts_without_positions_for_their_answers_are_refused(
    model: Path, fields: dict[str, int]
) -> None:
    message = "prompts of 71 tokens and --max-tokens 30: the model has 100 positions"
    with pytest.raises(ValueError, match=message):
        engine_options(model, settings(**fields), 4)


def test_chats_without_positions_for_their_answers_are_left_out(
    model: Path, tmp_path: Path
) -> None:
    """The longest just below the limit, too: its answer would be cut."""

    def asked(words: int) -> str:
        return "word " * words

    def tokens(text: str) -> int:
        return len(tokenizer()(f"<user>{text}<assistant>")["input_ids"])

    fits = max(words for words in range(90) if tokens(asked(words)) <= 70)
    texts = [asked(fits), asked(fits + 1), asked(200)]
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps({"question": text}) + "\n" for text in texts))
    console = Console(record=True, width=200)
    points, found = _of_chats(model, [path], settings(8), console)
    (prompt,) = points[0].prompts
    assert len(prompt) == found.prompt_tokens == tokens(texts[0]) <= 70 < tokens(texts[1])
    assert "2 prompts of over 70 tokens left out" in console.export_text()
    assert engine_options(model, found, 4)["max_model_len"] == POSITIONS
