"""Settings: defaults are stated, and what makes no sense is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from vllm_propd.config import ProPDConfig, parse_config


def test_defaults_are_lossless() -> None:
    assert parse_config({}).model_dump() == {
        "model": None,
        "num_speculative_tokens": 48,
        "tree": "best_first",
        "num_candidates": 10,
        "acceptance": "exact",
        "typical_epsilon": 0.09,
        "typical_delta": 0.3,
    }


def test_keys_are_taken_over() -> None:
    keys = {
        "model": "/heads",
        "num_speculative_tokens": 5,
        "num_candidates": 3,
        "acceptance": "typical",
        "typical_epsilon": 0.2,
        "typical_delta": 0.5,
    }
    assert parse_config(keys).model_dump(exclude_unset=True) == keys


def test_a_chain_has_one_candidate_per_head() -> None:
    assert parse_config({"tree": "chain"}).ranks == 1
    assert parse_config({"num_candidates": 7}).ranks == 7


@pytest.mark.parametrize("name", ProPDConfig.model_fields)
def test_every_field_is_described(name: str) -> None:
    description = ProPDConfig.model_fields[name].description
    assert description and description.endswith(".")


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        parse_config({}).num_candidates = 3


def test_an_unknown_key_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown key 'topk'") as error:
        parse_config({"topk": 3})
    assert all(name in str(error.value) for name in ["config", *ProPDConfig.model_fields])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_speculative_tokens", 0),
        ("num_speculative_tokens", 256),
        ("num_speculative_tokens", 3.5),
        ("num_speculative_tokens", "many"),
        ("num_candidates", 0),
        ("num_candidates", 65),
        ("tree", "bush"),
        ("acceptance", "wrong"),
        ("typical_epsilon", 0),
        ("typical_epsilon", 1),
        ("typical_delta", 0),
        ("typical_delta", float("nan")),
        ("model", 3),
    ],
)
def test_impossible_values_are_refused_by_name(key: str, value: Any) -> None:
    typical = {"acceptance": "typical"} if key.startswith("typical") else {}
    with pytest.raises(ValueError, match=f"'propd': {key}: "):
        parse_config({**typical, key: value})


@pytest.mark.parametrize(
    "keys",
    [
        {"typical_epsilon": 0.2},
        {"acceptance": "exact", "typical_delta": 0.2},
        {"tree": "chain", "num_candidates": 3},
    ],
)
def test_contradictions_are_refused_with_the_way_out(keys: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"{[*keys][-1]} has no effect .*: remove it"):
        parse_config(keys)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ValueError, match=r"num_candidates: .*; unknown key 'x'"):
        parse_config({"num_candidates": 0, "x": 1})


def test_given_keys_win_over_the_preset(tmp_path: Path) -> None:
    preset = tmp_path / "preset.yaml"
    preset.write_text("method: propd\nnum_candidates: 4\nnum_speculative_tokens: 16\n")
    keys = {"config": str(preset), "num_speculative_tokens": 8}
    config = parse_config(keys)
    assert (config.num_candidates, config.num_speculative_tokens) == (4, 8)
    assert keys == {"config": str(preset), "num_speculative_tokens": 8}


def test_preset_keys_are_checked(tmp_path: Path) -> None:
    preset = tmp_path / "preset.yaml"
    preset.write_text("num_candidate: 4\n")
    with pytest.raises(ValueError, match="unknown key 'num_candidate'"):
        parse_config({"config": str(preset)})


def test_a_missing_preset_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "missing.yaml"
    with pytest.raises(ValueError, match=f"no file {missing}"):
        parse_config({"config": str(missing)})


@pytest.mark.parametrize("text", ["- tree\n- chain\n", "chain\n", ""])
def test_a_preset_that_is_no_table_is_refused(tmp_path: Path, text: str) -> None:
    preset = tmp_path / "preset.yaml"
    preset.write_text(text)
    with pytest.raises(ValueError, match="not a table"):
        parse_config({"config": str(preset)})
