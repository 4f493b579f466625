"""Writing what was accepted, and nothing else, into the paged cache."""

from __future__ import annotations

import numpy as np

from vllm_propd.engine.step import TreeStep
from vllm_propd.engine.transfer import sent


def commit(step: TreeStep, accepted: np.ndarray, group_of_layer: dict[str, int]) -> None:
    """Caches the accepted nodes' keys and values at their final positions.

    Goes through each backend's own cache update, so every cache format stays right. A
    pruned step holds the upper half's layers only, and the step that it was the lower's.

    Args:
        step: with the staged keys and values of all layers.
        accepted: int64 indices among the step's tree rows.
        group_of_layer: KV cache group of each attention layer, by its name.
    """
    if len(accepted) and step.staged:
        device = step.staged[0].key.device
        # The slot of position root + depth stands at the tree's row number ``depth``.
        tree = np.searchsorted(step.first, accepted, side="right") - 1
        place = sent(step.first[tree] + step.depth[accepted], device)
        rows = sent(accepted, device)
        slots = [group_slots[place] for group_slots in step.slots]
        for staged in step.staged:
            staged.layer.impl.do_kv_cache_update(
                staged.layer,
                staged.key[rows],
                staged.value[rows],
                staged.kv_cache,
                slots[group_of_layer[staged.layer.layer_name]],
            )
    step.staged.clear()
    if step.whole is not None:
        commit(step.whole, step.kept[accepted], group_of_layer)
