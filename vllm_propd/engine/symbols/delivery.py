"""How drafts reach the scheduler."""

from __future__ import annotations

from vllm_propd.engine.symbols.behaviour import Behaviour
from vllm_propd.engine.symbols.symbol import Symbol

_EXECUTOR = "vllm.v1.executor.multiproc_executor:MultiprocExecutor"
_RAY = "vllm.v1.executor.ray_executor:RayDistributedExecutor"
_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"

SYMBOLS = (
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
)

BEHAVIOURS = (
    Behaviour(
        "vllm.v1.executor.multiproc_executor:MultiprocExecutor.collective_rpc",
        "gives back the first rank's output, attributes that vLLM does not know included",
        "drafts come with it (`enclose`)",
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
)
