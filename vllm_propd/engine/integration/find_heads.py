"""Where the heads are, on the host that asks: the front end, and each worker.

The front end finds them first, and its path is what the workers are told. Ranks of one
engine may be on several hosts: one that has nothing at that path looks for itself.
"""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from vllm.config import VllmConfig
from vllm.logger import init_logger

from vllm_propd.config import METHOD, ProPDConfig
from vllm_propd.heads.checkpoint import has_heads

logger = init_logger("vllm.propd.heads")

GIVEN = f"{METHOD}_model"
"""Beside the settings in an engine's config: the ``model`` that the user gave, if any."""

HEADS_FOLDER = "propd"
"""The folder of the heads inside a target model's folder."""

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
"""Matches what can be a name on the model hub."""


class NoHeadsError(ValueError):
    """There are no heads where they are looked for; the message says where."""


def engine_config(vllm_config: VllmConfig) -> ProPDConfig:
    """Returns the settings that travel inside an engine's config, with heads of this host.

    Raises:
        NoHeadsError: the settings want heads, and this host has none.
    """
    additional: Any = vllm_config.additional_config
    config = ProPDConfig.model_validate_json(additional[METHOD])
    if config.model is None or Path(config.model).is_dir():
        return config
    target = vllm_config.model_config
    try:
        heads = find_heads(additional[GIVEN], target.model, target.revision)
    except NoHeadsError as error:
        raise NoHeadsError(
            f"host {socket.gethostname()} has no folder {config.model}, where another host "
            f"of this engine has the heads; {error}"
        ) from error
    return config.model_copy(update={"model": str(heads)})


def find_heads(given: str | None, target: str, revision: str | None = None) -> Path:
    """Finds the folder of the heads: the one that is given, or the target's ``propd/``.

    Each may be a folder or a name on the model hub (then downloaded, or read from the
    local cache when offline). The path that is returned is absolute.

    Args:
        given: folder or name of heads; None: they are looked for beside the target.
        target: folder or name of the target.
        revision: branch, tag or commit of the target; heads beside it are of the same one.

    Raises:
        NoHeadsError: there are none; it lists where it looked and what would make them.
    """
    name = given if given is not None else target
    inside = "" if given is not None else HEADS_FOLDER
    folder = Path(name) / inside
    looked = [str(folder)]
    if folder.is_dir():
        # A training that has not ended, or has failed, leaves a folder without heads.
        if given is not None or has_heads(folder):
            return folder.resolve()
        looked = [f"{folder} (which holds none: an unfinished training?)"]
    if not Path(name).exists() and HUB_NAME.fullmatch(name):
        at = revision if inside else None
        where = f"{name}{f'@{at}' if at else ''}{f', {inside}/' if inside else ''}"
        looked.append(f"the model hub ({where})")
        found = _from_hub(name, f"{inside}/*" if inside else None, at)
        if found is not None and (found / inside).is_dir():
            return (found / inside).resolve()
    raise NoHeadsError(
        f"no heads for {target}: looked in {', '.join(looked)}. Point speculative_config "
        f"'model' (--spec-model) at a folder of Medusa heads, or train some: "
        f"`vllm-propd train {target} --self-distill --out {_place_for(target)}`"
    )


def _place_for(target: str) -> Path:
    """Returns where new heads may go; not into a folder that would look like the target."""
    if Path(target).is_dir():
        return Path(target) / HEADS_FOLDER
    return Path(f"{Path(target).name}-{HEADS_FOLDER}")


def _from_hub(name: str, pattern: str | None, revision: str | None) -> Path | None:
    """Returns a repository's local copy; None where it or the hub is out of reach."""
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=pattern))
    except Exception as error:  # of a proxy or a broken connection: each client's own kind
        logger.debug("No %s on the model hub: %s: %s", name, type(error).__name__, error)
        return None
