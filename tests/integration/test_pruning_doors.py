"""Early pruning that cannot be: one clear error at start-up."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import MODEL
from safetensors.torch import load_file, save_file
from vllm.engine.arg_utils import EngineArgs

from vllm_propd.config import ProPDConfig
from vllm_propd.engine.integration import support_matrix
from vllm_propd.engine.integration.find_heads import engine_config
from vllm_propd.heads.checkpoint import EARLY_FILE


@pytest.fixture
def heads(tmp_path: Path) -> Path:
    """A copy of the demo's heads."""
    shutil.copytree(MODEL / "propd", tmp_path / "heads")
    return tmp_path / "heads"


def config_of(heads: Path, target: Path = MODEL, **keys: Any) -> ProPDConfig:
    args = EngineArgs(
        model=str(target),
        speculative_config={"method": "propd", "model": str(heads), **keys},
        skip_tokenizer_init=target != MODEL,
    )
    return engine_config(args.create_engine_config())


def rewrite(heads: Path, old: str, new: str | None) -> None:
    """Renames the early heads' tensors, or drops them."""
    tensors = load_file(heads / EARLY_FILE)
    named = {name.replace(old, new or ""): tensor for name, tensor in tensors.items()}
    if new is None:
        named = {name: tensor for name, tensor in tensors.items() if old not in name}
    save_file(named, heads / EARLY_FILE)


def test_the_first_early_head_is_the_default(heads: Path) -> None:
    assert config_of(heads, pruning="top_k").early_layer == 1
    assert config_of(heads, pruning="top_k", early_layer=3).early_layer == 3


def test_a_layer_without_a_head(heads: Path) -> None:
    with pytest.raises(ValueError, match=r"early_layer 5: .* after layers 1, 2, 3"):
        config_of(heads, pruning="top_k", early_layer=5)


def test_a_layer_that_leaves_none_after_it(heads: Path) -> None:
    rewrite(heads, "early.3.", "early.6.")
    with pytest.raises(ValueError, match="early_layer 6: the target has 6 layers"):
        config_of(heads, pruning="top_k", early_layer=6)


@pytest.fixture
def says_that_pruning_is_off(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the log says of it."""
    said: list[str] = []

    def info(message: str, *args: Any) -> None:
        text = message % args
        if "is off" in text:
            said.append(text)

    monkeypatch.setattr(support_matrix.logger, "info", info)
    return said


def test_heads_without_early_heads(
    heads: Path, says_that_pruning_is_off: list[str]
) -> None:
    (heads / EARLY_FILE).unlink()
    with pytest.raises(ValueError, match=r"pruning 'top_k' needs early heads.*'off'"):
        config_of(heads, pruning="top_k")
    assert not says_that_pruning_is_off
    config = config_of(heads)
    assert (config.pruning, config.early_layer) == ("off", None)
    assert len(says_that_pruning_is_off) == 1


def test_a_damaged_early_head(heads: Path) -> None:
    rewrite(heads, "early.2.linear.bias", None)
    with pytest.raises(ValueError, match=r"missing tensor early\.2\.linear\.bias"):
        config_of(heads, pruning="top_k", early_layer=2)


def test_a_model_that_cannot_be_split(
    heads: Path, tmp_path: Path, says_that_pruning_is_off: list[str]
) -> None:
    config = json.loads((MODEL / "config.json").read_text())
    config |= {"architectures": ["Gemma3nForCausalLM"], "model_type": "gemma3n_text"}
    target = tmp_path / "target"
    target.mkdir()
    (target / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"no pipeline-parallel support .*'off'"):
        config_of(heads, target, pruning="top_k")
    assert not says_that_pruning_is_off
    assert config_of(heads, target).pruning == "off"
    assert "pipeline-parallel" in says_that_pruning_is_off[0]
