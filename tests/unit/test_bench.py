"""Arms, results and report of the benchmark, without an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from bench_rows import measured

from vllm_propd.bench.arms import ARMS, Heads, parse_arm, parse_arms, use_heads
from vllm_propd.bench.report import write_report
from vllm_propd.bench.results import Machine, Results, Row
from vllm_propd.config import parse_config

HEADS = Heads(Path("/heads"), Path("/for_vllm"), 4)


def row(arm: str, batch_size: int, ratio: float) -> Row:
    dynamic: dict[str, Any] = {
        "measured_step_ms": [5.0, 6.0],
        "estimated_step_ms": [5.5, 5.8],
        "tree_sizes": [3.0, 8.5],
        "reliability": [[(0.1, 0.05), (0.9, 0.8)], [(0.2, 0.2), (0.8, 0.6)]],
    }
    return measured(
        arm,
        ratio,
        workload="batch",
        batch_size=batch_size,
        kept_per_step=20.0,
        work_ratio=0.5,
        acceptance_by_depth=[0.5, 0.25],
        step_ms={"forward": 5.0, "rest": 1.0, "step": 6.0},
        identical_to_plain=batch_size,
        prompts=batch_size,
        **(dynamic if arm != "plain" else {}),
    )


def results(**fields: Any) -> Results:
    rows = [row(arm, size, ratio) for size in (4, 1) for arm, ratio in TWO]
    given = {
        "model": "large & small",
        "parameters": 770_000_000,
        "inflated": True,
        "dtype": "bfloat16",
        "prompt_tokens": 32,
        "max_tokens": 64,
        "rounds": 3,
        "temperature": 0.0,
        "machine": Machine(processor="P", cores=2, system="S"),
        "versions": {"vllm": "0.32.0"},
        "rows": rows,
    }
    return Results(**{**given, **fields})


TWO = (("plain", 1.0), ("propd:tree=chain", 1.5))


@pytest.mark.parametrize(
    "name", [name for name in ARMS if "propd" in name] + ["chain", "static"]
)
def test_our_arms_are_valid_configs(name: str) -> None:
    config = parse_arm(name, HEADS).speculative_config
    assert config is not None and config.pop("method") == "propd"
    has_heads = name != "propd-no-heads"
    assert parse_config(config).model == ("/heads" if has_heads else None)


@pytest.mark.parametrize("name", [name for name in ARMS if name != "suffix"])
def test_arms_that_have_no_use_for_heads_are_known(name: str) -> None:
    headless = ("plain", "control", "roomy", "ngram", "propd-no-heads")
    arms = parse_arms(f"plain {name}", HEADS)
    assert use_heads(arms, HEADS) == (name not in headless)


def test_overrides_are_yaml_values() -> None:
    arm = parse_arm("propd:tree=chain,num_speculative_tokens=4", HEADS)
    assert arm.name == "propd:tree=chain,num_speculative_tokens=4"
    assert arm.speculative_config is not None
    assert arm.speculative_config["tree"] == "chain"
    assert arm.speculative_config["num_speculative_tokens"] == 4


def test_peers_get_their_own_heads() -> None:
    plain, medusa = parse_arms("plain medusa", HEADS)
    assert plain.speculative_config is None
    assert medusa.speculative_config is not None
    assert medusa.speculative_config["model"] == "/for_vllm"


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ("plain eagle", f"unknown arm 'eagle'; known are {', '.join(ARMS)}"),
        ("propd", "'plain' must be among them"),
        ("plain propd:tree", "'tree' is not key=value"),
        ("plain:tree=chain", "plain vLLM has no speculative setting"),
    ],
)
def test_bad_arms_are_named(arms: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_arms(arms, HEADS)


def test_results_load_again_and_are_found_by_arm_and_size() -> None:
    found = Results.model_validate_json(results().model_dump_json())
    assert found == results()
    assert found.arms == ["plain", "propd:tree=chain"]
    assert found.batch_sizes == [1, 4]
    again = found.row("propd:tree=chain", 4)
    assert again is not None and again.ratio_to_plain == 1.5
    assert found.row("propd", 4) is None


def test_an_inflated_model_is_said_to_be_one() -> None:
    assert "an inflated small model, not a published one" in results().caption()
    assert "inflated" not in results(inflated=False).caption()


def test_the_report_is_one_page_with_every_row(tmp_path: Path) -> None:
    write_report(results(), tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "large &amp; small" in page
    assert page.count("<tr>") == 1 + len(results().rows)
    assert "data:image/png;base64," in page and "http" not in page
    assert 'alt="reliability of the heads"' in page
    assert (tmp_path / "bench.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("name", "learns"),
    [("plain", False), ("medusa", False), ("static", False), ("propd-no-prune", True)],
)
def test_only_sizes_in_real_time_are_learned(name: str, learns: bool) -> None:
    assert parse_arm(name, HEADS).learns is learns
