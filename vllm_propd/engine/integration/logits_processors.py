"""Every logits processor, although there is speculation: our walk can apply them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm.v1.worker import gpu_model_runner

from vllm_propd.engine.integration.patches import replaced


@contextmanager
def all_logits_processors() -> Iterator[None]:
    """Lets vLLM build all logits processors inside, although there is speculation.

    It would leave most out, because its rejection sampler cannot apply them to drafts.
    """
    original = gpu_model_runner.build_logitsprocs

    def build(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        with replaced(vllm_config, "speculative_config", None):
            return original(vllm_config, *args, **kwargs)

    with replaced(gpu_model_runner, "build_logitsprocs", build):
        yield
