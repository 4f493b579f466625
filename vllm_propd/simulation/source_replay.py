"""What sources without heads would have drafted for answers that are known.

They learn from answer to answer, as in an engine that serves one request at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_propd.core.sources.combined import Sources
from vllm_propd.simulation.answers import Answer, Reading
from vllm_propd.simulation.offline_acceptance import accepted_path


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


def replay(answers: Sequence[Answer], nodes: int, sources: Sources) -> Gained:
    """Walks over answers, one after the other, with trees of so many nodes.

    Args:
        answers: at least one; each of a token or more.
        nodes: nodes of each tree, or as many as there are.
        sources: what drafts; they learn.
    """
    tokens: Counter[str] = Counter()
    steps: Counter[str] = Counter()
    expected, reading = 0.0, Reading(answers[:1])
    for index, answer in enumerate(answers):
        if index:
            reading.begin(0, answer)
        while left := len(reading.rest(0)):
            sources.see(reading)
            found, count = sources.find(reading, reading.said), 1
            if found is not None:
                tree = sources.trees(reading, found, nodes)[0]
                count += len(accepted_path(tree, reading.rest(0)))
                expected += float(np.exp(tree.score.astype(np.float64)).sum())
            count = min(count, left)
            reading.read(np.array([count]))
            tokens[answer.task] += count
            steps[answer.task] += 1
        sources.end(reading.ids[0], answer.text.tolist())
    return Gained(tokens, steps, expected)
