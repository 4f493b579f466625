"""Requests' ``cache_salt``, told to workers: what others have said is shared by it.

vLLM keeps it to the scheduler. Workers are sent a request's sampling parameters, which have
a field for plugins; what the salt comes to goes there (``lookup: shared`` reads it).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm import SamplingParams
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from vllm_propd.config import METHOD
from vllm_propd.engine.integration.patches import Patch

if TYPE_CHECKING:  # the front end is not to import numba
    from vllm_propd.core.tree import Ints

SALT = "propd_salt"
"""The key in ``SamplingParams.extra_args``."""


def salted(params: SamplingParams, cache_salt: str | None) -> SamplingParams:
    """Returns sampling parameters with what a salt comes to, on every machine the same.

    Without a salt nothing stands there, whatever the client has sent.
    """
    others = {k: v for k, v in (params.extra_args or {}).items() if k != SALT}
    if cache_salt:
        digest = blake2b(cache_salt.encode(), digest_size=8).digest()
        others[SALT] = int.from_bytes(digest, "little", signed=True)
    if others == (params.extra_args or {}):
        return params
    changed = copy.copy(params)
    changed.extra_args = others
    return changed


def _tell_workers(original: Any) -> Any:
    def add_request(self: Scheduler, request: Request) -> None:
        additional: Any = self.vllm_config.additional_config
        if isinstance(additional, dict) and METHOD in additional:
            # A session's further parts have the salt of the first.
            first = self.requests.get(request.request_id, request)
            if (params := request.sampling_params) is not None:
                request.sampling_params = salted(params, first.cache_salt)
        original(self, request)

    return add_request


def salts_of(params: Iterable[SamplingParams]) -> Ints:
    """Returns ``[requests]`` int64 what salts come to; 0: none."""
    found = [one.extra_args.get(SALT, 0) if one.extra_args else 0 for one in params]
    return np.array(found, np.int64)


PATCHES: tuple[Patch, ...] = ((Scheduler, "add_request", _tell_workers),)
