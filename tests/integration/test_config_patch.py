"""Turning ProPD on: every door leads to the same engine config, bad input to one error."""

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import MODEL
from huggingface_hub import snapshot_download
from transformers import MixtralConfig
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_propd import plugin
from vllm_propd.config import ProPDConfig
from vllm_propd.engine.integration import config_patch, patches, sessions
from vllm_propd.engine.integration import find_heads as module_of_heads
from vllm_propd.engine.integration.config_patch import PROPOSER, REWRITTEN
from vllm_propd.engine.integration.find_heads import (
    GIVEN,
    NoHeadsError,
    engine_config,
    find_heads,
)

CONFIGS = Path(__file__).parents[2] / "configs"


def from_command_line(*words: str) -> EngineArgs:
    """Engine arguments as ``vllm serve`` parses them."""
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    return AsyncEngineArgs.from_cli_args(parser.parse_args(["--model", str(MODEL), *words]))


def from_python(**fields: Any) -> EngineArgs:
    """Engine arguments as ``LLM(...)`` makes them."""
    return EngineArgs(model=str(MODEL), **fields)


HEADS = str(MODEL / "propd")
DOORS = {
    "--speculative-config propd": lambda: from_command_line(
        "--speculative-config", "propd"
    ),
    "--speculative-config JSON": lambda: from_command_line(
        "--speculative-config", json.dumps({"method": "propd", "model": HEADS})
    ),
    "--spec-method --spec-model": lambda: from_command_line(
        "--spec-method", "propd", "--spec-model", HEADS
    ),
    "dict": lambda: from_python(speculative_config={"method": "propd"}),
    "word": lambda: from_python(speculative_config="propd"),
    "preset": lambda: from_python(
        speculative_config={"method": "propd", "config": str(CONFIGS / "default.yaml")}
    ),
}


@pytest.mark.parametrize("door", DOORS)
def test_all_doors_are_alike(door: str) -> None:
    vllm_config = DOORS[door]().create_engine_config()
    assert vllm_config.speculative_config.model == PROPOSER
    assert vllm_config.speculative_config.num_speculative_tokens == 48
    assert vllm_config.parallel_config.worker_cls.startswith("vllm_propd.")
    config = engine_config(vllm_config)
    assert config.model == HEADS
    assert config.model_dump(exclude={"model"}) == {
        "heads": True,
        "num_speculative_tokens": 48,
        "sizing": "dynamic",
        "tree": "best_first",
        "num_candidates": 10,
        "node_values": "head_probability",
        "lookup": True,
        "recycling": "auto",
        "pruning": "auto",
        "early_layer": 1,
        "top_k": 20,
        "keep_nodes": 16,
        "draft_weight": 1.0,
        "acceptance": "exact",
        "typical_epsilon": 0.09,
        "typical_delta": 0.3,
    }


@pytest.mark.parametrize("door", DOORS)
def test_arguments_give_the_same_config_twice(door: str) -> None:
    """Ray's batches ask them once for themselves, and once for their engine."""
    args = DOORS[door]()
    before = {name: str(value) for name, value in vars(args).items() if name in REWRITTEN}
    first = args.create_engine_config()
    after = {name: str(value) for name, value in vars(args).items() if name in REWRITTEN}
    assert after == before
    second = args.create_engine_config()
    assert engine_config(second) == engine_config(first)
    assert second.parallel_config.worker_cls == first.parallel_config.worker_cls


