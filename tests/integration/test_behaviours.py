"""What vLLM does and ProPD relies on, where no other test would fail without it.

The ledger (``vllm_propd.engine.symbols``) names the test of every such behaviour.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from conftest import MODEL, engine, greedy, metric, mixed_prompts, prompts_of, run
from transformers import AutoModelForCausalLM
from vllm import LLM
from vllm.config import CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import BatchDescriptor, get_forward_context
from vllm.v1.attention.backends import cpu_attn
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.sample.logits_processor.builtin import MinTokensLogitsProcessor

from vllm_propd.engine.pruning.cuda_graphs import in_the_models_place

BLOCK = 32
OPTIONS: dict[str, Any] = {
    "max_num_batched_tokens": 256,
    "enable_prefix_caching": True,
    "block_size": BLOCK,
}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """One engine for all, whose cache would have AMX tiles if vLLM chose."""
    propd = {"pruning": "top_k", "top_k": 6, "early_layer": 1}
    with (
        patch.object(cpu_attn, "_get_attn_isa", lambda *args, **kwargs: "amx"),
        engine(16, propd=propd, **OPTIONS) as llm,
    ):
        yield llm


@pytest.fixture
def runner(llm: LLM) -> Any:
    """The worker's, which is in this process."""
    return llm.collective_rpc(lambda worker: worker.model_runner)[0]


def test_a_step_without_drafts_is_prepared_as_a_plain_one(llm: LLM, runner: Any) -> None:
    prepare, seen = runner._prepare_inputs, set()

    def spy(output: Any, counts: np.ndarray) -> Any:
        prepared = prepare(output, counts)
        seen.add((bool(output.scheduled_spec_decode_tokens), prepared[1] is not None))
        return prepared

    with patch.object(runner, "_prepare_inputs", spy):
        run(llm, prompts_of([20, 31], seed=61), greedy(24))
    assert seen == {(False, False), (True, True)}


def test_drafts_reach_the_model_without_slots_and_at_their_depths(
    llm: LLM, runner: Any
) -> None:
    forward, nodes = runner._model_forward, 0

    def spy(**inputs: Any) -> Any:
        nonlocal nodes
        if (step := runner._prepared.branching) is not None:
            (slots,) = {
                id(s): s for s in get_forward_context().slot_mapping.values()
            }.values()
            assert (slots[step.rows] == -1).tolist() == (~step.is_root).tolist()
            assert inputs["positions"][step.rows].tolist() == step.positions().tolist()
            nodes += int((~step.is_root).sum())
        return forward(**inputs)

    with patch.object(runner, "_model_forward", spy):
        run(llm, mixed_prompts(6, seed=62), greedy(24))
    assert nodes > 100


def test_layers_are_vllms_alone_in_steps_without_trees(llm: LLM, runner: Any) -> None:
    (layer, *_) = runner._attention_layers
    ours, theirs = layer.impl.forward_trees, type(layer.impl).forward
    calls = []

    def spy(self: Any, *args: Any, **more: Any) -> Any:
        calls.append(runner._prepared.branching is not None)
        return theirs(self, *args, **more)

    def spy_on_trees(*args: Any, **more: Any) -> Any:
        assert runner._prepared.branching is not None
        calls.append(None)
        return ours(*args, **more)

    with (
        patch.object(type(layer.impl), "forward", spy),
        patch.object(layer.impl, "forward_trees", spy_on_trees),
    ):
        run(llm, mixed_prompts(6, seed=74), greedy(24))
    assert None in calls and False in calls
    assert "forward" not in vars(layer.impl)


