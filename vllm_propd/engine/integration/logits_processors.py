"""Every logits processor, although there is speculation: our walk can apply them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from vllm.v1.sample.logits_processor import AdapterLogitsProcessor
from vllm.v1.sample.logits_processor.interface import LogitsProcessor
from vllm.v1.worker import gpu_model_runner

from vllm_propd.core.tree import Bools
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


@contextmanager
def called_for(requests: Bools, processors: Iterable[LogitsProcessor]) -> Iterator[None]:
    """Lets processors of single requests be called for some requests only, inside.

    They may count their calls, say: each is one token of theirs in plain vLLM.

    Args:
        requests: ``[requests]`` bool whose processors are called.
        processors: of the batch; those of vLLM's own kinds keep no state of calls.
    """
    with ExitStack() as scopes:
        for processor in processors:
            if isinstance(processor, AdapterLogitsProcessor) and processor.req_info:
                known = processor.req_info.items()
                some = {index: one for index, one in known if requests[index]}
                scopes.enter_context(replaced(processor, "req_info", some))
        yield
