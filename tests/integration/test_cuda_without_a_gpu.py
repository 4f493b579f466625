"""What can be said of the CUDA path where there is no GPU. No GPU has run it yet."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import HEADS_ALONE, MODEL, engine, greedy, prompts_of, run
from vllm.config import CompilationMode, CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.executor.abstract import Executor
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.outputs import ModelRunnerOutput

from vllm_propd.engine.integration import support_matrix
from vllm_propd.engine.integration.config_patch import PROPOSER, _use_flash_attention
from vllm_propd.engine.integration.draft_delivery import DRAFTS, attach_drafts
from vllm_propd.engine.integration.patches import PatchedByOthersError
from vllm_propd.engine.integration.support_matrix import unsupported_features

TOUCHES = """
from gpu_first_run.imports import replaced_parts
changed = replaced_parts()
assert not changed, changed
"""


def test_the_cuda_worker_leaves_torch_as_it_is() -> None:
    """The CPU worker of vLLM replaces streams and events when it is imported."""
    done = subprocess.run(
        [sys.executable, "-c", TOUCHES],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "scripts")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_bare_step_is_timed_until_its_tokens_are_there() -> None:
    """On a GPU sampling returns before the device is done; vLLM's bookkeeping waits."""
    with engine(8, propd=HEADS_ALONE) as llm:
        runner = llm.collective_rpc(lambda worker: worker.model_runner)[0]
        runner.sizing.most = lambda sequences: 0
        waited = runner._bookkeeping_sync

        def waits(*args: Any, **kwargs: Any) -> Any:
            time.sleep(0.05)
            return waited(*args, **kwargs)

        runner._bookkeeping_sync = waits
        llm.collective_rpc("start_sizing_records")
        run(llm, prompts_of([20], seed=1), greedy(8))
        records = llm.collective_rpc("take_sizing_records")[0]
    assert all(record["measured_s"] > 0.05 for record in records)


@pytest.mark.parametrize(
    "name", ["FLASH_ATTN", "flash_attn", AttentionBackendEnum.FLASH_ATTN]
)
def test_the_attention_backend_may_be_a_name(name: Any) -> None:
    args = EngineArgs(model=str(MODEL), attention_backend=name)
    _use_flash_attention(args)
    assert args.attention_config.backend is AttentionBackendEnum.FLASH_ATTN
    args = EngineArgs(model=str(MODEL), attention_backend="TRITON_ATTN")
    with pytest.raises(ValueError, match="remove --attention-backend TRITON_ATTN"):
        _use_flash_attention(args)


