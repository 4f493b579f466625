"""Prompts of chats for the benchmark: tasks, lengths, and the turns of batches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers_on_disk import ids_of, tokenizer

from vllm_propd.bench.settings import BenchSettings
from vllm_propd.bench.workloads.chats import are_chats, chat_points, chat_prompts, task_of
from vllm_propd.chats import ChatError, opening
from vllm_propd.training.data.documents import DataError


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def asked(text: str) -> list[int]:
    return ids_of(f"<user>{text}<assistant>")[:-1]


def test_rows_of_chats_are_told_from_text(tmp_path: Path) -> None:
    chats = write(tmp_path / "a.jsonl", {"question": "1 + 1?"})
    rows = write(tmp_path / "b.jsonl", {"text": "no chat"})
    (tmp_path / "c.txt").write_text("some text")
    assert are_chats([chats]) and not are_chats([rows]) and not are_chats([])
    assert not are_chats([tmp_path / "c.txt"])


@pytest.mark.parametrize(
    ("row", "task"),
    [
        ({"category": "rag"}, "rag"),
        ({"category": "stem"}, "mt_bench"),
        ({"task_id": "HumanEval/17"}, "HumanEval"),
        ({"question": "?"}, "file"),
    ],
)
def test_tasks_have_their_rows_own_names(row: dict[str, str], task: str) -> None:
    assert task_of(row, "some/file.jsonl") == task


def test_the_first_prompts_of_each_task_that_are_short_enough(tmp_path: Path) -> None:
    rows = [{"category": c, "turns": [f"{c}{i}?", "Sure?"]} for i in range(5) for c in "ab"]
    long = {"category": "a", "turns": ["word " * 200]}
    path = write(tmp_path / "a.jsonl", long, *rows)
    settings = BenchSettings(prompts_each=3, longest_chat=100)
    found, too_long = chat_prompts([path], tokenizer(), settings)
    assert too_long == 1
    assert found == {c: [asked(f"{c}{i}?") for i in range(3)] for c in "ab"}
    with pytest.raises(DataError, match="none of them has 2 tokens or less"):
        chat_prompts([path], tokenizer(), BenchSettings(longest_chat=2))


def test_rows_that_ask_nothing_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"question": "?"}, {"answer": "b"})
    with pytest.raises(DataError, match=r"--prompts .*asks nothing; its fields: answer"):
        chat_prompts([path], tokenizer(), BenchSettings())
    with pytest.raises(DataError, match="no chat template"):
        chat_prompts([path], tokenizer(None), BenchSettings())


def test_batches_are_of_one_task_and_tasks_take_turns() -> None:
    by_task = {"a": [[1], [2], [3]], "b": [[4]]}
    one, two = chat_points(by_task, BenchSettings(batch_sizes=(1, 2)))
    assert one.tasks == ("a", "b", "a", "a") and one.prompts == [[1], [4], [2], [3]]
    # Too few for a batch: they come again.
    assert two.tasks == ("a", "b", "a")
    assert two.groups == [[[1], [2]], [[4], [4]], [[3], [1]]]
    part, groups = two.of_task("a")
    assert (part.workload, groups) == ("task a", [0, 2])
    assert part.prompts == [[1], [2], [3], [1]]


def test_others_than_those_measured_warm_up(tmp_path: Path) -> None:
    rows = [
        {"question": f"{task} {i}", "category": task} for task in "ab" for i in range(4)
    ]
    path = write(tmp_path / "a.jsonl", *rows)
    settings = BenchSettings(batch_sizes=(1, 2), prompts_each=2)
    measured, _ = chat_prompts([path], tokenizer(), settings)
    assert [len(prompts) for prompts in measured.values()] == [2, 2]
    by_task, _ = chat_prompts([path], tokenizer(), settings, others=2)
    for point in chat_points(by_task, settings):
        assert (
            point.prompts
            == chat_points(measured, settings)[
                settings.batch_sizes.index(point.batch_size)
            ].prompts
        )
        warm_up = [ids for group in point.warm_up for ids in group]
        assert len(warm_up) == 4
        assert not any(ids in point.prompts for ids in warm_up)
        assert point.of_task("a")[0].warm_up == ()


def test_a_chat_opens_where_the_user_speaks() -> None:
    assert opening(tokenizer()) == "<user>"
    with pytest.raises(ChatError, match="no chat template"):
        opening(tokenizer(None))
