"""Two engines answer the same questions, side by side: plain vLLM and ProPD.

They take turns of a fraction of a second, each on all cores, and each has a clock of its
own, which goes as long as its processes do: what is shown is how far either would be after
the same time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text
from vllm import SamplingParams

from vllm_propd.bench.engines import ArmEngine

SLICE_S = 0.5
"""Seconds that an engine runs before it is the other's turn."""

SHOWN_LINES = 12
"""The last lines of an answer that are shown."""


@dataclass
class Answer:
    """What an engine has answered so far.

    Attributes:
        ids: token ids.
        seconds: of this engine's own time.
        steps: decode steps, the one that read the question left out.
        ended: whether the answer is whole.
    """

    ids: list[int] = field(default_factory=list)
    seconds: float = 0.0
    steps: int = 0
    ended: bool = False

    @property
    def tokens_per_s(self) -> float:
        """New tokens per second."""
        return len(self.ids) / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_step(self) -> float:
        """New tokens per decode step; the first token comes with the question."""
        return (len(self.ids) - 1) / self.steps if self.steps else 0.0


def race(
    engines: list[ArmEngine],
    questions: list[tuple[str, list[int]]],
    tokenizer: Any,
    params: SamplingParams,
    console: Console,
) -> list[list[Answer]]:
    """Lets all engines answer all questions, one after the other.

    Args:
        engines: the arms' engines.
        questions: what is shown of each, and its token ids.
        tokenizer: turns answers into text.
        params: of every request.
        console: where answers stream to.

    Returns:
        ``[questions][engines]`` answers.
    """
    found: list[list[Answer]] = []
    bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    task = bar.add_task("questions", total=len(questions))
    with Live(console=console, refresh_per_second=8) as live:
        for text, ids in questions:
            answers = [Answer() for _ in engines]
            for number, (engine, answer) in enumerate(zip(engines, answers, strict=True)):
                with _clocked(engine, answer):
                    engine.begin(f"race-{len(found)}-{number}", ids, params)
            while not all(answer.ended for answer in answers):
                for engine, answer in zip(engines, answers, strict=True):
                    _run_slice(engine, answer)
                    live.update(Group(_columns(text, engines, answers, tokenizer), bar))
            found.append(answers)
            bar.advance(task)
    return found


@contextmanager
def _clocked(engine: ArmEngine, answer: Answer) -> Iterator[None]:
    """Adds the time in which an engine's processes run, whoever waits for them."""
    began = time.perf_counter()
    engine.take_over()
    yield
    engine.engine.rest()
    answer.seconds += time.perf_counter() - began


def _run_slice(engine: ArmEngine, answer: Answer) -> None:
    if answer.ended:
        return
    llm = engine.engine.llm.llm_engine
    with _clocked(engine, answer):
        began = time.perf_counter()
        while not answer.ended and time.perf_counter() - began < SLICE_S:
            for output in llm.step():
                ids = list(output.outputs[0].token_ids)
                answer.steps += bool(answer.ids) and len(ids) > len(answer.ids)
                answer.ids, answer.ended = ids, output.finished


def _columns(
    question: str, engines: list[ArmEngine], answers: list[Answer], tokenizer: Any
) -> Table:
    table = Table.grid(expand=True)
    panels = []
    for engine, answer in zip(engines, answers, strict=True):
        table.add_column(ratio=1)
        lines = tokenizer.decode(answer.ids, skip_special_tokens=True).splitlines()
        title = f"{engine.arm.name}: {answer.tokens_per_s:.0f} tokens/s"
        if answer.steps:
            title += f", {answer.tokens_per_step:.2f} tokens per step"
        style = "green" if answer.ended else "yellow"
        body = Text("\n".join(lines[-SHOWN_LINES:]))
        panels.append(Panel(body, title=title, subtitle=question, border_style=style))
    table.add_row(*panels)
    return table
