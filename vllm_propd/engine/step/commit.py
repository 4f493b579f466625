"""Writing what was accepted, and nothing else, into the paged cache."""

from __future__ import annotations

import numpy as np

from vllm_propd.engine.step.tree_step import TreeStep
from vllm_propd.kernels.transfer import to_device


def commit(step: TreeStep, accepted: np.ndarray, group_of_layer: dict[str, int]) -> None:
    """Caches the accepted nodes' keys and values at their final positions.

    Goes through each backend's own cache update, so every cache format stays right. A
    pruned step holds the upper half's layers only, and the step that it was the lower's.

    Args:
        step: the step, which holds the staged keys and values of all layers.
        accepted: int64 indices among the step's tree rows.
        group_of_layer: KV cache group of each attention layer, by its name.
    """
    parts = [(step, accepted)]
    if step.whole is not None:
        parts.append((step.whole, step.kept[accepted]))
    parts = [(part, rows) for part, rows in parts if len(rows) and part.staged]
    arrays = {}
    for number, (part, rows) in enumerate(parts):
        # The slot of position root + depth stands at the tree's row number ``depth``.
        tree = np.searchsorted(part.first, rows, side="right") - 1
        arrays[f"rows_{number}"] = rows
        arrays[f"place_{number}"] = part.first[tree] + part.depth[rows]
    if parts:
        here = to_device(arrays, parts[0][0].staged[0].key.device)
    for number, (part, _) in enumerate(parts):
        rows, place = here[f"rows_{number}"], here[f"place_{number}"]
        slots = [group_slots[place] for group_slots in part.slots]
        for staged in part.staged:
            staged.layer.impl.do_kv_cache_update(
                staged.layer,
                staged.key[rows],
                staged.value[rows],
                staged.kv_cache,
                slots[group_of_layer[staged.layer.layer_name]],
            )
        part.staged.clear()
