"""What heads are trained and measured on: what is refused, when, and in which words."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
from tokenizers_on_disk import MODEL, TEMPLATE, target_in, tokenizer
from transformers import Mamba2Config

from vllm_propd.engine import target_text
from vllm_propd.engine.target_text import Written, check_trainable
from vllm_propd.training import text
from vllm_propd.training.data.documents import DataError
from vllm_propd.training.settings import TrainSettings
from vllm_propd.training.text import (
    CONTINUATIONS,
    NEW_TOKENS,
    QUESTIONS,
    SPOKEN,
    Inputs,
    write_held_out,
    write_inputs,
)

SETTINGS = TrainSettings(length=32, num_heads=3, early_layers=())


class Writer:
    """Stands for the target: what it writes is as long as a test wants."""

    held_out = trained = 40
    asked: list[str]
    limits: list[int]

    def __init__(self, model: str, longest: int, seed: int = 0):
        self.longest = longest
        Writer.asked, Writer.limits = [], []

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def write(
        self, prompts: list[list[int]], description: str, *args: Any, **keys: Any
    ) -> list[Written]:
        Writer.asked.append(description)
        Writer.limits.append(self.longest)
        assert all(len(prompt) < self.longest for prompt in prompts)
        length = self.held_out if description == "held-out text" else self.trained
        found = [Written(i, [5] * length, True) for i in range(len(prompts))]
        for one in found:
            keys.get("on_text", lambda text: None)(one)
        return found


checked: list[str] = []
"""Targets whose output layer was to be checked: those here have no weights."""


@pytest.fixture(autouse=True)
def writer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_text, "TargetWriter", Writer)
    monkeypatch.setattr(text, "check_output_layer", checked.append)
    Writer.asked = []
    checked.clear()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return target_in(tmp_path / "model")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.txt"
    path.write_text("some words of a long text " * 200)
    return path


def test_the_target_answers_what_is_measured_before_what_is_learnt(
    model: Path, data: Path, tmp_path: Path
) -> None:
    write_inputs(Inputs(str(model), [data], self_distill=True), SETTINGS, tmp_path / "w")
    assert Writer.asked == ["held-out text", "training text"]
    spoken = json.loads((tmp_path / "w" / CONTINUATIONS).read_text())
    assert spoken.keys() == set(SPOKEN)


def test_what_is_learnt_fits_in_a_window(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is measured may be longer."""
    monkeypatch.setattr(Writer, "trained", 10)
    inputs = Inputs(str(model), [data], self_distill=True, own_share=0.5)
    write_inputs(inputs, SETTINGS, tmp_path / "w")
    longest = 24 + NEW_TOKENS
    assert dict(zip(Writer.asked, Writer.limits, strict=True)) == {
        "own questions": longest, "held-out text": longest, "training text": 32,
    }  # fmt: skip
    asked, held_out = json.loads((tmp_path / "w" / QUESTIONS).read_text())
    assert asked and all(len(prompt) <= 24 for prompt in asked + held_out)


def test_prompts_from_text_begin_as_in_serving(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "special_before", lambda tokenizer: [9])
    write_inputs(Inputs(str(model), [data], self_distill=True), SETTINGS, tmp_path / "w")
    asked, held_out = json.loads((tmp_path / "w" / QUESTIONS).read_text())
    assert asked and all(row[0] == 9 and row[1] != 9 for row in asked + held_out)


