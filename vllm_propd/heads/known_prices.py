"""What heads' candidates are worth before anything is served, as far as training knows.

Apart from ``calibration``, which the front end reads: it is not to import numba.
"""

from __future__ import annotations

import numpy as np

from vllm_propd.config import ProPDConfig
from vllm_propd.core.drafting.prices import Prices
from vllm_propd.core.drafting.reliability import RankAccuracy, Reliability
from vllm_propd.heads.calibration import Calibration


def known_prices(
    config: ProPDConfig, calibration: Calibration | None, num_heads: int
) -> Prices | None:
    """Returns what the heads' candidates are worth, as far as training knows.

    None: as much as the heads say, always.

    Args:
        config: how nodes are valued, and whether prices learn.
        calibration: of these heads; None: nothing is known.
        num_heads: how many heads there are.
    """
    if config.node_values == "rank_accuracy" and calibration is not None:
        known = np.exp(calibration.rank_values(config.ranks))
        return Prices(RankAccuracy(known), RankAccuracy(known))
    if config.sizing != "dynamic":
        return None
    # What was measured on greedy text says less of what is sampled.
    measured = None if calibration is None else calibration.sureness()
    return Prices(Reliability(num_heads, measured=measured), Reliability(num_heads))
