"""What vLLM makes of the number of drafts, where others have 3 in a chain and we 48 nodes.

Thinking budgets, padded joins and small steps have files of their own.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator
from typing import Any

import pytest
import torch
from conftest import ENGINE, MODEL, Ties, engine, greedy, metric, prompts_of, run
from prices import pay_always
from transformers import AutoTokenizer
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.engine.protocol import StreamingInput
from vllm.model_executor.layers.attention.chunked_local_attention import (
    create_chunked_local_attention_backend,
)
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.spec_decode.metrics import SpecDecodingLogging, SpecDecodingStats

from vllm_propd.engine.attention.cpu import (
    TreeAttentionBackend,
    TreeAttentionMetadataBuilder,
)
from vllm_propd.engine.attention.tree_split import refuse_other_builders
from vllm_propd.engine.metrics import cut_depths


def runner_of(llm: LLM) -> Any:
    """The worker's; tests' engines run in this process."""
    return llm.collective_rpc(lambda worker: worker.model_runner)[0]


def records_of(llm: LLM, prompts: Any, params: Any) -> list[dict[str, Any]]:
    llm.collective_rpc("start_sizing_records")
    run(llm, prompts, params)
    found: list[dict[str, Any]] = llm.collective_rpc("take_sizing_records")[0]
    return found


def test_trees_share_the_tokens_that_a_step_may_schedule(ties: Ties) -> None:
    """Fewer than fit (max_num_batched_tokens): no request waits behind another's tree."""
    prompts = prompts_of([20 + i for i in range(10)], seed=21)
    with engine() as llm:
        expected = run(llm, prompts, greedy(48, logprobs=2))
    with engine(48, max_num_batched_tokens=512, max_num_scheduled_tokens=64) as llm:
        llm.collective_rpc("start_sizing_records")
        ties.check(expected, run(llm, prompts, greedy(48)))
        records = llm.collective_rpc("take_sizing_records")[0]
    drafted = [record for record in records if record["nodes"]]
    assert max(record["sequences"] for record in drafted) == len(prompts)
    assert max(record["tokens"] for record in drafted) <= 64


def test_no_tree_is_cut_at_the_threshold_of_long_prefills() -> None:
    prompts = prompts_of([20, 30, 25], seed=22)
    with engine(48, long_prefill_token_threshold=9) as llm:
        records = records_of(llm, prompts, greedy(32, ignore_eos=True))
    assert max(record["nodes"] / max(record["sequences"], 1) for record in records) == 8


@pytest.mark.parametrize("max_tokens", [1, 2])
def test_nothing_is_drafted_for_whom_it_could_not_help(max_tokens: int) -> None:
    prompts = prompts_of([20, 33], seed=23)
    with engine(24) as llm:
        asked: list[int] = []
        drafter = runner_of(llm).drafter
        before = drafter.candidates

        def counted(states: torch.Tensor, *given: Any) -> Any:
            asked.append(len(states))
            return before(states, *given)

        drafter.candidates = counted
        run(llm, prompts, greedy(max_tokens))
        assert not asked
        run(llm, prompts, greedy(max_tokens + 2, ignore_eos=True))
        assert asked and metric(llm, "spec_decode_num_drafts") > 0


@pytest.mark.parametrize("logprobs", [None, 2], ids=["all rows at once", "walk"])
def test_tokens_behind_the_end_are_not_counted(logprobs: int | None) -> None:
    """A text that repeats itself is drafted, and accepted, far beyond its end."""
    (prompt,) = prompts_of([24], seed=27)
    again = {"prompt_token_ids": 12 * prompt["prompt_token_ids"]}
    propd = {"heads": False, "recycling": False, "sizing": "dynamic"}
    with engine(24, propd=propd) as llm:
        pay_always(llm)
        params = greedy(40, ignore_eos=True, logprobs=logprobs)
        (whole,) = run(llm, [again], params)
        text, before = list(whole.token_ids), metric(llm, "propd_emitted_tokens")
        assert before == len(text) == 40
        assert metric(llm, "spec_decode_num_accepted_tokens") > 10
        stop = next(t for t in text[1:] if t != text[0])
        ends = [{"max_tokens": 3}, {"max_tokens": 40, "stop_token_ids": [stop]}]
        for end in ends:
            params = greedy(**end, ignore_eos=True, logprobs=logprobs)
            (cut,) = run(llm, [again], params)
            now = metric(llm, "propd_emitted_tokens")
            assert now - before == len(cut.token_ids) < 40
            before = now


def test_who_goes_on_is_known_as_the_batch_changes() -> None:
    """By the rule itself, request by request; what is read of a batch is remembered."""
    prompts = prompts_of([20, 33, 25, 40, 22, 31, 27, 29], seed=24)
    with engine(24, max_num_seqs=4, max_num_batched_tokens=64) as llm:
        plain = run(llm, prompts, greedy(40, ignore_eos=True))
        common = Counter(t for one in plain for t in one.token_ids)
        stops = [token for token, _ in common.most_common(9)][3:]
        params = [
            greedy(n, ignore_eos=n % 2 == 0, stop_token_ids=stops[: n % 5])
            for n in range(33, 41)
        ]
        runner = runner_of(llm)
        going_on, stopped = runner.ends.going_on, 0

        def checked(batch: Any, requests: Any) -> Any:
            nonlocal stopped
            found, expected = going_on(batch, requests), []
            for row, one in enumerate(batch.req_ids):
                request = requests[one]
                asked, outputs = request.sampling_params, request.output_token_ids
                ends = {asked.eos_token_id, *(asked.stop_token_ids or ())}
                more = len(outputs) + 1 < asked.max_tokens
                known = int(batch.num_tokens_no_spec[row])
                over = int(batch.token_ids_cpu[row, known - 1]) in ends
                stopped += over
                if more and not over:
                    expected.append(row)
            assert found.tolist() == expected
            return found

        runner.ends.going_on = checked
        llm.generate(prompts, params, use_tqdm=False)
    assert stopped


