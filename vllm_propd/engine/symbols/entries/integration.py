"""How users turn ProPD on, and how drafts reach the scheduler."""

from __future__ import annotations

from vllm_propd.engine.symbols.behaviour import OWN, Behaviour
from vllm_propd.engine.symbols.symbol import Symbol

_EXECUTOR = "vllm.v1.executor.multiproc_executor:MultiprocExecutor"
_RAY = "vllm.v1.executor.ray_executor:RayDistributedExecutor"
_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"

SYMBOLS = (
    Symbol(
        "vllm.engine.arg_utils:EngineArgs.add_cli_args",
        "patched",
        "parser",
        "teaches --speculative-config and --spec-method the word propd",
        "argparse validates both before any plugin could translate them",
        "an extension point for speculative methods in vLLM's argument parser",
    ),
    Symbol(
        "vllm.engine.arg_utils:EngineArgs.create_engine_config",
        "patched",
        "self usage_context headless",
        "translates method propd to custom_class plus worker_cls, then checks support",
        "SpeculativeConfig.method is a closed list, and drops keys it does not know",
        "a registry of speculative methods with their own config classes",
    ),
    Symbol(
        "vllm.sampling_params:SamplingParams._validate_spec_decode",
        "patched",
        "self speculative_config",
        "accepts min_p and logit_bias when the method is propd",
        "vLLM's rejection sampler ignores them, so it refuses them for every method",
        "min_p and logit_bias with speculative decoding in vLLM",
    ),
    Symbol(
        "vllm.engine.arg_utils:EngineArgs",
        "read",
        "model speculative_config spec_method spec_model spec_tokens worker_cls "
        "additional_config attention_backend attention_config",
        "its fields carry the user's wishes in, and our worker and settings out",
        "all doors meet here",
        "see create_engine_config",
    ),
    Symbol(
        "vllm.config:SpeculativeConfig",
        "read",
        "method model num_speculative_tokens",
        "holds method custom_class and the dotted path of our proposer",
        "the supported door for proposers of third parties",
        "nothing: this is the supported way",
    ),
    Symbol(
        "vllm.v1.spec_decode.custom_class_proposer:create_custom_proposer",
        "called",
        "vllm_config",
        "vLLM builds our proposer by its dotted path, and its load_model runs",
        "the supported door for proposers of third parties; forces the V1 runner",
        "nothing: this is the supported way",
    ),
    Symbol(
        "vllm.config:SpeculativeConfig",
        "read",
        "num_speculative_tokens_per_batch_size",
        "is the same number for all batches",
        "with such a schedule the scheduler pads no request that joins with one token to a "
        "row for each speculative token (tests/integration/test_joining.py)",
        "padding only where whole uniform batches have CUDA graphs",
    ),
    Symbol(
        "vllm.config:SchedulerConfig",
        "read",
        "max_num_batched_tokens max_num_scheduled_tokens long_prefill_token_threshold",
        "says how many tokens a step can have, and where lists of drafts are cut",
        "no tree should be larger",
        "nothing",
    ),
    Symbol(
        "vllm.sampling_params:SamplingParams",
        "read",
        "max_tokens min_tokens stop_token_ids repetition_detection presence_penalty "
        "frequency_penalty repetition_penalty logit_bias allowed_token_ids bad_words "
        "structured_outputs extra_args",
        "tells whether a request may go on, and what steers it",
        "nothing is drafted for one that has ended, or has one token left; steered "
        "requests teach nothing of the heads",
        "nothing",
    ),
    Symbol(
        "vllm.sampling_params:SamplingParams.eos_token_id",
        "read",
        "",
        "is the model's end of text, where a request ends with it",
        "see SamplingParams",
        "nothing",
    ),
    Symbol(
        "vllm.config:AttentionConfig.validate_backend_before",
        "called",
        "value",
        "makes a backend of its name, as engine arguments may have it",
        "ProPD on CUDA needs FLASH_ATTN, and refuses others",
        "a tree mask in vLLM's attention backends",
    ),
    Symbol(
        "vllm.v1.executor.abstract:Executor.get_class",
        "patched",
        "vllm_config",
        "the class that an engine chooses is taught where drafts are",
        "Ray's classes are imported only by who uses them",
        "see MultiprocExecutor.sample_tokens",
    ),
    Symbol(
        "vllm.v1.executor.uniproc_executor:UniProcExecutor",
        "read",
        "",
        "is left as it is: its worker is in the same process",
        "asking it is a call",
        "see MultiprocExecutor.sample_tokens",
    ),
    Symbol(
        f"{_RAY}.sample_tokens",
        "patched",
        "self grammar_output non_block",
        "see MultiprocExecutor.sample_tokens",
        "see MultiprocExecutor.sample_tokens",
        "see MultiprocExecutor.sample_tokens",
    ),
    Symbol(
        f"{_EXECUTOR}.sample_tokens",
        "patched",
        "self grammar_output non_block",
        "keeps the drafts that came with a step's output",
        "one message a step less between engine core and worker",
        "drafts in vLLM's ModelRunnerOutput",
    ),
    Symbol(
        f"{_EXECUTOR}.take_draft_token_ids",
        "patched",
        "self",
        "answers with what sample_tokens kept; asks the worker where it kept nothing",
        "see sample_tokens",
        "see sample_tokens",
    ),
    Symbol(
        f"{_RUNNER}.sample_tokens",
        "overridden",
        "self grammar_output",
        "puts the drafts into the step's output",
        "see MultiprocExecutor.sample_tokens",
        "see MultiprocExecutor.sample_tokens",
    ),
    Symbol(
        "vllm.v1.core.sched.output:GrammarOutput",
        "read",
        "",
        "the type of what sample_tokens is given; never looked into",
        "see MultiprocExecutor.sample_tokens",
        "see MultiprocExecutor.sample_tokens",
    ),
    Symbol(
        f"{_RUNNER}.take_draft_token_ids",
        "called",
        "self",
        "what the executor would have asked for",
        "see MultiprocExecutor.sample_tokens",
        "see MultiprocExecutor.sample_tokens",
    ),
    Symbol(
        "vllm.v1.outputs:ModelRunnerOutput",
        "read",
        "req_ids",
        "carries the drafts as one more attribute, which pickle keeps",
        "see MultiprocExecutor.sample_tokens",
        "see MultiprocExecutor.sample_tokens",
    ),
    Symbol(
        "vllm.v1.outputs:DraftTokenIds",
        "read",
        "req_ids draft_token_ids",
        "what the runner gives and the scheduler takes; never looked into",
        "see MultiprocExecutor.sample_tokens",
        "see MultiprocExecutor.sample_tokens",
    ),
    Symbol(
        "vllm.v1.engine.output_processor:RequestState._new_completion_output",
        "patched",
        "self token_ids finish_reason stop_reason",
        "puts why a request ended, and what became of its drafts, into its metrics",
        "Ray's vLLM stage keeps a request's text, tokens and metrics, and drops the rest; "
        "batch jobs alone, in their engines' processes",
        "both in the rows of Ray's vLLM stage",
    ),
    Symbol(
        "vllm.v1.engine.output_processor:RequestState",
        "read",
        "",
        "see RequestState._new_completion_output",
        "see RequestState._new_completion_output",
        "see RequestState._new_completion_output",
        "stats",
    ),
    Symbol(
        "vllm.v1.metrics.stats:RequestStateStats",
        "overridden",
        "num_generation_tokens num_preemptions arrival_time queued_ts scheduled_ts "
        "first_token_ts last_token_ts first_token_latency is_corrupted is_watermarked "
        "is_watermark_skipped",
        "ours has two fields more; Ray turns it into a table by dataclasses.asdict",
        "see RequestState._new_completion_output",
        "see RequestState._new_completion_output",
    ),
    Symbol(
        "vllm.outputs:CompletionOutput",
        "read",
        "finish_reason spec_decode_metrics",
        "see RequestState._new_completion_output",
        "see RequestState._new_completion_output",
        "see RequestState._new_completion_output",
    ),
    Symbol(
        "vllm.v1.metrics.stats:RequestSpecDecodeMetrics.to_dict",
        "called",
        "self",
        "a request's acceptance length, as vLLM's server tells it",
        "see RequestState._new_completion_output",
        "see RequestState._new_completion_output",
    ),
)