def test_questions_of_its_own_have_room_for_an_answer(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is learnt where a window ends before the answer."""
    monkeypatch.setattr(Writer, "trained", 30)
    work = tmp_path / "w"
    with pytest.raises(DataError, match=r"nothing of itself in 24 tokens.*larger --length"):
        write_inputs(Inputs(str(model), self_distill=True), SETTINGS, work)
    long = TEMPLATE.replace("{%", "Be brief. " * 30 + "{%", 1)
    tokenizer(long).save_pretrained(model)
    with pytest.raises(DataError, match=r"nothing of itself in 24 tokens.*larger --length"):
        write_inputs(Inputs(str(model), self_distill=True), SETTINGS, work)


@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("self_distill", [True, False])
def test_answers_too_short_to_measure_with_are_refused_before_training(
    model: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    length: int,
    self_distill: bool,
) -> None:
    """Three heads draft four tokens ahead of a place."""
    monkeypatch.setattr(Writer, "held_out", length)
    inputs = Inputs(str(model), [data], self_distill=self_distill)
    with pytest.raises(ValueError, match=r"ends its continuations at once.*--held-out"):
        write_inputs(inputs, SETTINGS, tmp_path / "work")
    assert Writer.asked == ["held-out text"]
    assert not (tmp_path / "work").exists()


class Failed(Exception):
    """What an engine ends with."""


def failing(place: str) -> type[Writer]:
    """A target that fails as it starts, before it writes or with half of it written."""

    class Failing(Writer):
        def __enter__(self) -> Writer:
            if place == "start":
                raise Failed
            return super().__enter__()

        def write(self, prompts: Any, description: str, *args: Any, **keys: Any) -> Any:
            if place == "write":
                raise Failed
            super().write(prompts[:2], description, *args, **keys)
            raise Failed

    return Failing


@pytest.mark.parametrize("place", ["start", "write"])
def test_a_failure_before_anything_is_written_leaves_nothing(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    work = tmp_path / "work"
    monkeypatch.setattr(target_text, "TargetWriter", failing(place))
    with pytest.raises(Failed):
        write_inputs(Inputs(str(model), [data], self_distill=True), SETTINGS, work)
    assert not work.exists()
    monkeypatch.setattr(target_text, "TargetWriter", Writer)
    write_inputs(Inputs(str(model), [data]), SETTINGS, work)


def test_a_model_that_is_not_there_leaves_nothing(data: Path, tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere")
    with pytest.raises(OSError, match=nowhere):
        write_inputs(Inputs(nowhere, [data]), SETTINGS, tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_what_the_target_has_written_outlives_a_failure(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, inputs = tmp_path / "work", Inputs(str(model), [data], self_distill=True)
    monkeypatch.setattr(target_text, "TargetWriter", failing("middle"))
    with pytest.raises(Failed):
        write_inputs(inputs, SETTINGS, work)
    assert len((work / "measured.jsonl").read_text().splitlines()) == 2
    others = Inputs(str(model), [data])
    message = r"work: the training began with other inputs \(self_distill .*remove it"
    with pytest.raises(ValueError, match=message):
        write_inputs(others, SETTINGS, work)
    monkeypatch.setattr(target_text, "TargetWriter", Writer)
    write_inputs(inputs, SETTINGS, work)
    assert (work / CONTINUATIONS).exists()


def test_too_little_to_measure_with_is_refused_before_training(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Writer, "held_out", 5)
    files = [tmp_path / "asked.jsonl", tmp_path / "kept.jsonl"]
    for file in files:
        file.write_text('{"question": "2 + 2?"}\n' * 2)
    inputs = Inputs(str(model), files[:1], files[1:], self_distill=True)
    settings = SETTINGS.model_copy(update={"length": 128})
    message = "tokens that the target wrote to measure with; .* give more --held-out, or"
    with pytest.raises(DataError, match=message):
        write_inputs(inputs, settings, tmp_path / "work")
    assert Writer.asked == ["held-out text"]


def test_too_little_of_its_own_is_no_matter_of_files(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Writer, "trained", 2)
    monkeypatch.setattr(Writer, "held_out", 3000)
    settings = SETTINGS.model_copy(update={"length": 1000})
    inputs = Inputs(str(model), self_distill=True, distill_tokens=200)
    message = "tokens that the target wrote; .* give more --distill-tokens, or a smaller"
    with pytest.raises(DataError, match=message):
        write_inputs(inputs, settings, tmp_path / "work")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"^--held-out .*kept\.jsonl: there is no such"),
        ('{"title": "x"}', r"^--held-out .*kept\.jsonl: a row has the fields title"),
        ('{"text": "short"}', "give more --held-out, or a smaller --length"),
        ('{"question": "%s"}' % ("2 + " * 90), "^--held-out: of 1 chats none asks"),
    ],
    ids=["absent", "other fields", "little text", "long questions"],
)
def test_calibrating_names_its_own_option(
    model: Path, tmp_path: Path, content: str | None, message: str
) -> None:
    kept = tmp_path / "kept.jsonl"
    if content is not None:
        kept.write_text(content + "\n")
    with pytest.raises(DataError, match=message):
        write_held_out(str(model), [kept], SETTINGS, tmp_path / "work")


def test_who_lets_the_target_ask_is_named(tmp_path: Path, data: Path) -> None:
    """A target without a chat template cannot ask."""
    mute, work = str(MODEL), tmp_path / "work"
    with pytest.raises(DataError, match=r"^no --held-out: .*where a question.*--held-out"):
        write_held_out(mute, [], SETTINGS, work)
    with pytest.raises(DataError, match=r"^--self-distill without --data: .*give --data"):
        write_inputs(Inputs(mute, self_distill=True), SETTINGS, work)
    inputs = Inputs(mute, [data], self_distill=True, own_share=0.5)
    with pytest.raises(DataError, match=r"^--own-share 0\.5: .*leave it out"):
        write_inputs(inputs, SETTINGS, work)


def test_only_early_heads_need_a_target_that_can_be_split(tmp_path: Path) -> None:
    mamba = Mamba2Config(architectures=["Mamba2ForCausalLM"], vocab_size=2048)
    mamba.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no pipeline-parallel support.*-layers ''$"):
        check_trainable(str(tmp_path), (1, 2))
    check_trainable(str(tmp_path), ())
    check_trainable(str(MODEL), (1, 2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"early_rank": 257}, r"^--early-rank 257: at most the hidden size, 256$"),
        ({"length": 2048}, r"^--length 2048: at most 1024, as .* 1024 positions"),
    ],
)
def test_what_the_model_cannot_have_is_refused_before_anything_is_written(
    model: Path, data: Path, tmp_path: Path, settings: dict[str, int], message: str
) -> None:
    inputs = Inputs(str(model), [data], self_distill=True)
    chosen = TrainSettings.model_validate({**SETTINGS.model_dump(), **settings})
    with pytest.raises(ValueError, match=message):
        write_inputs(inputs, chosen, tmp_path / "w")
    if "length" in settings:
        with pytest.raises(ValueError, match=message):
            write_held_out(str(model), [data], chosen, tmp_path / "w")
    assert not Writer.asked and not (tmp_path / "w").exists()


def test_a_target_is_checked_before_it_writes(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scales(model: str) -> None:
        raise ValueError("more than its output layer")

    write_inputs(Inputs(str(model), [data], self_distill=True), SETTINGS, tmp_path / "a")
    write_held_out(str(model), [data], SETTINGS, tmp_path / "b")
    assert checked == 2 * [str(model)]
    Writer.asked = []
    monkeypatch.setattr(text, "check_output_layer", scales)
    with pytest.raises(ValueError, match="more than its output layer"):
        write_inputs(
            Inputs(str(model), [data], self_distill=True), SETTINGS, tmp_path / "c"
        )
    with pytest.raises(ValueError, match="more than its output layer"):
        write_held_out(str(model), [data], SETTINGS, tmp_path / "d")
    assert not Writer.asked


def test_no_early_layers_can_be_asked_for() -> None:
    assert TrainSettings.model_validate({"early_layers": ""}).early_layers == ()