@pytest.mark.parametrize("preset", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_preset_is_valid(preset: Path) -> None:
    keys = {"method": "propd", "config": str(preset)}
    assert from_python(speculative_config=keys).create_engine_config()


def test_spec_tokens_is_the_tree_size() -> None:
    args = from_command_line("--spec-method", "propd", "--spec-tokens", "16")
    assert args.create_engine_config().speculative_config.num_speculative_tokens == 16


def test_without_the_option_nothing_changes() -> None:
    vllm_config = from_python().create_engine_config()
    assert vllm_config.speculative_config is None
    assert vllm_config.additional_config == {}
    assert not vllm_config.parallel_config.worker_cls.startswith("vllm_propd.")


def test_the_doors_bring_no_compiler_along() -> None:
    """Plain vLLM engines stumble over numba, which only our workers make harmless."""
    code = (
        "import sys; from vllm_propd.plugin import register; register(); "
        "sys.exit('numba' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_other_methods_pass_through() -> None:
    keys = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}
    args = from_command_line("--speculative-config", json.dumps(keys))
    assert args.create_engine_config().speculative_config.method == "ngram"


BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "unknown key": ({"nodes": 3}, {}, "unknown key 'nodes'"),
    "no such heads": ({"model": "/nowhere"}, {}, "looked in /nowhere.*vllm-propd train"),
    "given twice": ({"model": HEADS}, {"spec_model": HEADS}, "mutually exclusive"),
    "contradiction": ({"typical_delta": 0.2}, {}, "no effect with acceptance 'exact'"),
    "float16": ({}, {"dtype": "float16"}, "--dtype float16; use bfloat16"),
    "pipeline": ({}, {"pipeline_parallel_size": 2}, "--pipeline-parallel-size"),
    "lora": (
        {},
        {"enable_lora": True, "max_num_batched_tokens": 1 << 16},
        "--enable-lora",
    ),
    "worker": ({}, {"worker_cls": "some.Worker"}, "remove --worker-cls"),
    "grammar": (
        {},
        {"structured_outputs_config": {"backend": "lm-format-enforcer"}},
        "lm-format-enforcer, which refuses requests",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error(case: str) -> None:
    keys, fields, message = BAD[case]
    args = from_python(speculative_config={"method": "propd", **keys}, **fields)
    with pytest.raises(ValueError, match=message):
        args.create_engine_config()


@pytest.mark.parametrize(
    "fields", [{"data_parallel_size": 2}, {"enable_expert_parallel": True}], ids=str
)
def test_experts_on_several_ranks_are_refused(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    MixtralConfig(hidden_size=256, num_hidden_layers=2, vocab_size=2048).save_pretrained(
        tmp_path
    )
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["MixtralForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    args = EngineArgs(
        model=str(tmp_path),
        skip_tokenizer_init=True,
        speculative_config={"method": "propd", "model": HEADS},
        **fields,
    )
    with pytest.raises(ValueError, match="mixture-of-experts models with"):
        args.create_engine_config()


def test_heads_of_another_model_are_refused(tmp_path: Path) -> None:
    import torch

    from vllm_propd.heads.checkpoint import save_heads
    from vllm_propd.heads.medusa import MedusaHeads

    save_heads(tmp_path, MedusaHeads(2, 1, 64, True).tensors(), {}, 9, torch.float32)
    args = from_python(speculative_config={"method": "propd", "model": str(tmp_path)})
    with pytest.raises(ValueError, match="hidden size is 64, the target's 256"):
        args.create_engine_config()


@pytest.fixture
def on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Heads that the hub, offline its local cache, has as ``someone/heads``.

    Its revision ``v1`` is a target with heads in ``propd/``.
    """
    repository = tmp_path / "models--someone--heads"
    (repository / "refs").mkdir(parents=True)
    for name, commit, inside in (("v1", "1" * 40, "propd"), ("main", "0" * 40, "")):
        snapshot = repository / "snapshots" / commit
        shutil.copytree(HEADS, snapshot / inside)
        (repository / "refs" / name).write_text(commit)
    of_cache = partial(snapshot_download, cache_dir=tmp_path)
    monkeypatch.setattr(module_of_heads, "snapshot_download", of_cache)
    return snapshot


def test_heads_may_lie_on_the_hub(on_the_hub: Path, tmp_path: Path) -> None:
    assert find_heads("someone/heads", str(MODEL)).resolve() == on_the_hub
    unfinished = tmp_path / "model" / "propd" / "training"
    unfinished.mkdir(parents=True)
    with pytest.raises(NoHeadsError, match="holds none: an unfinished training"):
        find_heads(None, str(tmp_path / "model"))
    with pytest.raises(NoHeadsError, match="--out name-propd`"):
        find_heads(None, "someone/name")
    with pytest.raises(ValueError, match="the model hub \\(someone/nothing\\)"):
        find_heads("someone/nothing", str(MODEL))


def test_heads_are_of_the_targets_revision(on_the_hub: Path) -> None:
    found = find_heads(None, "someone/heads", "v1")
    assert found == on_the_hub.parent / ("1" * 40) / "propd"
    with pytest.raises(NoHeadsError, match=r"hub \(someone/heads, propd/\)"):
        find_heads(None, "someone/heads")
    with pytest.raises(NoHeadsError, match=r"hub \(someone/heads@v2, propd/\)"):
        find_heads(None, "someone/heads", "v2")
    assert find_heads("someone/heads", str(MODEL), "v1").resolve() == on_the_hub


def test_a_hub_that_fails_has_no_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As behind a proxy that refuses: an error that is no OSError."""

    class ProxyError(Exception):
        pass

    def refuses(*_: object, **__: object) -> str:
        raise ProxyError("403 Forbidden")

    monkeypatch.setattr(module_of_heads, "snapshot_download", refuses)
    assert not config_patch.find_config({}, "someone/model").heads


def test_another_host_finds_its_own_heads(on_the_hub: Path, tmp_path: Path) -> None:
    """What the front end's host calls by a path may have another one here, or none."""
    there = tmp_path / "there"
    there.symlink_to(HEADS, target_is_directory=True)
    vllm_config = from_python(
        speculative_config={"method": "propd", "model": str(there)}
    ).create_engine_config()
    path = str(tmp_path / "cache" / "snapshot")
    told = ProPDConfig(model=path).model_dump_json(exclude_unset=True)
    vllm_config.additional_config = {"propd": told, GIVEN: "someone/heads"}
    assert engine_config(vllm_config).model == str(on_the_hub)
    vllm_config.additional_config = {"propd": told, GIVEN: "someone/nothing"}
    with pytest.raises(NoHeadsError, match=r"host .* has no folder .*snapshot, where"):
        engine_config(vllm_config)


def test_heads_that_a_preset_names_are_told_as_given(tmp_path: Path) -> None:
    preset = tmp_path / "preset.yaml"
    preset.write_text(f"model: {HEADS}\n")
    vllm_config = from_python(
        speculative_config={"method": "propd", "config": str(preset)}
    ).create_engine_config()
    assert vllm_config.additional_config[GIVEN] == str(HEADS)


@pytest.mark.parametrize("method", [None, "ngram"])
def test_sessions_of_other_engines_are_vllms_alone(method: str | None) -> None:
    config = method and SimpleNamespace(method=method, model=None)
    scheduler = SimpleNamespace(
        num_spec_tokens=4, vllm_config=SimpleNamespace(speculative_config=config)
    )
    request = SimpleNamespace(resumable=True, num_tokens=10, num_computed_tokens=12)
    ((*_, patched),) = sessions.PATCHES
    assert patched(lambda *args: True)(scheduler, request)
    assert request.num_computed_tokens == 12


class TestVersions:
    """The plugin refuses a vLLM it was not made for, and says so."""

    @pytest.fixture(autouse=True)
    def _other_vllm(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(plugin, "installed_vllm", lambda: "0.99.1")

    def test_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("vllm_propd.engine.integration.patches.apply", pytest.fail)
        errors: list[str] = []
        monkeypatch.setattr(plugin.logger, "error", lambda m, *a: errors.append(m % a))
        plugin.register()
        assert "made for vLLM ==0.32.*, but vLLM 0.99.1 is installed" in errors[0]

    def test_escape(self, monkeypatch: pytest.MonkeyPatch) -> None:
        opened: list[bool] = []
        monkeypatch.setattr(
            "vllm_propd.engine.integration.patches.apply",
            lambda patches: opened.append(len(patches) > 5),
        )
        monkeypatch.setenv(plugin.SKIP_VERSION_CHECK, "1")
        plugin.register()
        assert opened == [True]


def test_what_another_plugin_has_replaced_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither is anything else touched, nor is plain vLLM stopped."""

    class Theirs:
        def one(self) -> int:
            return 1

        def two(self) -> int:
            return 2

    def negative(original: Any) -> Any:
        return lambda self: -original(self)

    mine = ((Theirs, "one", negative), (Theirs, "two", negative))
    space: dict[str, Any] = {"__name__": "another_plugin", "original": Theirs.two}
    exec("import functools; theirs = functools.wraps(original)(lambda self: 3)", space)
    with monkeypatch.context() as patch:
        patch.setattr(Theirs, "two", space["theirs"])
        with pytest.raises(
            patches.PatchedByOthersError, match=r"two has .* by another_plugin"
        ):
            patches.apply(mine)
        assert (Theirs().one(), Theirs().two()) == (1, 3)
        patch.setattr(config_patch, "PATCHES", mine)
        errors: list[str] = []
        patch.setattr(plugin.logger, "error", lambda m, *a: errors.append(m % a))
        plugin.register()
        assert "Theirs.two has been replaced by another_plugin" in errors[0]
    patches.apply(mine)
    patches.apply(mine)  # once is enough
    assert (Theirs().one(), Theirs().two()) == (-1, -2)
