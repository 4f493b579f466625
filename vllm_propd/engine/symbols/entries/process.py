"""What ProPD's code asks of the process around it: ranks, log, current settings."""

from __future__ import annotations

from vllm_propd.engine.symbols.behaviour import Behaviour
from vllm_propd.engine.symbols.symbol import Symbol

SYMBOLS = (
    Symbol(
        "vllm.v1.engine.core:EngineCoreProc.run_busy_loop",
        "patched",
        "self",
        "runs in a room for frames, in engines that draft",
        "else calls deep in a step may map memory, each of them",
        "a CPython that keeps a chunk of frames",
    ),
    Symbol(
        "vllm.v1.engine.core:DPEngineCoreProc.run_busy_loop",
        "patched",
        "self",
        "see EngineCoreProc.run_busy_loop",
        "see EngineCoreProc.run_busy_loop",
        "see EngineCoreProc.run_busy_loop",
    ),
    Symbol(
        "vllm.v1.executor.multiproc_executor:WorkerProc.worker_busy_loop",
        "patched",
        "self",
        "see EngineCoreProc.run_busy_loop",
        "see EngineCoreProc.run_busy_loop",
        "see EngineCoreProc.run_busy_loop",
    ),
    Symbol(
        "vllm.distributed:get_tensor_model_parallel_rank",
        "called",
        "",
        "which share of the vocabulary is this worker's, and who counts metrics",
        "logits are never gathered for the early head's test",
        "nothing",
    ),
    Symbol(
        "vllm.distributed:get_tensor_model_parallel_world_size",
        "called",
        "",
        "see get_tensor_model_parallel_rank",
        "see get_tensor_model_parallel_rank",
        "nothing",
    ),
    Symbol(
        "vllm.distributed.parallel_state:get_tp_group",
        "called",
        "",
        "the group in which a plan's amount of pruning is shared",
        "clocks differ, so the first rank's plan must count on all ranks",
        "room for it in the scheduled draft list",
    ),
    Symbol(
        "vllm.distributed.parallel_state:GroupCoordinator.broadcast_object",
        "called",
        "self obj",
        "see get_tp_group",
        "see get_tp_group",
        "see get_tp_group",
    ),
    Symbol(
        "vllm.config:set_current_vllm_config",
        "called",
        "vllm_config",
        "gives each half of the model a config of its own while it is compiled",
        "vLLM names cached artifacts by config and class",
        "see get_pp_group",
    ),
    Symbol(
        "vllm.config:CompilationMode",
        "read",
        "",
        "whether the halves are compiled, and so must be warmed up",
        "the first request would wait for the compiler",
        "nothing",
    ),
    Symbol(
        "vllm.forward_context:get_forward_context",
        "called",
        "",
        "swaps the attention metadata between the halves",
        "what is left after pruning has other rows",
        "early exits in vLLM",
    ),
    Symbol(
        "vllm.logger:init_logger",
        "called",
        "name",
        "our lines look like vLLM's, and go where they go",
        "users set one log level",
        "nothing",
    ),
)

BEHAVIOURS = (
    Behaviour(
        "vllm.v1.engine.core:EngineCoreProc.run_busy_loop",
        "steps run beneath it, where the engine has a process of its own",
        "its frame's room is theirs",
        "see the symbol of that name",
        "tests/integration/test_lossless.py::test_compiled_engine",
    ),
    Behaviour(
        "vllm.v1.executor.multiproc_executor:WorkerProc.worker_busy_loop",
        "steps run beneath it, where workers have processes of their own",
        "its frame's room is theirs",
        "see the symbol of that name",
        "tests/integration/test_tensor_parallel.py::test_workers_have_room_for_frames",
    ),
    Behaviour(
        "vllm.config.vllm:VllmConfig.instance_id",
        "is the same in the front end and in its workers, with one API server",
        "a folder of that name holds what workers count",
        "a free field in vLLM's SchedulerStats",
        "tests/integration/test_serve.py::test_trees_show_in_the_servers_metrics",
    ),
    Behaviour(
        "vllm.v1.engine.utils:_apply_dp_identity_suffix",
        "appends _dp and the rank to the instance_id of Ray's data-parallel engines",
        "their workers find the front end's folder without it",
        "a free field in vLLM's SchedulerStats",
        "tests/integration/test_shared_metrics.py::test_ranks_count_in_one_folder",
    ),
    Behaviour(
        "vllm.v1.metrics.prometheus:setup_multiprocess_prometheus",
        "names a folder in PROMETHEUS_MULTIPROC_DIR, for several API servers and engines",
        "workers count there, and vLLM's own collector reads it",
        "a free field in vLLM's SchedulerStats",
        "tests/integration/test_serve.py::test_two_data_parallel_engines",
    ),
    Behaviour(
        "vllm.v1.metrics.prometheus:get_prometheus_registry",
        "is prometheus_client's own registry, with one API server",
        "our collector stands there",
        "a registry for each engine",
        "tests/integration/test_serve.py::test_trees_show_in_the_servers_metrics",
    ),
)