BEHAVIOURS = (
    Behaviour(
        "vllm.plugins:load_general_plugins",
        "runs in every process, before arguments are parsed and before a worker is made",
        "all our patches are applied there",
        "nothing: this is the supported way",
        "tests/integration/test_serve.py::test_chat_completion",
        package=True,
    ),
    Behaviour(
        "vllm.config.vllm:VllmConfig.__post_init__",
        "refuses asynchronous scheduling for custom_class, and turns it off where nobody "
        "asks",
        "drafts come with a step's output, and texts are those of the step before",
        "hidden states in the custom_class interface, on the runner that schedules ahead",
        f"{OWN}test_our_method_keeps_to_the_first_runner_step_by_step",
    ),
    Behaviour(
        "vllm.config.vllm:VllmConfig.use_v2_model_runner",
        "is False for custom_class",
        "our runner extends the first one",
        "our hooks in the second runner",
        f"{OWN}test_our_method_keeps_to_the_first_runner_step_by_step",
    ),
    Behaviour(
        "vllm.v1.executor.multiproc_executor:MultiprocExecutor.collective_rpc",
        "gives back the first rank's output, attributes that vLLM does not know included",
        "drafts come with it (`attach_drafts`)",
        "drafts in vLLM's ModelRunnerOutput",
        "tests/integration/test_tensor_parallel.py::test_drafts_come_with_the_output",
    ),
    Behaviour(
        "vllm.v1.engine.core:EngineCore.post_step",
        "takes drafts from the executor after each step, and gives them to the scheduler",
        "that is how a tree reaches the next step",
        "nothing",
        "tests/integration/test_lossless.py::test_text_is_plain_vllms",
    ),
    Behaviour(
        "vllm.v1.engine.output_processor:RequestState._new_request_output",
        "hands on the state's stats as a request's metrics, after its completion was made",
        "see RequestState._new_completion_output",
        "both in the rows of Ray's vLLM stage",
        "tests/integration/test_request_metrics.py::test_metrics_tell_how_a_request_ended",
    ),
)