REFUSED: dict[str, tuple[str, str, Any]] = {
    "external_launcher with several ranks": (
        "parallel_config",
        "distributed_executor_backend",
        "external_launcher",
    ),
    "cudagraph_mode FULL,": ("compilation_config", "cudagraph_mode", CUDAGraphMode.FULL),
    "use_inductor_graph_partition": (
        "compilation_config",
        "use_inductor_graph_partition",
        True,
    ),
    "splitting_ops": (
        "compilation_config",
        "splitting_ops",
        ["vllm::unified_attention_with_output"],
    ),
    "--kv-cache-dtype int8": ("cache_config", "cache_dtype", "int8"),
    "--kv-cache-dtype turboquant_4bit": ("cache_config", "cache_dtype", "turboquant_4bit"),
    "--enable-dbo": ("parallel_config", "enable_dbo", True),
    "--enable-sleep-mode": ("model_config", "enable_sleep_mode", True),
    "(R-SWA)": ("model_config.model_arch_config", "rswa_window", 128),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_trees_cannot_do_on_cuda_is_refused(
    reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm_config = EngineArgs(
        model=str(MODEL), dtype="bfloat16", speculative_config="propd"
    ).create_engine_config()
    platform = SimpleNamespace(
        is_cuda=lambda: True,
        get_device_capability=lambda: SimpleNamespace(major=9, minor=0),
    )
    monkeypatch.setattr(support_matrix, "current_platform", platform)
    monkeypatch.setenv(support_matrix.UNTESTED_CUDA, "1")
    object.__setattr__(vllm_config.device_config, "device_type", "cuda")
    vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    # As vLLM has it there.
    compilation = vllm_config.compilation_config
    compilation.mode, compilation.splitting_ops = CompilationMode.VLLM_COMPILE, None
    compilation.set_splitting_ops_for_v1("")
    assert unsupported_features(vllm_config) == []
    owner, name, value = REFUSED[reason]
    object.__setattr__(attrgetter(owner)(vllm_config), name, value)
    if reason.startswith("external"):
        assert unsupported_features(vllm_config) == []  # one rank is an engine like others
        vllm_config.parallel_config.world_size = 2
    (found,) = unsupported_features(vllm_config)
    assert reason in found
    if reason.startswith("cudagraph"):
        platform.get_device_capability = lambda: SimpleNamespace(major=12, minor=0)
        object.__setattr__(vllm_config.compilation_config, name, CUDAGraphMode.PIECEWISE)
        monkeypatch.setattr(type(vllm_config.model_config), "get_head_size", lambda _: 256)
        assert unsupported_features(vllm_config) == ["a head size of 256 on Blackwell GPUs"]


OURS = SimpleNamespace(method="custom_class", model=PROPOSER)


def choosing(backend: Any, speculative_config: Any = OURS) -> Any:
    """As much of an engine's config as chooses an executor."""
    return SimpleNamespace(
        parallel_config=SimpleNamespace(distributed_executor_backend=backend),
        speculative_config=speculative_config,
    )


@pytest.mark.parametrize("backend", ["mp", "ray"])
def test_executors_get_drafts_with_the_steps_output(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the one of Ray that is not made of vLLM's own for worker processes."""
    monkeypatch.setenv("VLLM_USE_RAY_V2_EXECUTOR_BACKEND", "0")
    chosen = Executor.get_class(choosing(backend))
    assert issubclass(chosen, MultiprocExecutor) == (backend == "mp")
    output = ModelRunnerOutput(req_ids=["0"], req_id_to_index={"0": 0})
    attach_drafts(output, "drafts")  # type: ignore[arg-type]

    class WithoutWorkers(chosen):  # type: ignore[misc,valid-type]
        def __init__(self) -> None:
            self.scheduler_output = "a step's"
            self.output_rank = 0
            self.kv_output_aggregator = self.ec_output_aggregator = None

        def collective_rpc(self, method: str, *args: Any, **kwargs: Any) -> Any:
            return output if method == "sample_tokens" else pytest.fail(method)

        def _execute_dag(self, *args: Any, **kwargs: Any) -> Any:
            return output

        def shutdown(self) -> None:
            """Nothing to end."""

    executor = WithoutWorkers()
    assert executor.sample_tokens(None) is output
    assert executor.take_draft_token_ids() == "drafts"
    assert not hasattr(executor, DRAFTS)
    assert Executor.get_class(choosing("uni")) is UniProcExecutor
    assert not hasattr(UniProcExecutor.sample_tokens, "_propd")


def test_plain_engines_start_with_executors_that_others_have_changed() -> None:
    """What ProPD could not build on, they never ask of it."""

    class Theirs(MultiprocExecutor):
        """An executor of vLLM's; another plugin puts its own function there."""

        def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
            """vLLM's, until then."""

    space: dict[str, Any] = {"__name__": "another_plugin"}
    exec("def sample_tokens(self, grammar_output, non_block=False): ...", space)
    Theirs.sample_tokens = space["sample_tokens"]  # type: ignore[method-assign]
    for others in (None, SimpleNamespace(method="ngram", model=None)):
        assert Executor.get_class(choosing(Theirs, others)) is Theirs
    assert Theirs.sample_tokens is space["sample_tokens"]
    with pytest.raises(PatchedByOthersError, match="replaced by another_plugin"):
        Executor.get_class(choosing(Theirs))
