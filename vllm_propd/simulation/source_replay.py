"""What sources without heads would have drafted for answers that are known.

No engine: an answer, and what the target thought likely at each of its places, is all that
prompt lookup and recycled successors ever see. They learn from answer to answer, as in an
engine that serves one request at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_propd.core.drafting.candidates import Candidates
from vllm_propd.core.drafting.growth import grow_from
from vllm_propd.core.drafting.lookup import REACH, Lookups, Paths
from vllm_propd.core.drafting.successors import NOTHING, ReadTokens, SuccessorTable
from vllm_propd.core.tree import Float32s, Ints, TokenTree
from vllm_propd.simulation.offline_acceptance import accepted_path

GREEDY = np.zeros(1, np.int64)
NOT_SAMPLED = np.zeros(1, np.bool_)
ROW = np.zeros(1, np.int64)


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


class _Sources:
    """The sources, and the text that they see grow."""

    def __init__(self, nodes: int, lookup: bool, recycling: bool, vocabulary: int):
        self._nodes = nodes
        self._lookups = Lookups() if lookup else None
        self._table = SuccessorTable(vocabulary) if recycling else None
        self._text: npt.NDArray[np.int32] = np.empty((1, 0), np.int32)
        self.name, self.length = "", 0

    def begin(self, name: str, answer: Answer) -> None:
        """Begins an answer, whose first token has come with its prompt."""
        whole = np.concatenate([answer.prompt, answer.text])
        self._text = whole[None].astype(np.int32)
        self.name, self.length = name, len(answer.prompt)

    def read(self, answer: Answer, count: int) -> None:
        """Takes note of the next tokens of the answer, which one step has put out."""
        places = np.arange(self.length, self.length + count)
        at = places - len(answer.prompt)
        suggested = NOTHING
        if self._lookups is not None:
            starts = np.array([self.length])
            suggested = self._lookups.suggested([self.name], starts)
        if self._table is not None:
            before, truth = (
                self._text[0, at].astype(np.int64) for at in (places - 1, places)
            )
            zero = np.zeros(count, np.int64)
            read = ReadTokens(before, truth, zero, np.arange(count))
            share = answer.log_probs[at]
            share = share - np.log(np.exp(share).sum(1, keepdims=True))
            self._table.see(read, answer.best[at], share, GREEDY, suggested)
        self.length += count

    def draft(self) -> TokenTree | None:
        """Drafts the next step's tree; None where there is nothing to draft."""
        looked_up = successors = None
        root = self._text[0, self.length - 1 : self.length].astype(np.int64)
        if self._table is not None:
            successors = self._table.after(root, NOT_SAMPLED)
        if self._lookups is not None:
            lengths = np.array([self.length])
            found = self._lookups.find([self.name], self._text, ROW, lengths)
            if self._table is None:
                worth = self._lookups.worth()
                return Paths(found, worth, min(self._nodes, REACH))[0]
            best = self._table.best_along(root, found.token)
            looked_up = found.token, self._lookups.worth(None, best)
        if successors is None:
            return None
        sizes = np.array([self._nodes])
        (tree,) = grow_from(Candidates.none(1), sizes, looked_up, successors)
        return tree


def replay(
    answers: Sequence[Answer], nodes: int, lookup: bool, recycling: bool, vocabulary: int
) -> Gained:
    """Walks over answers, one after the other, with trees of so many nodes.

    Args:
        answers: at least one; each of a token or more.
        nodes: nodes of each tree, or as many as there are.
        lookup, recycling: the sources (``ProPDConfig``).
        vocabulary: how many tokens the target knows.
    """
    sources = _Sources(nodes, lookup, recycling, vocabulary)
    tokens: Counter[str] = Counter()
    steps: Counter[str] = Counter()
    expected = 0.0
    for index, answer in enumerate(answers):
        sources.begin(f"answer {index}", answer)
        sources.read(answer, 1)
        at = 1
        while at < len(answer.text):
            tree, count = sources.draft(), 1
            if tree is not None:
                count += len(accepted_path(tree, answer.text[at:]))
                expected += float(np.exp(tree.score.astype(np.float64)).sum())
            count = min(count, len(answer.text) - at)
            sources.read(answer, count)
            tokens[answer.task] += count
            steps[answer.task] += 1
            at += count
    return Gained(tokens, steps, expected)
