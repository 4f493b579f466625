"""Every logits processor, although there is speculation: our walk can apply them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from vllm.v1.worker import gpu_model_runner


@contextmanager
def all_logits_processors() -> Iterator[None]:
    """Builds them all; with speculation vLLM would leave most out.

    Its rejection sampler cannot apply them to drafts.
    """
    original = gpu_model_runner.build_logitsprocs

    def build(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        with patch.object(vllm_config, "speculative_config", None):
            return original(vllm_config, *args, **kwargs)

    with patch.object(gpu_model_runner, "build_logitsprocs", build):
        yield