def test_forbidden_tokens_are_forbidden_with_typical_acceptance_too() -> None:
    prompts = prompts_of([40 + i for i in range(6)], seed=24)
    allowed = list(range(1, 400))
    params = SamplingParams(
        temperature=1.0, seed=3, max_tokens=48, allowed_token_ids=allowed
    )
    with engine(24, propd={"acceptance": "typical"}) as llm:
        found = run(llm, prompts, params)
    assert {token for one in found for token in one.token_ids} <= {*allowed}


def test_nan_logits_are_told_of_the_request_that_has_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_COMPUTE_NANS_IN_LOGITS", "1")
    found: list[dict[str, int]] = []
    with engine(12) as llm:
        runner = runner_of(llm)
        verify, count = runner._verify, runner._get_nans_in_logits

        def broken(logits: torch.Tensor, step: Any, root_row: Any) -> Any:
            output = verify(logits, step, root_row)
            if len(logits) > 3:  # with trees
                logits[root_row[1], 7] = torch.nan
            return output

        def counted(logits: torch.Tensor) -> dict[str, int]:
            found.append(count(logits))
            return found[-1]

        runner._verify, runner._get_nans_in_logits = broken, counted
        run(llm, prompts_of([20, 30, 40], seed=25), greedy(16, ignore_eos=True))
    told = [list(one.values()) for one in found if any(one.values())]
    assert len(told) > 3
    # Of requests that have not ended, the second.
    assert all(one == [0, 1, 0][: len(one)] for one in told)


def test_the_log_tells_of_depths_not_of_nodes() -> None:
    logging, lines = SpecDecodingLogging(), []
    for accepted in (0, 3, 1):
        stats = SpecDecodingStats.new(48)
        stats.observe_draft(num_draft_tokens=48, num_accepted_tokens=accepted)
        logging.observe(stats)
    cut_depths(logging)
    logging.log(log_fn=lambda text, *values: lines.append(text % values))
    assert "Per-position acceptance rate: 0.667, 0.333, 0.333, Avg" in lines[0]
    assert "Mean acceptance length: 2.33" in lines[0]


def test_layers_whose_metadata_others_build_are_refused() -> None:
    derived = create_chunked_local_attention_backend(TreeAttentionBackend, 128)
    builder = derived.get_builder_cls()
    assert issubclass(builder, TreeAttentionMetadataBuilder)
    refuse_other_builders([object.__new__(TreeAttentionMetadataBuilder)])
    with pytest.raises(ValueError, match=r"ChunkedLocal.*without --speculative-config"):
        refuse_other_builders([object.__new__(builder)])


async def session(
    config: Any, turns: list[list[int]], stop: list[int], temperature: float
) -> list[list[int]]:
    """What each turn of a streaming-input session puts out."""
    llm = AsyncLLM.from_engine_args(
        AsyncEngineArgs(**ENGINE, speculative_config=config, max_num_batched_tokens=2048)
    )
    params = SamplingParams(
        temperature=temperature,
        seed=7,
        max_tokens=40,
        stop_token_ids=stop,
        output_kind=RequestOutputKind.DELTA,
    )
    found: list[list[int]] = [[]]
    ended = asyncio.Event()

    async def inputs() -> AsyncGenerator[StreamingInput, None]:
        for ids in turns:
            ended.clear()
            prompt = {"prompt_token_ids": list(ids)}  # which vLLM makes longer
            yield StreamingInput(prompt=prompt, sampling_params=params)
            await ended.wait()

    try:
        async for output in llm.generate(inputs(), params, "session"):
            found[-1] += output.outputs[0].token_ids
            if found[-1] and (found[-1][-1] in stop or len(found[-1]) == 40):
                found.append([])
                ended.set()
    finally:
        llm.shutdown()
    return found


@pytest.mark.alone
@pytest.mark.parametrize("temperature", [0.0, 0.4])
def test_a_sessions_turn_goes_on_from_where_the_last_one_stopped(
    temperature: float,
) -> None:
    """A seeded session draws the numbers that it would draw without drafts, too."""
    turns = [p["prompt_token_ids"] for p in prompts_of([60, 9, 2, 12, 1, 7], seed=26)]
    # What the text repeats is drafted deep: turns stop inside accepted paths.
    turns[0] = turns[0] * 3
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    stop = [i for i in range(len(tokenizer)) if "\n" in tokenizer.decode([i])]
    expected = asyncio.run(session(None, turns, stop, temperature))
    assert sum(len(turn) > 2 and turn[-1] in stop for turn in expected) > 2
    config = {"method": "propd", "sizing": "fixed", "num_speculative_tokens": 16}
    assert asyncio.run(session(config, turns, stop, temperature)) == expected
