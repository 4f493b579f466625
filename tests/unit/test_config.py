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
        "heads": True,
        "num_speculative_tokens": 48,
        "sizing": "dynamic",
        "tree": "best_first",
        "num_candidates": 10,
        "node_values": "head_probability",
        "lookup": True,
        "recycling": "auto",
        "pruning": "auto",
        "early_layer": None,
        "top_k": 20,
        "keep_nodes": 16,
        "draft_weight": 1.0,
        "acceptance": "exact",
        "typical_epsilon": 0.09,
        "typical_delta": 0.3,
    }


def test_keys_are_taken_over() -> None:
    keys = {
        "model": "/heads",
        "num_speculative_tokens": 5,
        "num_candidates": 3,
        "pruning": "top_k",
        "early_layer": 4,
        "top_k": 7,
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


@pytest.mark.parametrize("other", [{"sizing": "fixed"}, {"tree": "chain"}])
def test_nothing_is_looked_up_beside_chains_and_fixed_sizes(other: dict[str, str]) -> None:
    for key, has in (("lookup", "looks_up"), ("recycling", "recycles")):
        assert getattr(parse_config({key: True}), has)
        assert not getattr(parse_config({key: False}), has)
        assert not getattr(parse_config(other), has)
        assert not getattr(parse_config({**other, key: False}), has)
        with pytest.raises(ValueError, match=rf"{key} has no effect .* set sizing to 'dy"):
            parse_config({**other, key: True})


def test_recycling_is_for_drafts_without_heads_unless_it_is_asked_for() -> None:
    for heads in (True, False):
        assert parse_config({"heads": heads}).recycles is not heads
        assert parse_config({"heads": heads, "recycling": True}).recycles
        assert not parse_config({"heads": heads, "recycling": False}).recycles
    assert parse_config({}).without_heads().recycles
    assert not parse_config({"recycling": "auto", "sizing": "fixed"}).recycles


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
        ("num_speculative_tokens", "5"),
        ("num_speculative_tokens", True),
        ("num_candidates", 0),
        ("num_candidates", 65),
        ("tree", "bush"),
        ("sizing", "large"),
        ("pruning", "wrong"),
        ("pruning", True),
        ("early_layer", 0),
        ("early_layer", "4"),
        ("top_k", 0),
        ("top_k", 2.5),
        ("keep_nodes", 0),
        ("keep_nodes", 256),
        ("draft_weight", -0.5),
        ("acceptance", "wrong"),
        ("typical_epsilon", 0),
        ("typical_epsilon", 1),
        ("typical_delta", 0),
        ("typical_delta", float("nan")),
        ("typical_delta", float("inf")),
        ("typical_delta", True),
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
        {"top_k": 5},
        {"pruning": "off", "top_k": 5},
        {"pruning": "path_probability", "top_k": 5},
        {"keep_nodes": 5},
        {"pruning": "off", "keep_nodes": 5},
        {"pruning": "top_k", "keep_nodes": 5},
        {"pruning": "top_k", "draft_weight": 0.5},
        {"sizing": "fixed", "early_layer": 5},
        {"sizing": "fixed", "draft_weight": 0.5},
        {"pruning": "off", "early_layer": 5},
        {"pruning": "off", "draft_weight": 0.5},
    ],
    ids=str,
)
def test_contradictions_are_refused_with_the_way_out(keys: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"{[*keys][-1]} has no effect .*: remove "):
        parse_config(keys)


@pytest.mark.parametrize("rule", ["top_k", "path_probability"])
def test_every_rule_of_pruning_has_an_early_layer(rule: str) -> None:
    keys = {"pruning": rule, "early_layer": 3}
    assert parse_config(keys).model_dump(exclude_unset=True) == keys
    assert parse_config({"pruning": rule}).early_layer is None


def test_pruning_is_planned_with_dynamic_sizes_only() -> None:
    assert parse_config({"early_layer": 2}).plans_pruning
    fixed = parse_config({"sizing": "fixed"})
    assert not fixed.plans_pruning and not fixed.prunes
    ruled = parse_config({"pruning": "top_k"})
    assert ruled.prunes and not ruled.plans_pruning
    assert not parse_config({"pruning": "off"}).prunes


def test_without_pruning_the_other_settings_stay() -> None:
    keys = {"early_layer": 2, "draft_weight": 0.5, "num_candidates": 4}
    left = parse_config(keys).without_pruning()
    assert left.model_dump(exclude_unset=True) == {"num_candidates": 4, "pruning": "off"}


def test_a_float_may_be_written_as_an_integer() -> None:
    assert parse_config({"acceptance": "typical", "typical_delta": 1}).typical_delta == 1


def test_settings_survive_the_way_to_the_workers() -> None:
    config = parse_config({"model": "/heads", "acceptance": "typical", "typical_delta": 1})
    sent = config.model_dump_json(exclude_unset=True)
    assert ProPDConfig.model_validate_json(sent) == config


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ValueError, match=r"num_candidates: .*; unknown key 'x'"):
        parse_config({"num_candidates": 0, "x": 1})


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    """Where a test writes its preset."""
    return tmp_path / "preset.yaml"


