"""ProPD without heads: on any model, what the text itself suggests, and plain's text."""

from __future__ import annotations

import logging
import shutil
from typing import Any

import pytest
from conftest import MODEL, Ties, engine, greedy, metric, mixed_prompts, prompts_of, run
from prices import pay_always
from vllm.engine.arg_utils import EngineArgs

from vllm_propd.engine.integration.config_patch import find_config

NODES = 48


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The demo's model without its heads."""
    folder = tmp_path_factory.mktemp("model") / "bare"
    shutil.copytree(MODEL, folder, ignore=shutil.ignore_patterns("propd"))
    return str(folder)


def texts(llm: Any, seed: int) -> list[Any]:
    """Of mixed prompts, and of one that repeats itself."""
    (prompt,) = prompts_of([40], seed=seed)
    repeated = {"prompt_token_ids": prompt["prompt_token_ids"] * 6}
    return run(llm, [*mixed_prompts(12, seed=seed), repeated], greedy(48, logprobs=2))


def test_the_word_propd_is_enough(bare: str, ties: Ties) -> None:
    with engine(model=bare) as llm:
        expected = texts(llm, 71)
    with engine(model=bare, speculative_config="propd") as llm:
        pay_always(llm)
        ours = texts(llm, 71)
        assert metric(llm, "spec_decode_num_accepted_tokens") > 20
        runner = llm.collective_rpc(lambda worker: worker.model_runner)[0]
        assert not runner.propd.heads and not runner.sizing.has_heads
    ties.check(expected, ours)


def test_heads_that_are_there_may_be_left_alone(ties: Ties) -> None:
    with engine() as llm:
        expected = texts(llm, 72)
    propd = {"heads": False, "sizing": "dynamic"}
    with engine(NODES, propd=propd) as llm:
        pay_always(llm)
        llm.collective_rpc("start_sizing_records")
        ours = texts(llm, 72)
        records = llm.collective_rpc("take_sizing_records")[0]
    ties.check(expected, ours)
    assert sum(record["nodes"] for record in records) > 0
    assert not any(record["heads_s"] for record in records)


def test_an_engine_with_heads_does_without_and_with_again() -> None:
    """As the benchmark's arms do, one after the other."""
    with engine(NODES, propd={"sizing": "dynamic"}) as llm:
        runner = llm.collective_rpc(lambda worker: worker.model_runner)[0]
        for keys, has in (({"heads": False}, False), ({}, True)):
            config = find_config(keys, str(MODEL))
            sent = config.model_dump_json(exclude_unset=True)
            llm.collective_rpc("use_settings", args=(sent,))
            assert runner.sizing.has_heads is has
            texts(llm, 73)


def test_it_is_told_once_how_to_train_heads(
    bare: str, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("vllm").propagate = True
    try:
        args = EngineArgs(model=bare, speculative_config={"method": "propd"})
        args.create_engine_config()
    finally:
        logging.getLogger("vllm").propagate = False
    # A record may come by more than one way.
    told = {
        id(r): r.getMessage()
        for r in caplog.records
        if "drafts without heads" in r.getMessage()
    }
    assert len(told) == 1
    assert f"vllm-propd train {bare} --self-distill" in next(iter(told.values()))


@pytest.mark.parametrize(
    "keys",
    [
        {"sizing": "fixed"},
        {"lookup": False, "recycling": False},
        {"tree": "chain"},
        {"pruning": "top_k"},
    ],
    ids=str,
)
def test_what_needs_heads_is_refused_without(bare: str, keys: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"no heads for .*vllm-propd train"):
        find_config(keys, bare)
