"""What sources without heads would have drafted for answers that are known.

No engine: an answer, and what the target thought likely at each of its places, is all that
they ever see (``core.drafting.sources``). They learn from answer to answer, as in an
engine that serves one request at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from vllm_propd.core.drafting.lookup import TokenMatrix
from vllm_propd.core.drafting.sources import Said, Sources
from vllm_propd.core.drafting.successors import ReadTokens
from vllm_propd.core.tree import Bools, Float32s, Ints
from vllm_propd.simulation.offline_acceptance import accepted_path


@dataclass(frozen=True)
class Answer:
    """A greedy answer of the target.

    Attributes:
        task: what kind of question it answers.
        prompt: ``[tokens]`` int64.
        text: ``[tokens]`` int64 the answer.
        best: ``[tokens, ranks]`` int64 the target's best tokens at each place of it.
        log_probs: ``[tokens, ranks]`` float32, theirs.
    """

    task: str
    prompt: Ints
    text: Ints
    best: Ints
    log_probs: Float32s


@dataclass(frozen=True)
class Gained:
    """What trees of a size would have given.

    Attributes:
        tokens, steps: by task.
        expected: accepted nodes that their values promised, over all steps.
    """

    tokens: Counter[str]
    steps: Counter[str]
    expected: float

    def tokens_per_step(self, task: str | None = None) -> float:
        """Returns tokens per step, the bonus included; of one task, or of all answers."""
        if task is not None:
            return self.tokens[task] / self.steps[task]
        return self.tokens.total() / self.steps.total()


@dataclass
class _Reading:
    """One answer as far as it has been put out (``core.drafting.sources.Texts``)."""

    ids: list[str]
    tokens: TokenMatrix
    begins: Ints
    lengths: Ints
    put_out: Ints
    rows: Ints = field(default_factory=lambda: np.zeros(1, np.int64))
    salts: Ints = field(default_factory=lambda: np.zeros(1, np.int64))
    sampled: Bools = field(default_factory=lambda: np.zeros(1, np.bool_))
    steered: Bools = field(default_factory=lambda: np.zeros(1, np.bool_))
    chain: Bools = field(default_factory=lambda: np.zeros(1, np.bool_))

    @classmethod
    def of(cls, name: str, answer: Answer) -> _Reading:
        """Begins an answer, whose first token comes with its prompt."""
        whole = np.concatenate([answer.prompt, answer.text])[None].astype(np.int32)
        begins = np.array([len(answer.prompt)])
        return cls([name], whole, begins, begins + 1, np.ones(1, np.int64))

    @property
    def roots(self) -> Ints:
        return self.tokens[0, self.lengths - 1].astype(np.int64)

    @property
    def at(self) -> int:
        """How much of the answer has been put out."""
        return int(self.lengths[0] - self.begins[0])

    def read(self, count: int) -> None:
        """Reads the next tokens, which one step has put out."""
        self.lengths, self.put_out = self.lengths + count, np.array([count])

    def said(self, answer: Answer) -> Said:
        """Returns what the target has said in the step."""
        count = int(self.put_out[0])
        places = np.arange(self.at - count, self.at)
        before, truth = (
            self.tokens[0, self.begins[0] + places + ahead].astype(np.int64)
            for ahead in (-1, 0)
        )
        read = ReadTokens(before, truth, np.zeros(count, np.int64), np.arange(count))
        share = answer.log_probs[places]
        share = share - np.log(np.exp(share).sum(1, keepdims=True))
        return read, answer.best[places], share


def replay(answers: Sequence[Answer], nodes: int, sources: Sources) -> Gained:
    """Walks over answers, one after the other, with trees of so many nodes.

    Args:
        answers: at least one; each of a token or more.
        nodes: nodes of each tree, or as many as there are.
        sources: what drafts; they learn.
    """
    tokens: Counter[str] = Counter()
    steps: Counter[str] = Counter()
    expected = 0.0
    for index, answer in enumerate(answers):
        reading = _Reading.of(f"answer {index}", answer)
        while (left := len(answer.text) - reading.at) > 0:
            found, count = sources.find(reading, partial(reading.said, answer)), 1
            if found is not None:
                tree = sources.trees(reading, found, nodes)[0]
                count += len(accepted_path(tree, answer.text[reading.at :]))
                expected += float(np.exp(tree.score.astype(np.float64)).sum())
            count = min(count, left)
            reading.read(count)
            tokens[answer.task] += count
            steps[answer.task] += 1
        sources.forget(reading.ids[0])
    return Gained(tokens, steps, expected)
