"""What a batch job asks of its engines, and what it refuses."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from vllm_propd.batch import hosts
from vllm_propd.batch.settings import BatchJob
from vllm_propd.config import REQUEST_METRICS
from vllm_propd.resume import changes


def job(**fields: Any) -> BatchJob:
    return BatchJob(model="m", prompts=[Path("p.jsonl")], out=Path("out"), **fields)


def test_engines_draft_by_propd_and_tell_each_rows_acceptance() -> None:
    found = job(engine_kwargs={"max_model_len": 512}).engine()
    assert found["speculative_config"] == "propd"
    assert found["per_request_spec_decode_metrics"] == "summary"
    assert (found["max_model_len"], found["distributed_executor_backend"]) == (512, "uni")
    assert job(tensor_parallel_size=2).engine()["distributed_executor_backend"] == "mp"


def test_plain_engines_have_nothing_of_drafts() -> None:
    found = job(speculative_config=None).engine()
    assert not any("spec" in name for name in found)


def test_engines_of_one_host_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "_cores", lambda nodes: [os.cpu_count() or 1])
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(nodes=list))
    alone = job().engine_env(on_cpu=True)
    assert alone[REQUEST_METRICS] == "1" and not any("OMP" in name for name in alone)
    assert job(engines=2).engine_env(on_cpu=False) == alone
    env = job(engines=2).engine_env(on_cpu=True)
    assert env["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert int(env["OMP_NUM_THREADS"]) == max(1, (os.cpu_count() or 1) // 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"engine_kwargs": {"speculative_config": "propd"}}, "use --speculative-config"),
        ({"engine_kwargs": {"model": "m"}}, "first argument"),
        ({"sampling": {"best_of": 2}}, "--sampling has best_of"),
        (
            {"sampling": {"max_tokens": 2.5}},
            "--sampling: max_tokens: 2.5 is no whole number",
        ),
        ({"sampling": {"stop": "\ud83d"}}, "--sampling: it has '.ud83d', half of a"),
        ({"engines": 0}, "engines"),
        ({"format": "xml"}, "format"),
    ],
)
def test_settings_that_cannot_be_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        job(**fields)


def test_a_job_is_the_same_however_its_paths_are_spelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "p.jsonl").write_text('{"text": "a"}\n')
    monkeypatch.chdir(tmp_path)
    other = BatchJob(
        model=str(tmp_path / "m"), prompts=[tmp_path / "p.jsonl"], out=Path("out")
    )
    before = job().decides()
    assert before == other.decides()
    (tmp_path / "p.jsonl").write_text('{"text": "b"}\n')
    assert changes(before, job().decides()).startswith("their contents ")
    (tmp_path / "p.jsonl").unlink()
    with pytest.raises(ValueError, match=r"p\.jsonl cannot be read"):
        job().decides()


def test_a_jobs_sampling_is_typed_as_a_rows() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    asked = {"max_tokens": 256.0, "stop": "x", "structured_outputs": {"json": schema}}
    found = job(sampling=asked).sampling
    assert type(found["max_tokens"]) is int and found["stop"] == ["x"]
    assert json.loads(found["structured_outputs"]["json"]) == schema


def test_hub_names_are_no_paths() -> None:
    assert BatchJob(model="org/m", prompts=[Path("p")], out=Path("out")).target == "org/m"


def test_rows_are_read_with_the_engines_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert job().tokenizer == ("m", None, False)
    assert "tokenizer" not in job().engine()
    given = {"revision": "r", "trust_remote_code": True}
    assert job(engine_kwargs=given).tokenizer == ("m", "r", True)
    other = {**given, "tokenizer": "org/t", "tokenizer_revision": "q"}
    assert job(engine_kwargs=other).tokenizer == ("org/t", "q", True)
    # A folder is the same one in Ray's workers, for the engine, too.
    (tmp_path / "t").mkdir()
    monkeypatch.chdir(tmp_path)
    near = job(engine_kwargs={"tokenizer": "t"})
    assert near.tokenizer.name == near.engine()["tokenizer"] == str(tmp_path / "t")
