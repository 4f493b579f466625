"""Prompts that people ask: chats and questions from files, by task."""

from __future__ import annotations

from itertools import chain, cycle, islice, zip_longest
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from vllm_propd.bench.results import BATCH
from vllm_propd.bench.settings import BenchSettings
from vllm_propd.bench.workloads.points import Point
from vllm_propd.chats import ChatError, chat_of, question_of, render
from vllm_propd.training.data.documents import DataError, files_of, rows_of

MT_BENCH = frozenset(
    [
        "writing",
        "roleplay",
        "reasoning",
        "math",
        "coding",
        "extraction",
        "stem",
        "humanities",
    ]
)
"""Categories that Spec-Bench counts as one task, multi-turn conversation."""

ByTask = dict[str, list[list[int]]]


def are_chats(files: list[Path]) -> bool:
    """Whether files hold rows, and the first row of them a chat; text is cut elsewhere.

    Raises:
        DataError: a file cannot be read.
    """
    found = files_of(files, "--prompts") if files else []
    if not found or any(builder == "text" for builder, _ in found):
        return False
    _, row = next(rows_of(found, "--prompts"), ("", {}))
    return chat_of(row) is not None


def task_of(row: dict[str, Any], file: str) -> str:
    """Returns the task that a row belongs to, by its own word or else its file's name."""
    task = row.get("category") or row.get("task") or row.get("task_id")
    if not isinstance(task, str) or not task:
        return Path(file).stem
    return "mt_bench" if task in MT_BENCH else task.partition("/")[0]


def chat_prompts(
    files: list[Path],
    tokenizer: PreTrainedTokenizerBase,
    settings: BenchSettings,
    others: int = 0,
) -> tuple[ByTask, int]:
    """Reads questions, rendered by the chat template.

    Args:
        files: JSON, JSON lines or Parquet.
        tokenizer: the target's.
        settings: how many of each task, and how long at most.
        others: how many more of each task there may be, for the warm-up.

    Returns:
        Token ids by task, the first ``prompts_each`` of each, and ``others``; and how many
        were left out because they are longer than ``longest_chat``.

    Raises:
        DataError: a row has no question, or none is short enough.
    """
    found: ByTask = {}
    too_long = 0
    for file, row in rows_of(files_of(files, "--prompts"), "--prompts"):
        chat = chat_of(row)
        if chat is None or not (question := question_of(chat)):
            fields = ", ".join(sorted(row))
            raise DataError(f"--prompts {file}: a row asks nothing; its fields: {fields}")
        of_task = found.setdefault(task_of(row, file), [])
        if len(of_task) >= settings.prompts_each + others:
            continue
        try:
            text = render(question, tokenizer, asks=True)
        except ChatError as error:
            raise DataError(f"--prompts {file}: {error}") from error
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) > settings.longest_chat:
            too_long += 1
        else:
            of_task.append(ids)
    found = {task: prompts for task, prompts in found.items() if prompts}
    if not found:
        raise DataError(
            f"--prompts: none of them has {settings.longest_chat} tokens or less"
        )
    return found, too_long


def chat_points(by_task: ByTask, settings: BenchSettings) -> list[Point]:
    """Returns a point for each batch size: batches of one task each, tasks in turn.

    Where a task has fewer prompts than a batch, they come again. What a task has beyond
    ``prompts_each`` is for the warm-up.
    """
    most, points = settings.prompts_each, []
    for size in settings.batch_sizes:
        turns = _turns({task: ids[:most] for task, ids in by_task.items()}, size)
        others = _turns({task: ids[most:] for task, ids in by_task.items()}, size)
        every = [ids for _, batch in turns for ids in batch]
        warm_up = tuple(batch for _, batch in others)
        tasks = tuple(task for task, _ in turns)
        points.append(Point(BATCH, size, every, tasks=tasks, warm_up=warm_up))
    return points


def _turns(by_task: ByTask, size: int) -> list[tuple[str, list[list[int]]]]:
    """Returns batches of so many prompts of a task, tasks in turn."""
    batches = []
    for task, prompts in by_task.items():
        again = cycle(prompts)
        count = -(-len(prompts) // size)
        batches.append([(task, list(islice(again, size))) for _ in range(count)])
    return [one for one in chain(*zip_longest(*batches)) if one is not None]
