"""What vLLM loads in every process: a version check, then the patches.

Nothing here imports torch or touches a device.
"""

from __future__ import annotations

import logging
import os
from importlib.metadata import requires, version
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path

from packaging.requirements import Requirement

logger = logging.getLogger("vllm.propd")

SKIP_VERSION_CHECK = "VLLM_PROPD_SKIP_VERSION_CHECK"


def installed_vllm() -> str | None:
    """Returns the version that vLLM's own code says it is; None: it does not say.

    A distribution's metadata may be a name tag only, and of another version
    (``scripts/vllm_metadata``).
    """
    spec = find_spec("vllm")
    for folder in (spec and spec.submodule_search_locations) or ():
        written_by_its_build = Path(folder) / "_version.py"
        if written_by_its_build.is_file():
            return str(run_path(str(written_by_its_build))["__version__"])
    return None


def supported_vllm() -> Requirement:
    """Returns the vLLM that this release is made for, from its metadata's extra ``cuda``.

    Raises:
        RuntimeError: the metadata names no vLLM.
    """
    for line in requires("vllm-propd") or []:
        requirement = Requirement(line)
        if requirement.name == "vllm":
            return requirement
    raise RuntimeError("the metadata of vllm-propd names no vLLM version")


def register() -> None:
    """Entry point ``vllm.general_plugins``: safe to call any number of times.

    On a vLLM that this release was not made for, or that someone else has changed where
    ours would, nothing is touched and an error is logged: plain vLLM goes on working.
    """
    found, wanted = installed_vllm(), supported_vllm().specifier
    fits = found and wanted.contains(found.split("+")[0], prereleases=True)
    if not fits and os.environ.get(SKIP_VERSION_CHECK) != "1":
        logger.error(
            "vllm-propd %s is made for vLLM %s, but vLLM %s is installed: the method "
            "'propd' is not available. Install a matching pair, or set %s=1 to try.",
            version("vllm-propd"),
            wanted,
            found or "of an unknown version",
            SKIP_VERSION_CHECK,
        )
        return
    from vllm_propd.config import REQUEST_METRICS
    from vllm_propd.engine.integration import (
        busy_loops,
        cache_salts,
        config_patch,
        draft_delivery,
        patches,
        sessions,
    )

    wanted_patches = [
        *config_patch.PATCHES,
        *draft_delivery.PATCHES,
        *sessions.PATCHES,
        *cache_salts.PATCHES,
        *busy_loops.PATCHES,
    ]
    if os.environ.get(REQUEST_METRICS) == "1":
        from vllm_propd.engine.integration import request_metrics

        wanted_patches += request_metrics.PATCHES
    try:
        patches.apply(wanted_patches)
    except patches.PatchedByOthersError as error:
        logger.error("vllm-propd: the method 'propd' is not available: %s", error)
