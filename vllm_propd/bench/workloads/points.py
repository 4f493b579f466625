"""What is measured: points of the paper's axes, each with its prompts.

Batch size always; with ``--workload`` also sequence length, task, and a trace of requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import islice
from random import Random

import numpy as np

from vllm_propd.bench.results import BATCH, TASK, TRACE, point_name
from vllm_propd.bench.settings import PASSES, BenchSettings
from vllm_propd.bench.workloads.tasks import TASKS, task_texts
from vllm_propd.corpus import library_files, pieces

FEWEST_PROMPTS = PASSES
"""The fewest prompts of a point.

One text says little about acceptance, and many leave few turns with each. There are as many
as passes: with one sequence at a time, too, each pass has a turn of every arm."""

WARM_UP_GROUPS = 2
"""So many groups of prompts are kept for the warm-up."""

CHARS_PER_TOKEN = 8
"""More characters per token than text has: a piece cut by it has tokens enough."""

Tokenize = Callable[[str], list[int]]


@dataclass(frozen=True)
class Point:
    """One point of a benchmark: prompts that every arm generates from.

    Attributes:
        workload: the workload's name, as in ``Row``.
        batch_size: sequences generated together; of a trace, the most at a time.
        prompts: token ids.
        arrivals: of a trace, when each prompt arrives, seconds from its start.
        rate: of a trace, mean requests per second.
        tasks: the task of each group; none: there is one only.
        warm_up: groups that are not measured, for arms to settle with: what drafts from
            others' texts, or from what the target said, would know measured ones.
    """

    workload: str
    batch_size: int
    prompts: list[list[int]]
    arrivals: tuple[float, ...] | None = None
    rate: float | None = None
    tasks: tuple[str, ...] = ()
    warm_up: tuple[list[list[int]], ...] = ()

    @property
    def name(self) -> str:
        """The point's readable name, like ``batch 4`` or ``task prose``."""
        return point_name(self.workload, self.batch_size)

    @property
    def groups(self) -> list[list[list[int]]]:
        """The prompts of each turn; turns are short, so that arms are compared often."""
        size = self.batch_size
        return [self.prompts[i : i + size] for i in range(0, len(self.prompts), size)]

    def of_task(self, task: str) -> tuple[Point, list[int]]:
        """Returns the part of this point that is one task, and which groups that is."""
        groups = [i for i, one in enumerate(self.tasks) if one == task]
        prompts = [ids for i in groups for ids in self.groups[i]]
        part = replace(
            self, workload=f"{TASK}{task}", prompts=prompts, tasks=(), warm_up=()
        )
        return part, groups

    def at(self, rate: float) -> Point:
        """Returns this trace of one request per second, sped up to ``rate`` per second."""
        arrivals = tuple(second / rate for second in self.arrivals or ())
        return replace(self, arrivals=arrivals, rate=rate)


def batch_points(
    tokenize: Tokenize, texts: list[str], settings: BenchSettings
) -> list[Point]:
    """Returns the points of workload ``batch``: one for each batch size.

    Args:
        tokenize: the target's tokenizer.
        texts: what to cut prompts from; none: held-out files of Python's library.
        settings: which batch sizes, how long the prompts.

    Raises:
        ValueError: there is too little text.
    """
    sizes = [_whole_batches(size) for size in settings.batch_sizes]
    if settings.in_turn:
        sizes = [size * settings.most_chunks for size in settings.batch_sizes]
    length = settings.prompt_tokens
    most, others = max(sizes), WARM_UP_GROUPS * max(settings.batch_sizes)
    prompts = cut_prompts(tokenize, texts, most, length, settings.seed, others)
    return [
        Point(
            BATCH, batch_size, prompts[:size], warm_up=_groups(prompts[most:], batch_size)
        )
        for batch_size, size in zip(settings.batch_sizes, sizes, strict=True)
    ]


def _groups(prompts: list[list[int]], size: int) -> tuple[list[list[int]], ...]:
    """Cuts prompts into groups; of what is too little for one it makes none."""
    return tuple(prompts[i : i + size] for i in range(0, len(prompts) - size + 1, size))


