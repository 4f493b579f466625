"""What is compared: an arm is a name and the speculative config behind it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vllm_propd.config import METHOD, ProPDConfig, parse_config
from vllm_propd.engine.frame_room import FRAME_ROOM


@dataclass(frozen=True)
class Arm:
    """One way to generate text, which is compared with others.

    Attributes:
        name: as the user gave it, overrides included.
        speculative_config: vLLM's argument; None: no speculation.
    """

    name: str
    speculative_config: dict[str, Any] | None

    @property
    def is_ours(self) -> bool:
        """Whether ProPD runs this arm (not vLLM alone, or one of its own methods)."""
        return (self.speculative_config or {}).get("method") == METHOD

    @property
    def keys(self) -> dict[str, Any]:
        """The keys of the speculative config without ``method``; none for plain vLLM."""
        config = self.speculative_config or {}
        return {key: value for key, value in config.items() if key != "method"}

    @contextmanager
    def environment(self) -> Iterator[None]:
        """Sets the environment of this arm's engine, for processes that start inside."""
        if self.name != "roomy" or FRAME_ROOM in os.environ:
            yield
            return
        os.environ[FRAME_ROOM] = "1"
        try:
            yield
        finally:
            del os.environ[FRAME_ROOM]

    @property
    def learns(self) -> bool:
        """Whether this arm adapts to the text and the step times that it has met."""
        return self.is_ours and (self.speculative_config or {}).get("sizing") != "fixed"


@dataclass(frozen=True)
class Heads:
    """The heads that the arms share.

    Attributes:
        folder: the heads in ProPD's format.
        for_vllm: the same heads in the format of vLLM's own method ``medusa``.
        num_heads: heads K, the depth of every draft.
    """

    folder: Path
    for_vllm: Path
    num_heads: int


USUAL_HEADS = 4
"""How far arms draft where there are no heads to be as deep as."""


def _propd(heads: Heads, **keys: Any) -> dict[str, Any]:
    return {"method": "propd", "model": str(heads.folder), **keys}


def _suffix(heads: Heads) -> dict[str, Any]:
    if importlib.util.find_spec("arctic_inference") is None:
        raise ValueError("arm 'suffix' needs vLLM's optional package arctic-inference")
    return {"method": "suffix"}


FIXED_NODES = 16
"""The nodes of a tree of fixed size: few enough that such trees pay at batch size 1."""

ARMS: dict[str, Callable[[Heads], dict[str, Any] | None]] = {
    "plain": lambda heads: None,
    "control": lambda heads: None,
    "roomy": lambda heads: None,
    "medusa": lambda heads: {
        "method": "medusa",
        "model": str(heads.for_vllm),
        "num_speculative_tokens": heads.num_heads,
    },
    "ngram": lambda heads: {
        "method": "ngram",
        "num_speculative_tokens": heads.num_heads,
        "prompt_lookup_min": 2,
        "prompt_lookup_max": 4,
    },
    "suffix": _suffix,
    "chain": lambda heads: _propd(
        heads, sizing="fixed", tree="chain", num_speculative_tokens=heads.num_heads
    ),
    # Node values of the calibration give every step a tree of the same shape: Medusa's.
    "static": lambda heads: _propd(
        heads,
        sizing="fixed",
        node_values="rank_accuracy",
        num_speculative_tokens=FIXED_NODES,
    ),
    "propd-no-prune": lambda heads: _propd(heads, pruning="off"),
    "propd-no-dynamic": lambda heads: _propd(
        heads,
        sizing="fixed",
        pruning="path_probability",
        num_speculative_tokens=FIXED_NODES,
        keep_nodes=FIXED_NODES // 2,
    ),
    "propd-no-lookup": lambda heads: _propd(heads, lookup=False),
    "propd-no-heads": lambda heads: {"method": "propd", "heads": False},
    "propd": _propd,
    "propd-recycling": lambda heads: _propd(heads, recycling=True),
    "propd-shared": lambda heads: _propd(heads, lookup="shared"),
}
"""The known arms, by name: each function makes the speculative config for some heads.

``plain`` is vLLM without speculation. ``control`` is the same in an engine of its own: it
shows how far two equal engines differ. ``roomy`` is plain vLLM, too, in the room for frames
that ProPD's engines have (``engine.frame_room``): beside it, ratios are of drafting alone.
``medusa`` (a chain of the same heads), ``ngram``
and ``suffix`` are vLLM's own methods. ``chain`` and ``static`` are our trees of a fixed
shape. ``propd`` is ProPD as it is by default; ``propd-no-prune``, ``propd-no-dynamic``,
``propd-no-lookup`` and ``propd-no-heads`` each lack one part: early pruning, sizes chosen
in real time, what is looked up in the text, which leaves the paper's method, or the heads.
Without these it recycles what the target has named before; ``propd-recycling`` does so
beside heads. ``propd-shared`` also drafts from what other requests have said."""


