"""Engines for integration tests: real vLLM on the model that ships with the repo."""

import gc
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cores  # noqa: F401 - first: it counts them
import pytest

# Before vLLM is imported, for its workers: both cores, no model hub, and callables in
# collective_rpc.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "0-1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from vllm_propd.core import numba_beside_vllm  # noqa: F401 - vLLM imports numba

# isort: split

from vllm import LLM, SamplingParams, envs
from vllm.config import LoggingConfig
from vllm.logger import configure_logging
from vllm.outputs import CompletionOutput

from vllm_propd.corpus import held_out_snippets
from vllm_propd.engine.frame_room import SLOTS
from vllm_propd.engine.integration.config_patch import find_config
from vllm_propd.engine.step import propose

# Once, here: the first engine does it otherwise, and where a command's test makes that one,
# vLLM logs into that command's output for ever.
configure_logging(LoggingConfig())

MODEL = Path(__file__).parents[2] / "demo" / "model"

ENGINE: dict[str, Any] = {
    "model": str(MODEL),
    "dtype": "float32",
    "max_model_len": 1024,
    "max_num_seqs": 16,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 1 << 28,
    "disable_log_stats": False,
    "seed": 0,
}

BUSY: dict[str, Any] = {
    "max_num_batched_tokens": 64,
    "enable_chunked_prefill": True,
    "enable_prefix_caching": True,
}
"""Requests compete for a small token budget, beside chunks of prompts."""

PRUNING: dict[str, dict[str, Any]] = {
    "unpruned": {},
    "top_k": {"pruning": "top_k", "top_k": 10, "early_layer": 1},
    "path_probability": {
        "pruning": "path_probability",
        "keep_nodes": 12,
        "early_layer": 2,
    },
}
"""Every rule of early pruning, and none: settings of method propd."""

SETTINGS = {**PRUNING, "default": {"sizing": "dynamic"}}
"""These, and what users have who set nothing: real-time sizes, lookups."""

HEADS_ALONE: dict[str, Any] = {"sizing": "dynamic", "lookup": False, "recycling": False}
"""The paper's method: nothing is drafted but the heads' candidates."""

Prompt = dict[str, list[int]]


@contextmanager
def engine(nodes: int = 0, own_processes: bool = False, **options: Any) -> Iterator[LLM]:
    """A vLLM engine: plain with 0 nodes, else ProPD with trees of that size.

    It runs inside the test's process, where it starts in two seconds; in processes of its
    own, as vLLM has it by default, in twenty. Those are what tests of tensor parallelism,
    compilation, serving and the commands have.
    """
    propd = options.pop("propd", {})
    own_processes |= (
        options.get("tensor_parallel_size", 1) > 1
        and options.get("distributed_executor_backend") != "ray"
    )
    if nodes:
        options["speculative_config"] = {
            "method": "propd",
            "num_speculative_tokens": nodes,
            "sizing": "fixed",
            **propd,
        }
    processes = {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(own_processes))}
    with patch.dict(os.environ, processes):
        envs.disable_envs_cache()
        # vLLM collects garbage seven times as an engine starts and ends. Of what all these
        # modules hold none is garbage, and looking takes half a second each time.
        gc.freeze()
        llm = LLM(**{**ENGINE, **options})
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
    envs.disable_envs_cache()  # an engine in this process keeps what it has read


def use(llm: LLM, nodes: int, propd: dict[str, Any]) -> None:
    """Goes on with other settings of ProPD; at most as many nodes as it started with."""
    keys = {"num_speculative_tokens": nodes, "sizing": "fixed", **propd}
    sent = find_config(keys, str(MODEL)).model_dump_json(exclude_unset=True)
    llm.collective_rpc("use_settings", args=(sent,))


def rooms(worker: Any) -> int:
    """Beneath how many rooms for frames a worker runs (``LLM.collective_rpc``)."""
    frame, found = sys._getframe(), 0
    while frame is not None:
        found += frame.f_code.co_stacksize == SLOTS
        frame = frame.f_back
    return found


def run(llm: LLM, prompts: list[Prompt], params: Any) -> list[CompletionOutput]:
    """The first completion of each prompt."""
    return [out.outputs[0] for out in llm.generate(prompts, params, use_tqdm=False)]


