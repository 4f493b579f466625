"""Items that compare texts: plain and ProPD, eager and compiled."""

from __future__ import annotations

import os
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpu_first_run.setting import (
    NEW_TOKENS,
    Notes,
    Setting,
    generate,
    greedy,
    margins,
    prompts,
)
from gpu_first_run.texts import check_texts, keep_plain

FIXED = {"sizing": "fixed", "num_speculative_tokens": 24, "pruning": "off"}
PRUNED = {
    **FIXED, "pruning": "path_probability", "keep_nodes": 12, "early_layer": 2,
}  # fmt: skip
WAITS = ("synchronizing CUDA operation", "sync detected")
"""Of the warnings that `VLLM_GPU_SYNC_CHECK=warn` makes."""


def _demand(right: list[bool]) -> None:
    if not all(right):
        raise SystemExit("texts differ where plain vLLM was sure")


def plain_eager(setting: Setting, notes: Notes) -> None:
    """Plain vLLM; its tokens are what all others are compared with."""
    began = time.perf_counter()
    with setting.engine() as llm:
        notes["start, s"] = round(time.perf_counter() - began, 1)
        inputs = prompts(setting)
        began = time.perf_counter()
        outputs = llm.generate(inputs, greedy(logprobs=2), use_tqdm=False)
        seconds = time.perf_counter() - began
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        keep_plain(setting, tokens, margins(outputs))
        notes["tokens/s, batch 8, with logprobs"] = round(
            sum(map(len, tokens)) / seconds, 1
        )
        again, seconds = generate(llm, inputs, greedy())
        notes["tokens/s, batch 8"] = round(sum(map(len, again)) / seconds, 1)
        check_texts(setting, notes, "the same again", again)
        alone = [generate(llm, [one], greedy())[0][0] for one in inputs[:4]]
        check_texts(setting, notes, "one at a time", alone)


@contextmanager
def waits(notes: Notes, name: str) -> Iterator[None]:
    """Notes, by line, what has waited for the device."""
    found: Counter[str] = Counter()
    shown = warnings.showwarning

    def show(
        message: Any, category: Any, filename: str, lineno: int, *others: Any, **more: Any
    ) -> None:
        if any(text in str(message) for text in WAITS):
            found[f"{'/'.join(Path(filename).parts[-3:])}:{lineno}"] += 1
        else:
            shown(message, category, filename, lineno, *others, **more)

    warnings.showwarning = show
    try:
        yield
    finally:
        notes[name] = dict(found.most_common(20))


def _check_waits(setting: Setting) -> None:
    if setting.on_gpu:  # read when vLLM is imported
        os.environ["VLLM_GPU_SYNC_CHECK"] = "warn"


def propd_eager(setting: Setting, notes: Notes) -> None:
    """Trees of a fixed size, unpruned, one sequence and eight."""
    _check_waits(setting)
    with waits(notes, "waits"), setting.engine(FIXED) as llm:
        inputs = prompts(setting)
        tokens, seconds = generate(llm, inputs, greedy())
        right = [check_texts(setting, notes, "batch 8", tokens)]
        notes["tokens/s, batch 8"] = round(sum(map(len, tokens)) / seconds, 1)
        alone = [generate(llm, [one], greedy())[0][0] for one in inputs[:4]]
        right.append(check_texts(setting, notes, "batch 1", alone))
        notes["tokens per step"] = tokens_per_step(llm)
    _demand(right)


def pruned_eager(setting: Setting, notes: Notes) -> None:
    """Pruned trees; prompts in chunks, a cached prefix, a sampled, a structured request."""
    _check_waits(setting)
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    small: dict[str, Any] = {"max_num_batched_tokens": 256, "enable_prefix_caching": True}
    with waits(notes, "waits"), setting.engine(PRUNED, **small) as llm:
        inputs = prompts(setting)
        right = []
        for name in ("prompts in chunks", "cached prefixes"):
            tokens, _ = generate(llm, inputs, greedy())
            right.append(check_texts(setting, notes, name, tokens))
        sampled = SamplingParams(temperature=1.0, seed=7, max_tokens=24, ignore_eos=True)
        tokens, _ = generate(llm, inputs[:2], sampled)
        again, _ = generate(llm, inputs[:2], sampled)
        notes["sampled twice with one seed"] = "equal" if tokens == again else "different"
        try:
            shape = StructuredOutputsParams(regex="[ab]{6}")
            params = SamplingParams(
                temperature=0.0, max_tokens=12, structured_outputs=shape
            )
            output = llm.generate(inputs[:1], params, use_tqdm=False)[0].outputs[0]
            notes["structured"] = output.text
            right.append(len(output.text) == 6 and set(output.text) <= set("ab"))
        except (ImportError, ValueError) as error:
            notes["structured"] = f"not run: {error}"
        notes["tokens per step"] = tokens_per_step(llm)
    _demand(right)


