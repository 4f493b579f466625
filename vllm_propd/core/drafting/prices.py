"""What candidates are worth to greedy requests, and to sampled ones.

A greedy request takes the likeliest token whenever the heads name it; a sampled one takes
each as often as it is likely. So the same word of a head is worth more to the first, and
each kind of request has an estimator of its own.
"""

from __future__ import annotations

import numpy as np

from vllm_propd.core.drafting.reliability import Estimator
from vllm_propd.core.tree import Bools, Float32s


class Prices:
    """An estimator for each kind of request.

    Args:
        greedy, sampled: the estimators.
    """

    def __init__(self, greedy: Estimator, sampled: Estimator):
        self.estimators = (greedy, sampled)
        self._samples = [0, 0]

    @property
    def taught(self) -> Estimator:
        """The one that has learned from more samples."""
        return self.estimators[self._samples[1] > self._samples[0]]

    def observe(self, sampled: bool, hit: Bools, log_probs: Float32s) -> None:
        """Learns from candidates of requests of one kind; see ``Estimator.observe``."""
        self.estimators[sampled].observe(hit, log_probs)
        self._samples[sampled] += len(hit)

    def values(self, sampled: Bools, log_probs: Float32s) -> Float32s:
        """Turns the heads' log probabilities into those that growth takes.

        Args:
            sampled: ``[sequences]`` bool the kind of each request.
            log_probs: ``[sequences, heads, (rows,) ranks]`` float32; so is what is
                returned.
        """
        if sampled.all() or not sampled.any():
            return self.estimators[bool(sampled.any())].values(log_probs)
        values = np.empty(log_probs.shape, np.float32)
        for kind, estimator in zip((~sampled, sampled), self.estimators, strict=True):
            values[kind] = estimator.values(log_probs[kind])
        return values