def metric(llm: LLM, name: str) -> int:
    """A counter's value."""
    found = [m for m in llm.get_metrics() if m.name == f"vllm:{name}"]
    return int(getattr(found[0], "value", 0)) if found else 0


def greedy(max_tokens: int = 96, **fields: Any) -> SamplingParams:
    """Greedy decoding; two logprobs a token tell how close the runner-up was."""
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **fields)


def seeded(count: int) -> list[SamplingParams]:
    """Sampling parameters of so many requests, each with a seed of its own."""
    return [
        SamplingParams(temperature=0.8, top_p=0.95, seed=seed, max_tokens=48, logprobs=2)
        for seed in range(count)
    ]


def unlogged(params: Any) -> Any:
    """The same without logprobs: greedy tokens of all rows are then drawn at once."""
    if isinstance(params, list):
        return [unlogged(one) for one in params]
    params = params.clone()
    params.logprobs = None
    return params


def prompts_of(lengths: list[int], seed: int = 0) -> list[Prompt]:
    """Prompts of these lengths in tokens, from source files the model has not seen."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    texts = held_out_snippets(len(lengths), seed=seed, min_chars=6000)
    return [
        {"prompt_token_ids": tokenizer(text)["input_ids"][:length]}
        for text, length in zip(texts, lengths, strict=True)
    ]


def mixed_prompts(count: int, seed: int = 0) -> list[Prompt]:
    """Prompts of 1 to 700 tokens."""
    rng = random.Random(seed)
    return prompts_of([rng.randint(1, 700) for _ in range(count)], seed)


class Ties:
    """Counts differences that plain vLLM's own near-ties excuse: two in all tests."""

    LIMIT, GAP = 2, 1e-4

    def __init__(self) -> None:
        self.compared = self.excused = 0

    def check(
        self, plain: list[CompletionOutput], ours: list[CompletionOutput]
    ) -> set[int]:
        """Fails unless both sides have the same tokens (``plain`` with 2 logprobs).

        Returns:
            Which differ, at a near-tie.
        """
        assert len(plain) == len(ours)
        excused = set()
        for index, (left, right) in enumerate(zip(plain, ours, strict=True)):
            self.compared += 1
            if list(left.token_ids) == list(right.token_ids):
                continue
            pairs = zip(left.token_ids, right.token_ids, strict=False)
            at = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
            assert at is not None, f"prompt {index}: one text is longer"
            assert left.logprobs is not None
            top = sorted((p.logprob for p in left.logprobs[at].values()), reverse=True)
            assert top[0] - top[1] < self.GAP, f"prompt {index} differs at token {at}"
            self.excused += 1
            excused.add(index)
        assert self.excused <= self.LIMIT, "too many near-ties to excuse"
        return excused


TIES = Ties()
"""One budget of excuses for the whole run."""


@pytest.fixture(scope="session")
def ties() -> Ties:
    """The run's budget of excuses."""
    return TIES


@pytest.fixture
def engines_in_this_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Engines that code under test makes, and not ``engine``, need no process either."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    envs.disable_envs_cache()
    yield
    envs.disable_envs_cache()


@pytest.fixture
def heads_in_targets_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of engines in this process compute as their target does, on every machine.

    In 8 bits what is nearly as probable may swap places.
    """
    monkeypatch.setattr(propose, "draft_dtype", lambda target, device: target)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tests side by side have a budget of excuses together: they tell who started them."""
    told = getattr(session.config, "workeroutput", None)
    if told is not None:
        told["ties"] = TIES.compared, TIES.excused
    elif TIES.excused > TIES.LIMIT:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Adds what one of those who ran side by side told."""
    compared, excused = getattr(node, "workeroutput", {}).get("ties", (0, 0))
    TIES.compared += compared
    TIES.excused += excused


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says how many texts were compared, and how many near-ties were excused."""
    terminalreporter.write_line(
        f"texts compared with plain vLLM's, token by token: {TIES.compared}, "
        f"near-ties excused: {TIES.excused} of {TIES.LIMIT}"
    )