def workload_points(
    tokenize: Tokenize, texts: list[str], settings: BenchSettings
) -> list[Point]:
    """Returns the points of prompt length and task, and last the trace.

    Lengths and tasks have the middle batch size; the trace's requests arrive at one per
    second. Arguments and errors are those of ``batch_points``.
    """
    batch_size = sorted(settings.batch_sizes)[len(settings.batch_sizes) // 2]
    size, others = _whole_batches(batch_size), WARM_UP_GROUPS * batch_size
    requests = settings.trace_requests or 2 * max(settings.batch_sizes)
    longest = settings.longest_prompt
    found = []
    by_length = cut_prompts(
        tokenize, texts, size, max(settings.lengths), settings.seed, others
    )
    for length in settings.lengths:
        prompts = [ids[:length] for ids in by_length]
        warm_up = _groups(prompts[size:], batch_size)
        name = f"length {length}"
        found.append(Point(name, batch_size, prompts[:size], warm_up=warm_up))
    left: list[list[list[int]]] = []
    for task in TASKS:
        found_here = task_texts(task, CHARS_PER_TOKEN * longest, settings.seed)
        count = size + others + -(-requests // len(TASKS))
        of_task = _first(tokenize, found_here, count, longest)
        prompts = [ids[: settings.prompt_tokens] for ids in of_task[: size + others]]
        warm_up = _groups(prompts[size:], batch_size)
        name = f"{TASK}{task}"
        found.append(Point(name, batch_size, prompts[:size], warm_up=warm_up))
        left.append(of_task[size + others :])
    mixed = [ids for turn in zip(*left, strict=True) for ids in turn][:requests]
    return [*found, _trace(mixed, settings)]


def _whole_batches(batch_size: int) -> int:
    return batch_size * -(-FEWEST_PROMPTS // batch_size)


def _trace(prompts: list[list[int]], settings: BenchSettings) -> Point:
    """Cuts prompts to mixed lengths, arriving as a Poisson process, the first at once."""
    rng = np.random.default_rng(settings.seed)
    lengths = rng.choice(settings.lengths, len(prompts)).tolist()
    arrivals = np.cumsum(rng.exponential(size=len(prompts)))
    return Point(
        TRACE,
        max(settings.batch_sizes),
        [ids[:length] for ids, length in zip(prompts, lengths, strict=True)],
        tuple((arrivals - arrivals[0]).tolist()),
        rate=1.0,
    )


def cut_prompts(
    tokenize: Tokenize,
    texts: list[str],
    count: int,
    length: int,
    seed: int,
    others: int = 0,
) -> list[list[int]]:
    """Cuts ``count`` prompts of ``length`` tokens; see ``batch_points``.

    Where there is text enough, ``others`` come after them, or some of these.

    Raises:
        ValueError: there is too little text.
    """
    if not texts:
        rng, library = Random(seed), library_files("held_out")
        rng.shuffle(library)
        unseen = pieces(library, rng, CHARS_PER_TOKEN * length)
        return _first(tokenize, unseen, count, length, others)
    ids = [i for text in texts for i in tokenize(text)]
    if len(ids) < count * length:
        raise ValueError(
            f"--prompts: {len(ids):,} tokens; {count} prompts of {length} need more"
        )
    starts = np.random.default_rng(seed).permutation(len(ids) // length)
    starts = starts[: count + others]
    return [ids[start * length : (start + 1) * length] for start in starts.tolist()]


def _first(
    tokenize: Tokenize, texts: Iterable[str], count: int, length: int, others: int = 0
) -> list[list[int]]:
    """Returns the first ``count`` texts of ``length`` tokens or more, cut to ``length``.

    And at most ``others`` after them.
    """
    found: list[list[int]] = []
    for text in islice(
        texts, 4 * (count + others)
    ):  # not for ever, where every text is too short
        ids = tokenize(text[: 2 * CHARS_PER_TOKEN * length])[:length]
        if len(ids) == length:
            found.append(ids)
        if len(found) == count + others:
            break
    if len(found) >= count:
        return found
    raise ValueError(
        f"too little text: {len(found)} pieces of {length} tokens; {count} are needed"
    )
