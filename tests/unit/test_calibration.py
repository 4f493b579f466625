"""``calibration.json``: what is read back, what is refused, what is between the sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vllm_propd.config import ProPDConfig
from vllm_propd.heads.calibration import (
    BINS,
    FILE,
    Calibration,
    calibration_for,
    load_calibration,
)
from vllm_propd.heads.checkpoint import HeadsError

FOUND = Calibration(
    positions=1000,
    rank_accuracy=[[0.5, 0.25, 0.125], [0.25, 0.0, 0.125]],
    early_recall={1: {1: 0.3, 5: 0.6}, 3: {1: 0.4, 5: 0.7}},
    tokens_per_step={1: 1.5, 2: 1.75, 4: 2.0, 128: 3.0},
)


def damaged(folder: Path, change: dict[str, Any]) -> None:
    """A file with some fields replaced, or removed where the new value is None."""
    fields = json.loads(FOUND.model_dump_json()) | change
    kept = {name: value for name, value in fields.items() if value is not None}
    (folder / FILE).write_text(json.dumps(kept))


def test_a_saved_calibration_loads_again(tmp_path: Path) -> None:
    FOUND.save(tmp_path)
    assert load_calibration(tmp_path, 2) == FOUND


def test_no_file_is_no_calibration(tmp_path: Path) -> None:
    assert load_calibration(tmp_path, 2) is None


def test_reliability_is_read_as_three_tables(tmp_path: Path) -> None:
    tables = np.random.default_rng(0).integers(0, 9, (3, 2, BINS)).astype(float)
    FOUND.model_copy(update={"reliability": tables.tolist()}).save(tmp_path)
    found = load_calibration(tmp_path, 2)
    assert found is not None
    np.testing.assert_array_equal(found.sureness(), tables)
    assert FOUND.sureness() is None  # of older trainings


@pytest.mark.parametrize("shape", [(3, 1, BINS), (3, 2, BINS - 1)])
def test_reliability_of_other_heads_or_bins_is_refused(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    damaged(tmp_path, {"reliability": np.ones(shape).tolist()})
    with pytest.raises(HeadsError, match=rf"reliability needs {BINS} bins of every head"):
        load_calibration(tmp_path, 2)


def test_shares_of_the_ranks_add_up() -> None:
    assert FOUND.cumulative(0) == [0.5, 0.75, 0.875]
    assert FOUND.cumulative(1) == [0.25, 0.25, 0.375]


@pytest.mark.parametrize(
    ("nodes", "tokens"), [(1, 1.5), (2, 1.75), (3, 1.875), (4, 2.0), (66, 2.5), (128, 3.0)]
)
def test_tokens_between_measured_sizes_lie_on_a_line(nodes: int, tokens: float) -> None:
    assert FOUND.expected_tokens(nodes) == pytest.approx(tokens)


@pytest.mark.parametrize("nodes", [129, 1000])
def test_larger_trees_than_measured_are_expected_to_gain_nothing(nodes: int) -> None:
    assert FOUND.expected_tokens(nodes) == 3.0


def test_the_order_of_the_sizes_in_the_file_does_not_matter() -> None:
    backwards = dict(reversed(FOUND.tokens_per_step.items()))
    other = FOUND.model_copy(update={"tokens_per_step": backwards})
    assert other.expected_tokens(3) == FOUND.expected_tokens(3)


@pytest.mark.parametrize(
    "content",
    [b"", b'{"positions": 10', b"\xff\xfe", b"[]"],
    ids=["empty", "cut off", "no UTF-8", "a list"],
)
def test_damaged_files_are_named_with_the_remedy(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(HeadsError) as error:
        load_calibration(tmp_path, 2)
    assert str(tmp_path / FILE) in str(error.value)
    assert "remove it, or train the heads again" in str(error.value)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"positions": None}, "Field required"),
        ({"positions": "many"}, "valid integer"),
        ({"rank_accuracy": [0.5, 0.25]}, "valid (list|array)"),
        ({"surprise": 1}, "not permitted"),
        ({"positions": 0}, "positions: .* greater than 0"),
        ({"rank_accuracy": [[0.5], [0.25, 0.1]]}, "as many ranks of every head"),
        ({"tokens_per_step": {}}, "tokens_per_step: .* at least 1"),
    ],
    ids=["missing", "no number", "no ranks", "unknown", "none", "ragged", "no sizes"],
)
def test_wrong_fields_are_refused(tmp_path: Path, change: dict[str, Any], why: str) -> None:
    damaged(tmp_path, change)
    with pytest.raises(HeadsError, match=rf"{FILE}: .*{why}.*; remove it, or train"):
        load_calibration(tmp_path, 2)


@pytest.mark.parametrize("heads", [1, 3])
def test_a_calibration_of_other_heads_is_refused(tmp_path: Path, heads: int) -> None:
    FOUND.save(tmp_path)
    message = f"{FILE}: it describes 2 heads, the folder has {heads}; remove it, or train"
    with pytest.raises(HeadsError, match=message):
        load_calibration(tmp_path, heads)


def test_rank_values_are_logs_that_never_rise() -> None:
    values = FOUND.rank_values(3)
    never_seen = 0.5 / 1000
    shares = [[0.5, 0.25, 0.125], [0.25, never_seen, never_seen]]
    np.testing.assert_allclose(values, np.log(shares), rtol=1e-6)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(FOUND.rank_values(1), values[:, :1])


def test_more_ranks_than_measured_are_refused() -> None:
    with pytest.raises(HeadsError, match=r"num_candidates 4: .* knows 3 ranks; lower"):
        FOUND.rank_values(4)


def test_rank_accuracy_needs_a_calibration_that_suits(tmp_path: Path) -> None:
    by_rank = {"node_values": "rank_accuracy"}
    enough = ProPDConfig(**by_rank, num_candidates=3)
    with pytest.raises(HeadsError, match=f"needs .*{FILE}, .* or use 'head_probability'"):
        calibration_for(enough, tmp_path, 2)
    assert calibration_for(ProPDConfig(), tmp_path, 2) is None
    FOUND.save(tmp_path)
    assert calibration_for(enough, tmp_path, 2) == FOUND
    with pytest.raises(HeadsError, match="num_candidates 4"):
        calibration_for(ProPDConfig(**by_rank, num_candidates=4), tmp_path, 2)
    assert calibration_for(ProPDConfig(num_candidates=4), tmp_path, 2) == FOUND
