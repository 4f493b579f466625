"""One engine whose ranks are Ray's workers: plain vLLM's text, drafts with the output."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from conftest import Ties, engine, greedy, metric, mixed_prompts, run
from ray_on_cpus import DEVICE, refuse
from vllm.platforms import current_platform
from vllm.v1.executor.ray_executor_v2 import RayExecutorV2

pytestmark = [pytest.mark.alone, pytest.mark.long]

RANKS: dict[str, Any] = {
    "tensor_parallel_size": 2,
    "distributed_executor_backend": "ray",
}


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(current_platform), "ray_device_key", DEVICE)
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("OMP_NUM_THREADS", "1")
        environment = {
            "worker_process_setup_hook": "ray_on_cpus.pretend",
            "env_vars": {"PYTHONPATH": str(Path(__file__).parent)},
        }
        ray.init(num_cpus=4, num_gpus=2, include_dashboard=False, runtime_env=environment)
        yield
        ray.shutdown()


def test_text_is_plain_vllms_and_drafts_come_with_the_output(ties: Ties) -> None:
    prompts = mixed_prompts(8, seed=25)
    with engine(tensor_parallel_size=2) as llm:
        expected = run(llm, prompts, greedy(32, logprobs=2))
    # One engine of Ray's: what it has reserved is its driver's until that ends.
    with engine(16, **RANKS) as llm:
        executor = llm.llm_engine.engine_core.engine_core.model_executor
        assert isinstance(executor, RayExecutorV2)
        llm.collective_rpc(refuse)
        ties.check(expected, run(llm, prompts, greedy(32)))
        assert metric(llm, "spec_decode_num_accepted_tokens") > 0
        assert metric(llm, "propd_steps") > 0