def plain_compiled(setting: Setting, notes: Notes) -> None:
    """Plain vLLM as it is served: a step's time, and which graphs there are."""
    began = time.perf_counter()
    with setting.engine(compiled=True) as llm:
        notes["start, s"] = round(time.perf_counter() - began, 1)
        notes.update(graphs_of(llm))
        inputs = prompts(setting)
        generate(llm, inputs, greedy(8))
        for batch in (1, 8):
            tokens, seconds = generate(llm, inputs[:batch], greedy())
            notes[f"step, ms, batch {batch}"] = round(1e3 * seconds / NEW_TOKENS, 3)
        check_texts(setting, notes, "texts", tokens)


def propd_compiled(setting: Setting, notes: Notes) -> None:
    """Trees of a fixed size, compiled, with all of the cache; then pruned ones."""
    right = []
    for name, propd in (("unpruned", FIXED), ("pruned", PRUNED)):
        began = time.perf_counter()
        # Once as it is served: the cache is what is left of the memory.
        whole: dict[str, Any] = {"num_gpu_blocks_override": None} if propd is FIXED else {}
        with setting.engine(propd, compiled=True, **whole) as llm:
            notes[f"start, s, {name}"] = round(time.perf_counter() - began, 1)
            notes.update({f"{key}, {name}": x for key, x in graphs_of(llm).items()})
            inputs = prompts(setting)
            with compiled_kernels(notes, f"kernels compiled while serving, {name}"):
                tokens, _ = generate(llm, inputs, greedy())
            right.append(check_texts(setting, notes, f"batch 8, {name}", tokens))
            for batch in (1, 8):
                tokens, seconds = generate(llm, inputs[:batch], greedy())
                made = sum(map(len, tokens))
                notes[f"tokens/s, batch {batch}, {name}"] = round(made / seconds, 1)
            notes[f"tokens per step, {name}"] = tokens_per_step(llm)
    _demand(right)


@contextmanager
def compiled_kernels(notes: Notes, name: str) -> Iterator[None]:
    """Notes which Triton kernels are compiled meanwhile: after a warm-up, none."""
    from triton import knobs

    found: Counter[str] = Counter()
    before = knobs.runtime.jit_post_compile_hook

    def compiled(**kwargs: Any) -> Any:
        found[getattr(kwargs.get("fn"), "name", "?")] += 1
        return before(**kwargs) if before is not None else None

    knobs.runtime.jit_post_compile_hook = compiled
    try:
        yield
    finally:
        knobs.runtime.jit_post_compile_hook = before
        notes[name] = dict(found) or "none"


def runner_of(llm: Any) -> Any:
    """The engine's model runner, in this process."""
    return llm.collective_rpc(lambda worker: worker.model_runner)[0]


def graphs_of(llm: Any) -> dict[str, Any]:
    """Which CUDA graphs there are, and what memory is taken."""
    import torch

    runner, config = runner_of(llm), llm.llm_engine.vllm_config
    compilation = config.compilation_config
    found: dict[str, Any] = {
        "runner": "V2" if config.use_v2_model_runner else "V1",
        "graphs": str(compilation.cudagraph_mode),
        "sizes captured": len(compilation.cudagraph_capture_sizes or []),
    }
    if (pruned := getattr(runner, "_pruned_forward", None)) is not None:
        found["sizes captured of halves"] = len(pruned.graphs.captured)
    if torch.cuda.is_available():
        found["memory, GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return found


def tokens_per_step(llm: Any) -> float:
    """Put out per sequence and step, since the engine's start."""
    values = {m.name: getattr(m, "value", 0) for m in llm.get_metrics()}
    emitted = values["vllm:propd_emitted_tokens"]
    return round(emitted / max(values["vllm:propd_sequences"], 1), 3)
