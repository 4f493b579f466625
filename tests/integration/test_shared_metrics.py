"""Several API servers: workers count in the folder that vLLM's own collector reads."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import engine, greedy, metric, prompts_of, run
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector
from vllm.v1.engine.utils import _apply_dp_identity_suffix

from vllm_propd.engine.metrics import SHARED, _folder


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