def test_drafts_are_asked_for_when_the_batch_has_the_text(llm: LLM, runner: Any) -> None:
    propose, asked = runner.propose_draft_token_ids, 0

    def spy(output: Any, emitted: list[list[int]], *rest: Any) -> Any:
        nonlocal asked
        batch = runner.input_batch
        for row, tokens in enumerate(emitted):
            end = int(batch.num_tokens_no_spec[row])
            text = runner.requests[batch.req_ids[row]].output_token_ids
            assert text[len(text) - len(tokens) :] == tokens
            assert batch.token_ids_cpu[row, end - len(tokens) : end].tolist() == tokens
            asked += len(tokens)
        return propose(output, emitted, *rest)

    with patch.object(runner, "propose_draft_token_ids", spy):
        run(llm, prompts_of([20, 31, 300], seed=63), greedy(16, ignore_eos=True))
    assert asked >= 3 * 16


def test_prompts_that_go_on_are_marked_before_the_step(llm: LLM, runner: Any) -> None:
    prepare, marked = runner._prepare_inputs, []

    def spy(output: Any, counts: np.ndarray) -> Any:
        prepared = prepare(output, counts)
        marked.append(runner.discard_request_mask.np[: len(counts)].tolist())
        return prepared

    with patch.object(runner, "_prepare_inputs", spy):
        run(llm, prompts_of([600], seed=64), greedy(2))  # in steps of 256 tokens
    assert marked[:4] == [[True], [True], [False], [False]]


def test_processors_see_the_requests_own_lists(llm: LLM, runner: Any) -> None:
    sample, rows = runner._sample, 0

    def spy(*args: Any) -> Any:
        nonlocal rows
        metadata = runner.input_batch.sampling_metadata
        (processor,) = (
            one
            for one in metadata.logitsprocs.non_argmax_invariant
            if isinstance(one, MinTokensLogitsProcessor)
        )
        for row, name in enumerate(runner.input_batch.req_ids):
            own = runner.requests[name].output_token_ids
            assert metadata.output_token_ids[row] is own
            assert processor.min_toks[row][1] is own
            rows += 1
        return sample(*args)

    params = greedy(12, min_tokens=12, presence_penalty=0.5)
    with patch.object(runner, "_sample", spy):
        run(llm, prompts_of([20, 31, 44], seed=65), params)
    assert rows > 3


def test_no_tree_is_kept_of_requests_that_have_ended(llm: LLM, runner: Any) -> None:
    run(llm, mixed_prompts(9, seed=66), greedy(8))
    core = llm.llm_engine
    for name in ("a", "b"):
        core.add_request(name, prompts_of([20], seed=67)[0], greedy(64))
    for _ in range(4):
        core.step()
    assert len(runner._trees) == 2
    core.abort_request(["a", "b"])
    core.add_request("c", prompts_of([20], seed=68)[0], greedy(1))
    while core.has_unfinished_requests():
        core.step()
    assert not runner._trees


def test_an_empty_list_takes_drafts_back(llm: LLM) -> None:
    core = llm.llm_engine
    scheduler = core.engine_core.engine_core.scheduler
    core.add_request("0", prompts_of([30], seed=69)[0], greedy(32, ignore_eos=True))
    while not (scheduler.running and scheduler.running[0].spec_token_ids):
        core.step()
    (request,) = scheduler.running
    for drafts in ([5, 6, 7], [8], []):
        scheduler.update_draft_token_ids(DraftTokenIds([request.request_id], [drafts]))
        assert request.spec_token_ids == drafts
    while core.has_unfinished_requests():
        core.step()