def test_given_keys_win_over_the_preset(preset: Path) -> None:
    preset.write_text("method: propd\nnum_candidates: 4\nnum_speculative_tokens: 16\n")
    keys = {"config": str(preset), "num_speculative_tokens": 8}
    config = parse_config(keys)
    assert (config.num_candidates, config.num_speculative_tokens) == (4, 8)
    assert keys == {"config": str(preset), "num_speculative_tokens": 8}


def test_preset_keys_that_given_keys_leave_without_effect_are_dropped(
    preset: Path,
) -> None:
    preset.write_text("num_candidates: 4\nacceptance: typical\ntypical_delta: 0.5\n")
    given = {"tree": "chain", "acceptance": "exact"}
    assert parse_config({"config": str(preset), **given}) == parse_config(given)
    same = {"tree": "best_first"}  # contradicts nothing, so nothing is dropped
    config = parse_config({"config": str(preset), **same})
    assert (config.num_candidates, config.typical_delta) == (4, 0.5)


@pytest.mark.parametrize(
    ("text", "pruning"),
    [
        ("pruning: top_k\ntop_k: 4\nearly_layer: 2\n", "off"),
        ("pruning: path_probability\nkeep_nodes: 4\nearly_layer: 2\n", "off"),
        ("pruning: top_k\ntop_k: 4\n", "path_probability"),
        ("pruning: path_probability\nkeep_nodes: 4\n", "top_k"),
    ],
)
def test_another_rule_of_pruning_drops_the_presets_settings(
    preset: Path, text: str, pruning: str
) -> None:
    preset.write_text(text)
    given = {"pruning": pruning}
    assert parse_config({"config": str(preset), **given}) == parse_config(given)


def test_another_rule_of_pruning_keeps_the_presets_early_layer(preset: Path) -> None:
    preset.write_text("pruning: top_k\nearly_layer: 2\n")
    config = parse_config({"config": str(preset), "pruning": "path_probability"})
    assert config.early_layer == 2


@pytest.mark.parametrize(
    ("text", "given"),
    [
        ("tree: chain\n", {"num_candidates": 4}),
        ("tree: chain\nnum_candidates: 4\n", {}),
        ("num_candidates: 4\n", {"tree": "chain", "num_candidates": 4}),
    ],
    ids=["a preset's setting", "within a preset", "among given keys"],
)
def test_other_contradictions_beside_a_preset_are_errors(
    preset: Path, text: str, given: dict[str, Any]
) -> None:
    preset.write_text(text)
    with pytest.raises(ValueError, match="num_candidates has no effect with tree 'chain'"):
        parse_config({"config": str(preset), **given})


def test_preset_keys_are_checked(preset: Path) -> None:
    preset.write_text("num_candidate: 4\n")
    with pytest.raises(ValueError, match="unknown key 'num_candidate'"):
        parse_config({"config": str(preset)})


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"- tree\n- chain\n", "not a table"),
        (b"chain\n", "not a table"),
        (b"", "not a table"),
        (b"tree: [chain\n", "cannot be read: while parsing"),
        (b"tree: \xff\n", "cannot be read: .* can't decode"),
        (b"method: medusa\n", "for method 'medusa', not 'propd'"),
    ],
)
def test_a_defective_preset_is_named(preset: Path, text: bytes, problem: str) -> None:
    preset.write_bytes(text)
    with pytest.raises(ValueError, match=f"'config': {preset} (is )?{problem}"):
        parse_config({"config": str(preset)})


@pytest.mark.parametrize("path", ["/no/such/preset.yaml", "/", "", 3, True, ["a.yaml"]])
def test_what_is_no_preset_is_named(path: Any) -> None:
    with pytest.raises(ValueError, match=r"'config': .*cannot be read") as error:
        parse_config({"config": path})
    assert f"'config': {path} " in str(error.value)


def test_a_bare_off_in_yaml_is_off(tmp_path: Path) -> None:
    preset = tmp_path / "preset.yaml"
    preset.write_text("pruning: off\n")
    assert parse_config({"config": str(preset)}).pruning == "off"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model": "x"}, "model has no effect with heads false"),
        ({"num_candidates": 3}, "num_candidates has no effect with heads false"),
        ({"pruning": "top_k"}, "pruning 'top_k' has no effect with heads false"),
        ({"lookup": False, "recycling": False}, "leaves nothing to draft"),
        ({"sizing": "fixed"}, "leaves nothing to draft"),
    ],
)
def test_without_heads_some_keys_contradict(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_config({"heads": False, **keys})


def test_what_only_heads_need_is_dropped_with_them() -> None:
    config = parse_config({"num_candidates": 3, "num_speculative_tokens": 7})
    bare = config.without_heads()
    assert bare == parse_config({"heads": False, "num_speculative_tokens": 7})
    assert not bare.plans_pruning and bare.looks_up
