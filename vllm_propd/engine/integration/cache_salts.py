"""Requests' ``cache_salt``, told to workers: what others have said is shared by it.

vLLM keeps it to the scheduler. Workers are sent a request's sampling parameters, which have
a field for plugins; what the salt comes to goes there, where an engine shares texts
(``lookup: shared``).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from hashlib import blake2b
from typing import Any

import numpy as np
from vllm import SamplingParams
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from vllm_propd.config import METHOD, ProPDConfig
from vllm_propd.core.tree import Ints
from vllm_propd.engine.integration.patches import Patch

SALT = "propd_salt"
"""The key in ``SamplingParams.extra_args``."""


def _salted(request: Request) -> SamplingParams:
    """Returns a request's sampling parameters with what its salt comes to, everywhere."""
    digest = blake2b(request.cache_salt.encode(), digest_size=8).digest()
    params = copy.copy(request.sampling_params)
    salt = int.from_bytes(digest, "little", signed=True)
    params.extra_args = {**(params.extra_args or {}), SALT: salt}
    return params


def _tell_workers(original: Any) -> Any:
    def add_request(self: Scheduler, request: Request) -> None:
        if request.cache_salt and request.sampling_params and self.num_spec_tokens:
            additional: Any = self.vllm_config.additional_config
            config = additional.get(METHOD) if isinstance(additional, dict) else None
            if config and ProPDConfig.model_validate_json(config).shares:
                request.sampling_params = _salted(request)
        original(self, request)

    return add_request


def salts_of(params: Iterable[SamplingParams]) -> Ints:
    """Returns ``[requests]`` int64 what salts come to; 0: none."""
    found = [one.extra_args.get(SALT, 0) if one.extra_args else 0 for one in params]
    return np.array(found, np.int64)


PATCHES: tuple[Patch, ...] = ((Scheduler, "add_request", _tell_workers),)
