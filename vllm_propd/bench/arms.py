"""What is compared: an arm is a name and the speculative config behind it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vllm_propd.config import METHOD, ProPDConfig


@dataclass(frozen=True)
class Arm:
    """One way to generate.

    Attributes:
        name: as the user gave it, overrides included.
        speculative_config: vLLM's argument; None: no speculation.
    """

    name: str
    speculative_config: dict[str, Any] | None

    @property
    def is_ours(self) -> bool:
        """Whether ProPD runs it."""
        return (self.speculative_config or {}).get("method") == METHOD

    @property
    def learns(self) -> bool:
        """Whether what it does depends on what it has met before."""
        return self.is_ours and (self.speculative_config or {}).get("sizing") != "fixed"


@dataclass(frozen=True)
class Heads:
    """The heads that the arms share.

    Attributes:
        folder: in ProPD's format.
        for_vllm: the same in vLLM's own.
        num_heads: heads K, the depth of every draft.
    """

    folder: Path
    for_vllm: Path
    num_heads: int


def _propd(heads: Heads, **keys: Any) -> dict[str, Any]:
    return {"method": "propd", "model": str(heads.folder), **keys}


def _suffix(heads: Heads) -> dict[str, Any]:
    if importlib.util.find_spec("arctic_inference") is None:
        raise ValueError("arm 'suffix' needs vLLM's optional package arctic-inference")
    return {"method": "suffix"}


FIXED_NODES = 16
"""Of trees whose size nobody plans: few enough that they pay at batch size 1."""

ARMS: dict[str, Callable[[Heads], dict[str, Any] | None]] = {
    "plain": lambda heads: None,
    "control": lambda heads: None,
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
    "propd": _propd,
}
"""Plain vLLM, and once more in engines of its own, as far from it as two engines that are
alike; vLLM's own ``medusa`` (a chain of the same heads), ``ngram`` and ``suffix``;
our chain, a tree of fixed shape, and ProPD as it is by default, or without one of its
parts: early pruning, sizes in real time, what is looked up in the text. Without the last
it is the paper's."""


def parse_arm(text: str, heads: Heads) -> Arm:
    """An arm, with overrides if it has some: ``propd:num_speculative_tokens=16``.

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
        config[key] = yaml.safe_load(value)
    return Arm(text, config)


def parse_arms(text: str, heads: Heads) -> list[Arm]:
    """The arms of a list like ``plain chain propd:tree=chain,num_speculative_tokens=4``.

    Plain vLLM comes first, whose turns the others' are compared with.

    Raises:
        ValueError: see ``parse_arm``; or none of them is plain vLLM.
    """
    arms = [parse_arm(part, heads) for part in text.split()]
    if not any(arm.name == "plain" for arm in arms):
        raise ValueError("--arms: 'plain' must be among them: all ratios are to it")
    return sorted(arms, key=lambda arm: arm.name != "plain")


def most_nodes(arms: list[Arm]) -> int:
    """Draft tokens of the arm that drafts most."""
    whole = ProPDConfig().num_speculative_tokens
    configs = [arm.speculative_config or {} for arm in arms]
    return max(int(config.get("num_speculative_tokens", whole)) for config in configs)
