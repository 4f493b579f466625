"""What a recording cannot tell of is refused before anything is recorded."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tokenizers_on_disk import MODEL

from vllm_propd.bench.settings import BenchSettings
from vllm_propd.bench.simulate import _configs
from vllm_propd.config import ProPDConfig
from vllm_propd.heads.checkpoint import EARLY_FILE

HEADS = MODEL / "propd"


def configs(
    arms: str, heads: Path = HEADS, layer: int | None = 1, nodes: int = 64
) -> dict[str, ProPDConfig]:
    settings = BenchSettings(arms=arms, batch_sizes=(1, 4))
    return _configs(settings, heads, layer, num_prompts=4, nodes=nodes)


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """The same heads, without early ones."""
    ignored = shutil.ignore_patterns(EARLY_FILE)
    return shutil.copytree(HEADS, tmp_path / "heads", ignore=ignored)


def test_the_commands_usual_arms_can_be_simulated() -> None:
    arms = "chain propd-no-dynamic propd-no-lookup propd-no-heads propd"
    found = configs(arms)
    assert list(found) == arms.split()
    assert found["propd-no-dynamic"].early_layer == 1


def test_pruning_without_an_early_head_names_arm_and_remedy(bare: Path) -> None:
    pruned = "propd:sizing=fixed,pruning=top_k,top_k=5"
    for arm in ("propd-no-dynamic", pruned):
        message = rf"--arms {arm}: pruning '\w+' needs an early head, and .*leave the arm"
        with pytest.raises(ValueError, match=message):
            configs(f"chain {arm}", bare, None)
    found = configs("chain propd-no-lookup propd", bare, None)
    assert not any(config.prunes for config in found.values())


@pytest.mark.parametrize("arm", ["static", "propd-no-lookup:node_values=rank_accuracy"])
def test_values_that_are_not_recorded_name_arm_and_remedy(arm: str) -> None:
    message = f"--arms {arm}: .*node_values 'rank_accuracy': leave the arm out, or add"
    with pytest.raises(ValueError, match=message):
        configs(f"chain {arm}")
    assert configs(f"{arm.partition(':')[0]}:node_values=head_probability")
    # Beside other sources nodes are grown anew, at any values.
    assert configs("propd:node_values=rank_accuracy")


def test_trees_larger_than_those_recorded_name_arm_and_remedy() -> None:
    small = "propd:sizing=fixed,num_speculative_tokens=16"
    message = "--arms propd-no-lookup: its trees have up to 48 nodes.*--nodes 48, or add "
    with pytest.raises(ValueError, match=f"{message}num_speculative_tokens=32"):
        configs(f"{small} propd-no-lookup", nodes=32)
    with pytest.raises(ValueError, match=f"--arms {small}: .* and recorded are 8"):
        configs(small, nodes=8)
    # Of a chain only its depth counts; beside other sources no tree is recorded.
    assert len(configs(f"{small} chain propd propd-no-heads", nodes=16)) == 4
    assert configs("chain", nodes=2)


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ("propd-no-lookup:num_candidates=4", "10 candidates .*, not of 4: leave num_"),
        ("propd:sizing=fixed,num_candidates=12", "10 candidates .*, not of 12: leave num_"),
        ("propd:num_candidates=12", "10 candidates of each head: num_candidates=10"),
        ("propd:tree=chain", "chains of dynamic sizes are not replayed: add sizing=fixed"),
        ("propd:model=/others", "recorded are the heads in .*propd: give --heads /others"),
        ("chain:model=/others", "recorded are the heads in .*propd: give --heads /others"),
    ],
)
def test_trees_of_other_shapes_and_heads_name_arm_and_remedy(
    arm: str, message: str
) -> None:
    with pytest.raises(ValueError, match=f"--arms {arm}: .*{message}"):
        configs(f"propd {arm}")
    # Grown anew from the recorded candidates.
    assert configs("propd:num_candidates=4")["propd:num_candidates=4"].num_candidates == 4
    assert configs(f"chain:model={HEADS}/../propd")


def test_an_arm_that_is_there_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="--arms: chain more than once: name each once"):
        configs("chain propd chain")


def test_a_wrong_key_names_its_arm() -> None:
    with pytest.raises(ValueError, match=r"arm 'propd:depth=3': .*unknown key 'depth'"):
        configs("propd:depth=3")