def test_what_was_accepted_is_read_from_the_prefix_cache(llm: LLM) -> None:
    """A text that goes on from one put out goes on as that did."""
    prompts, most, again = prompts_of([40, 75, 100], seed=70), 96, 70
    before = metric(llm, "spec_decode_num_accepted_tokens")
    texts = [
        list(out.token_ids) for out in run(llm, prompts, greedy(most, ignore_eos=True))
    ]
    assert metric(llm, "spec_decode_num_accepted_tokens") > before + 20
    longer = [
        {"prompt_token_ids": prompt["prompt_token_ids"] + text[:again]}
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    before = metric(llm, "prefix_cache_hits")
    found = run(llm, longer, greedy(most - again, ignore_eos=True))
    whole = [(len(one["prompt_token_ids"]) - 1) // BLOCK * BLOCK for one in longer]
    assert metric(llm, "prefix_cache_hits") == before + sum(whole)
    assert [list(out.token_ids) for out in found] == [text[again:] for text in texts]


def test_no_slot_is_no_write(llm: LLM, runner: Any) -> None:
    layer = next(iter(runner.compilation_config.static_forward_context.values()))
    cache = layer.kv_cache
    before, last = cache.clone(), len(cache) - 1
    key, value = torch.ones(2, 3, layer.num_kv_heads, layer.head_size)
    slots = torch.tensor([-1, last * BLOCK + 3, -1])
    layer.impl.do_kv_cache_update(layer, key, value, cache, slots)
    changed = (cache != before).sum(), (cache[last] != before[last]).sum()
    cache.copy_(before)
    assert changed[0] == changed[1] == key[0].numel() + value[0].numel()


def test_the_layout_is_what_our_builder_sets(llm: LLM, runner: Any) -> None:
    layers = runner.compilation_config.static_forward_context.values()
    assert {layer.isa for layer in layers} == {"vec"}
    (prompt,) = prompts_of([60], seed=71)
    (found,) = run(llm, [prompt], greedy(32))
    # Another vLLM engine in this process would end this one.
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    ids = torch.tensor([prompt["prompt_token_ids"]])
    expected = model.generate(ids, max_new_tokens=32, do_sample=False)
    assert list(found.token_ids) == expected[0, 60:].tolist()


def test_a_capture_runs_what_stands_in_the_models_place(runner: Any) -> None:
    """A CPU captures nothing; it is what runs, and in which context, that is seen."""
    size, piecewise, seen = BatchDescriptor(8), CUDAGraphMode.PIECEWISE, []

    def dispatch(num_tokens: int, valid_modes: Any = None, **others: Any) -> Any:
        captured = valid_modes is None or piecewise in valid_modes
        return piecewise if captured else CUDAGraphMode.NONE, BatchDescriptor(num_tokens)

    def model(intermediate_tensors: None, **inputs: Any) -> torch.Tensor:
        context = get_forward_context()
        seen.append((context.cudagraph_runtime_mode, context.batch_descriptor))
        return forward.unpruned(intermediate_tensors, **inputs)

    forward = runner._pruned_forward
    with (
        patch.object(runner.cudagraph_dispatcher, "dispatch", dispatch),
        patch.object(forward.graphs, "_most", 8),
        patch.object(forward.graphs, "captured", set()),
        in_the_models_place(runner, model),
    ):
        runner._warmup_and_capture(size, piecewise, num_warmups=1)
        assert forward.graphs.captured == {size}
    assert seen == [(CUDAGraphMode.NONE, size), (piecewise, size)]


def test_a_halfs_config_has_a_hash_of_its_own(runner: Any) -> None:
    halves = []
    for tag in ("lower", "upper"):
        own = copy.copy(runner.vllm_config)
        own.additional_config = {**own.additional_config, "half": tag}
        halves.append(own.compute_hash())
    assert len({runner.vllm_config.compute_hash(), *halves}) == 3


def test_our_method_keeps_to_the_first_runner_step_by_step() -> None:
    arguments: dict[str, Any] = {"model": str(MODEL), "speculative_config": "propd"}
    vllm_config = EngineArgs(**arguments).create_engine_config()
    assert vllm_config.scheduler_config.async_scheduling is False
    unsupported = vllm_config._get_v2_model_runner_unsupported_features()
    assert unsupported == ["speculative method 'custom_class'"]
    assert vllm_config.use_v2_model_runner is False
    with pytest.raises(ValueError, match="async scheduling is only"):
        EngineArgs(**arguments, async_scheduling=True).create_engine_config()
