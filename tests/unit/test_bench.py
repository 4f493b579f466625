"""Arms, results and report of the benchmark, without an engine."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from bench_rows import measured
from matplotlib.figure import Figure

from vllm_propd.bench import plots
from vllm_propd.bench.arms import (
    ARMS,
    Heads,
    most_nodes,
    parse_arm,
    parse_arms,
    use_export,
    use_heads,
)
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
    arms = parse_arms("plain" if name == "plain" else f"plain {name}", HEADS)
    assert use_heads(arms, HEADS) == (name not in headless)


@pytest.mark.parametrize(
    ("arms", "needed"),
    [
        ("plain propd propd-no-heads ngram", False),
        ("plain propd medusa", True),
        ("plain propd medusa:model=/others", False),
    ],
)
def test_only_vllms_own_method_reads_the_export(arms: str, needed: bool) -> None:
    assert use_export(parse_arms(arms, HEADS), HEADS) is needed


@pytest.mark.parametrize(
    ("arms", "nodes"),
    [
        ("plain ngram", 48),
        ("plain propd:num_speculative_tokens=96", 96),
        ("plain propd:config={preset}", 64),
        ("plain propd:config={preset},num_speculative_tokens=80", 80),
        ("plain medusa:num_speculative_tokens=80", 80),
    ],
)
def test_the_largest_tree_may_be_a_presets(tmp_path: Path, arms: str, nodes: int) -> None:
    (preset := tmp_path / "wide.yaml").write_text("num_speculative_tokens: 64\n")
    assert most_nodes(parse_arms(arms.format(preset=preset), HEADS)) == nodes


def test_wrong_settings_name_their_arm() -> None:
    with pytest.raises(ValueError, match=r"arm 'propd:depth=3': .*unknown key 'depth'"):
        most_nodes(parse_arms("plain propd:depth=3", HEADS))


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
        (
            "plain propd:top_k=[",
            r"--arms propd:top_k=\[: 'top_k=\[' is not key=value in YAML",
        ),
        ("plain propd:top_k=2024-99-01", r"'top_k=2024-99-01' is not key=value in YAML"),
        ("plain propd chain propd", "--arms: propd more than once: name each once"),
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


def title_of(draw: Any, found: Results, monkeypatch: pytest.MonkeyPatch) -> str:
    """The title of a picture's first axes."""
    titles = []

    def kept(figure: Figure, *args: Any, **keys: Any) -> None:
        titles.append(figure.axes[0].get_title())

    monkeypatch.setattr(Figure, "savefig", kept)
    draw(found, Path("nowhere.png"))
    (title,) = titles
    return title


def test_names_with_dollar_signs_are_no_formulas() -> None:
    """What stands between two of them would be read as one, and this is none."""
    bad = r"$\no$"
    rows = [
        row(arm, 1, ratio).model_copy(
            update={
                "workload": workload,
                "accepted_by_rank": [[0.5]],
                "tokens_by_size": [1.0],
            }
        )
        for workload in ("batch", f"task {bad}")
        for arm, ratio in (("plain", 1.0), (f"propd:model={bad}", 1.5))
    ]
    found = results(rows=rows)
    draws = (plots.speed, plots.parts, plots.steps, plots.trees, plots.workloads)
    for draw in (*draws, plots.reliability):
        draw(found, picture := BytesIO())
        assert picture.getvalue().startswith(b"\x89PNG")


def test_a_steps_parts_are_said_to_be_means(monkeypatch: pytest.MonkeyPatch) -> None:
    title = title_of(plots.parts, results(), monkeypatch)
    assert title == "a step's time by part, means"


def test_the_picture_of_tasks_says_of_which_batch_size_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def task(name: str, *sizes: int) -> list[Row]:
        rows = [row(arm, size, ratio) for size in sizes for arm, ratio in TWO]
        return [one.model_copy(update={"workload": name}) for one in rows]

    both = task("task qa", 1, 4) + task("task rag", 1, 4)
    title = title_of(plots.workloads, results(rows=both), monkeypatch)
    assert title.endswith("by workload, batch 1")
    title = title_of(plots.workloads, results(rows=both + task("trace", 8)), monkeypatch)
    assert title.endswith("by workload, batch 1 (trace: 8)")


@pytest.mark.parametrize(
    ("name", "learns"),
    [("plain", False), ("medusa", False), ("static", False), ("propd-no-prune", True)],
)
def test_only_sizes_in_real_time_are_learned(name: str, learns: bool) -> None:
    assert parse_arm(name, HEADS).learns is learns
