"""Several API servers: workers count in the folder that vLLM's own collector reads."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import engine, greedy, metric, prompts_of, run
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector
from vllm.v1.engine.utils import _apply_dp_identity_suffix

from vllm_propd.core.sizing.protocol import StepRecord
from vllm_propd.engine import metrics
from vllm_propd.engine.integration import config_patch
from vllm_propd.engine.integration.config_patch import PROPOSER
from vllm_propd.engine.metrics import SHARED, StepMetrics, _folder, read_totals


def test_ranks_count_in_one_folder() -> None:
    config = SimpleNamespace(instance_id="1a2b3", kv_transfer_config=None)
    front_end = _folder(config)
    _apply_dp_identity_suffix(config, 1)
    assert config.instance_id != "1a2b3"
    assert _folder(config) == front_end


def test_what_workers_count_is_in_the_shared_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SHARED, str(tmp_path))
    with engine(8) as llm:
        run(llm, prompts_of([20, 30], seed=4), greedy(16, ignore_eos=True))
        # Not twice, where this process shows its own registry.
        assert metric(llm, "propd_steps") == 0
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(tmp_path))
    found = {one.name: one.samples[0] for one in registry.collect()}
    emitted = found["vllm:propd_emitted_tokens"]
    assert emitted.value >= 32 and emitted.labels["engine"] == "0"
    assert found["vllm:propd_tree_size"].value >= 0


@pytest.fixture
def two_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The front end's config of two data-parallel engines, which have counted steps."""
    monkeypatch.setenv(SHARED, str(tmp_path))
    monkeypatch.setattr(metrics, "get_tensor_model_parallel_rank", lambda: 0)

    def config(number: int) -> Any:
        return SimpleNamespace(
            model_config=SimpleNamespace(served_model_name="model"),
            parallel_config=SimpleNamespace(data_parallel_index=number),
            speculative_config=SimpleNamespace(model=PROPOSER),
        )

    for number, tokens in enumerate((30, 500)):
        # In workers of their own, whose files are named by their ids.
        monkeypatch.setattr(metrics.os, "getpid", lambda number=number: 9000 + number)
        StepMetrics(config(number)).count(StepRecord(1, 7, 6, 6, tokens))
    return config(0)


def test_engines_totals_are_told_apart(two_engines: Any) -> None:
    totals = [read_totals(two_engines, some) for some in ([0], [1], [0, 1])]
    assert [one["emitted_tokens"] for one in totals] == [30, 500, 530]


def test_each_engines_log_line_is_its_own(
    two_engines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(config_patch.logger, "info", lines.append)

    class Logger:
        """As much of vLLM's as is read; the last one is of all engines together."""

        def __init__(self, number: int, *engines: int):
            self.vllm_config, self.engine_index = two_engines, number
            self.spec_decoding_logging = SimpleNamespace(accepted_tokens_per_pos_lists=[])
            if engines:
                self.engine_indexes = list(engines)

    log = config_patch._log_too(lambda self: None)
    for one in (Logger(0), Logger(1), Logger(-1, 0, 1)):
        log(one)
    said = [line.partition("Tokens per step: ")[2].partition(" ")[0] for line in lines]
    assert said == ["30.00", "500.00", "265.00"]
