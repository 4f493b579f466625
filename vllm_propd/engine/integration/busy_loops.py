"""The loops of an engine's processes run in a room for frames (``engine.frame_room``).

Where engine and worker share the front end's process there is no loop, and no room.
"""

from __future__ import annotations

import os
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.engine.core import DPEngineCoreProc, EngineCoreProc
from vllm.v1.executor.multiproc_executor import WorkerProc

from vllm_propd.engine.frame_room import FRAME_ROOM, with_frame_room
from vllm_propd.engine.integration.config_patch import is_propd
from vllm_propd.engine.integration.patches import Patch


def _in_a_room(original: Any) -> Any:
    """Gives a loop room, if its engine drafts by ProPD or is to have it anyway."""
    roomy = with_frame_room(original)

    def busy_loop(self: EngineCoreProc | WorkerProc) -> None:
        owner = self.worker if isinstance(self, WorkerProc) else self
        config: VllmConfig = owner.vllm_config
        ours = is_propd(config.speculative_config)
        (roomy if ours or os.environ.get(FRAME_ROOM) == "1" else original)(self)

    return busy_loop


PATCHES: tuple[Patch, ...] = (
    (EngineCoreProc, "run_busy_loop", _in_a_room),
    (DPEngineCoreProc, "run_busy_loop", _in_a_room),
    (WorkerProc, "worker_busy_loop", _in_a_room),
)