def parse_arm(text: str, heads: Heads) -> Arm:
    """Parses an arm's name and its overrides, as in ``propd:num_speculative_tokens=16``.

    Raises:
        ValueError: an unknown arm, a bad override, or an arm that cannot run here.
    """
    name, _, overrides = text.partition(":")
    if name not in ARMS:
        raise ValueError(f"--arms: unknown arm '{name}'; known are {', '.join(ARMS)}")
    config = ARMS[name](heads)
    if not overrides:
        return Arm(text, config)
    if config is None:
        raise ValueError(f"--arms {text}: plain vLLM has no speculative setting")
    for override in overrides.split(","):
        key, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"--arms {text}: '{override}' is not key=value")
        try:
            config[key] = yaml.safe_load(value)
        except (ValueError, yaml.YAMLError) as error:
            why = " ".join(str(error).split())  # it goes over several lines
            raise ValueError(
                f"--arms {text}: '{override}' is not key=value in YAML: {why}"
            ) from error
    return Arm(text, config)


def arm_texts(text: str) -> list[str]:
    """Returns the arms of a list, each still a text for ``parse_arm``.

    Raises:
        ValueError: one is there twice: what is measured goes by its name.
    """
    found = text.split()
    if twice := sorted({one for one in found if found.count(one) > 1}):
        raise ValueError(
            f"--arms: {', '.join(twice)} more than once: name each once; for a second "
            "plain vLLM there is arm 'control'"
        )
    return found


def parse_arms(text: str, heads: Heads) -> list[Arm]:
    """Parses a list of arms like ``plain propd:tree=chain,num_speculative_tokens=4``.

    Plain vLLM comes first in the result, because the others are compared with it.

    Raises:
        ValueError: see ``arm_texts`` and ``parse_arm``; or none of them is plain vLLM.
    """
    arms = [parse_arm(part, heads) for part in arm_texts(text)]
    if not any(arm.name == "plain" for arm in arms):
        raise ValueError("--arms: 'plain' must be among them: all ratios are to it")
    return sorted(arms, key=lambda arm: arm.name != "plain")


def use_heads(arms: list[Arm], heads: Heads) -> bool:
    """Returns whether any of the arms drafts with these heads."""
    folders = {str(heads.folder), str(heads.for_vllm)}
    return any(arm.keys.get("model") in folders for arm in arms)


def use_export(arms: list[Arm], heads: Heads) -> bool:
    """Returns whether any of the arms reads these heads in the format of vLLM's own."""
    return any(arm.keys.get("model") == str(heads.for_vllm) for arm in arms)


def settings_of(arm: Arm) -> ProPDConfig:
    """Returns the settings of one of ProPD's arms, those of a preset included.

    Raises:
        ValueError: a key or the preset is wrong; the message names the arm.
    """
    try:
        return parse_config(arm.keys)
    except ValueError as error:
        raise ValueError(f"arm '{arm.name}': {error}") from error


def most_nodes(arms: list[Arm]) -> int:
    """Returns the draft tokens per sequence of the arm that drafts most.

    Raises:
        ValueError: see ``settings_of``.
    """
    whole = ProPDConfig().num_speculative_tokens
    return max(
        settings_of(arm).num_speculative_tokens
        if arm.is_ours
        else int(arm.keys.get("num_speculative_tokens", whole))
        for arm in arms
    )


def shared_config(arms: list[Arm], target: str) -> dict[str, Any]:
    """Returns the config of an engine in which all these arms of ProPD's can take turns.

    Settings change from turn to turn; heads are loaded once, at the start. Arms without
    heads can follow those with some.

    Args:
        arms: ProPD's own, at least one.
        target: folder or name of the target.

    Raises:
        ValueError: an arm's settings are wrong, or it wants other heads than the first.
    """
    # Late: the command asks for the arms' names before it knows that vLLM is needed.
    from vllm_propd.engine.integration.config_patch import with_heads_found

    found = [(arm, with_heads_found(settings_of(arm), target)) for arm in arms]
    most = max(settings.num_speculative_tokens for _, settings in found)
    with_heads = [(arm, settings.model) for arm, settings in found if settings.heads]
    first, its = with_heads[0] if with_heads else (arms[0], None)
    for arm, heads in with_heads:
        if heads != its:
            raise ValueError(
                f"arm '{arm.name}' wants the heads in {heads}, and ProPD's arms share an "
                f"engine with those in {its} ('{first.name}'): give it a bench of its "
                "own, or --in-turn, which starts an engine for each arm"
            )
    return {"method": METHOD, **first.keys, "num_speculative_tokens": most}
