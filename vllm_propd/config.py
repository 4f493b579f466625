"""Every setting of ProPD, in one class: the keys of ``--speculative-config``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

METHOD = "propd"
METRIC_PREFIX = "vllm:propd_"
"""How ProPD is named: in ``method``, and at the start of its metrics' names."""

REQUEST_METRICS = "PROPD_REQUEST_METRICS"
"""The environment variable by which requests' metrics tell why they ended and what became
of their drafts; batch jobs set it to 1 for their engines."""

ONLY_WITH: dict[str, tuple[str, tuple[str, ...]]] = {
    "num_candidates": ("tree", ("best_first",)),
    "node_values": ("tree", ("best_first",)),
    "typical_epsilon": ("acceptance", ("typical",)),
    "typical_delta": ("acceptance", ("typical",)),
    "top_k": ("pruning", ("top_k",)),
    "keep_nodes": ("pruning", ("path_probability",)),
    "draft_weight": ("pruning", ("path_probability", "auto")),
    "early_layer": ("pruning", ("top_k", "path_probability", "auto")),
}
"""Keys that have an effect only with some values of another key: that key, its values."""

OF_HEADS = (
    "model", "num_candidates", "node_values", "top_k", "keep_nodes", "draft_weight",
    "early_layer",
)  # fmt: skip
"""Keys that have an effect only with heads."""


class ProPDConfig(BaseModel):
    """Settings of the proposer and of verification.

    Beside ``method: propd`` these are all the keys that ``--speculative-config`` takes;
    an unknown or contradictory key is an error at start-up.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    model: str | None = Field(
        None,
        description="Folder of the Medusa heads. Default: `propd/` inside the target "
        "model's folder.",
    )
    heads: bool = Field(
        True,
        description="`false`: no heads are read, and only what needs none is drafted "
        "(`lookup`, `recycling`). So it is, too, where `model` is not given and the target "
        "has no `propd/`.",
    )
    num_speculative_tokens: int = Field(
        48,
        ge=1,
        le=255,
        description="The most nodes of a sequence's token tree. Under load all trees "
        "together take at most half of `max_num_batched_tokens`.",
    )
    sizing: Literal["dynamic", "fixed"] = Field(
        "dynamic",
        description="`dynamic`: before each step as many nodes as promise the most tokens "
        "per second, by what steps have taken and candidates have been worth so far; "
        "none where none pay. `fixed`: always `num_speculative_tokens`.",
    )
    tree: Literal["best_first", "chain"] = Field(
        "best_first",
        description="`best_first`: the most probable paths, whatever their shape; "
        "`chain`: each head's first choice only, one branch.",
    )
    num_candidates: int = Field(
        10,
        ge=1,
        le=64,
        description="Candidates taken from each head: the most siblings a node can have.",
    )
    node_values: Literal["head_probability", "rank_accuracy"] = Field(
        "head_probability",
        description="What a node is thought to be worth: the product of this step's head "
        "probabilities on its path, or of its ranks' accuracies in `calibration.json` (the "
        "paper's). With `dynamic` sizing both are corrected by what comes true.",
    )
    lookup: bool | Literal["shared"] = Field(
        True,
        description="With `dynamic` sizing trees also hold what followed in a request's "
        "own text, prompt included, the last time that it ended as it does now, priced by "
        "how often that came true; where the heads add too little, they are not asked. "
        "`shared`: also what other requests have answered, where their last tokens were "
        "the same (SuffixDecoding, arXiv 2411.04975); how fast a text comes may then tell "
        "of others' texts, to those of the same `cache_salt` only. "
        "`false`: the heads' candidates only, as in the paper.",
    )
    recycling: bool | Literal["auto"] = Field(
        "auto",
        description="With `dynamic` sizing trees also hold what the target thought likely "
        "after a token when it last read it, in whatever request, where no head speaks: "
        "without heads, and deeper than they reach (Token Recycling, arXiv 2408.08696). "
        "How fast a text comes may tell of others' texts, as with prefix caching; `false`: "
        "it does not. `auto`: where there are no heads; beside heads that suit the text it "
        "costs more than it gives (docs/benchmarks.md).",
    )
    pruning: Literal["auto", "off", "top_k", "path_probability"] = Field(
        "auto",
        description="Early pruning, by an early head after a shallow layer. `top_k`: a "
        "node goes on if it is among its parent's best K (the paper's rule); "
        "`path_probability`: each tree's best `keep_nodes` paths go on. `auto`: with "
        "`dynamic` sizing as many of the batch's best paths as promise the most tokens per "
        "second, all where pruning does not pay; with `fixed` sizing, `off`.",
    )
    early_layer: int | None = Field(
        None,
        ge=1,
        description="Layer after which nodes are judged, counted from 1. Default: the "
        "first that the heads have an early head for.",
    )
    top_k: int = Field(20, ge=1, description="K of the rule `top_k`.")
    keep_nodes: int = Field(
        16, ge=1, le=255, description="Nodes of a tree kept by `path_probability`."
    )
    draft_weight: float = Field(
        1.0,
        ge=0,
        description="How much `path_probability` also trusts the draft: a node counts as "
        "the early head's probability times the Medusa head's to this power. 0: the "
        "early head alone.",
    )
    acceptance: Literal["exact", "typical"] = Field(
        "exact",
        description="`exact`: the target's own text (greedy) or distribution (sampled). "
        "`typical`: Medusa's typical acceptance for sampled requests, longer but lossy.",
    )
    typical_epsilon: float = Field(
        0.09,
        gt=0,
        lt=1,
        description="Lossy `typical` acceptance only: a token at least this probable is "
        "accepted.",
    )
    typical_delta: float = Field(
        0.3,
        gt=0,
        description="Lossy `typical` acceptance only: the threshold is lowered to this "
        "times exp(-entropy).",
    )

    @field_validator("pruning", mode="before")
    @classmethod
    def _read_off(cls, value: Any) -> Any:
        """Reads a bare ``off``, which is false in YAML, as the word."""
        return "off" if value is False else value

    @model_validator(mode="after")
    def _check_contradictions(self) -> Self:
        problems = [
            f"{key} has no effect with {other} '{getattr(self, other)}': remove it, or "
            f"set {other} to '{values[0]}'" + " (lossy)" * (values[0] == "typical")
            for key, (other, values) in ONLY_WITH.items()
            if key in self.model_fields_set and getattr(self, other) not in values
        ]
        for key in ("early_layer", "draft_weight"):
            if key in self.model_fields_set and self.pruning == "auto" and not self.prunes:
                problems.append(
                    f"{key} has no effect with pruning 'auto' and sizing 'fixed': remove "
                    "it, or set pruning to a rule"
                )
        for key in ("lookup", "recycling"):
            unused = getattr(self, key) not in (False, "auto") and not self._free_trees
            if key in self.model_fields_set and unused:
                problems.append(
                    f"{key} has no effect with sizing '{self.sizing}' and tree "
                    f"'{self.tree}': remove it, or set sizing to 'dynamic' and tree to "
                    "'best_first'"
                )
        if not self.heads:
            problems += [
                f"{key} has no effect with heads false: remove one of them"
                for key in OF_HEADS
                if key in self.model_fields_set
            ]
            if self.has_rule:
                problems.append(
                    f"pruning '{self.pruning}' has no effect with heads false: remove one "
                    "of them"
                )
            if not (self.looks_up or self.recycles):
                problems.append(
                    "heads false leaves nothing to draft unless lookup or recycling is "
                    "true, sizing 'dynamic' and tree 'best_first'"
                )
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def _free_trees(self) -> bool:
        """Whether trees have any size and shape, and so room for what the heads lack."""
        return self.sizing == "dynamic" and self.tree == "best_first"

    @property
    def looks_up(self) -> bool:
        """Whether candidates are also looked up in the text."""
        return bool(self.lookup) and self._free_trees

    @property
    def shares(self) -> bool:
        """Whether candidates also come from what other requests have said."""
        return self.lookup == "shared" and self._free_trees

    @property
    def recycles(self) -> bool:
        """Whether successors that the target has named before are candidates, too."""
        wanted = not self.heads if self.recycling == "auto" else self.recycling
        return wanted and self._free_trees

    @property
    def has_rule(self) -> bool:
        """Whether every step with trees is pruned, always by the same rule."""
        return self.pruning in ("top_k", "path_probability")

    @property
    def plans_pruning(self) -> bool:
        """Whether each step's plan says how much is pruned."""
        return self.pruning == "auto" and self.sizing == "dynamic" and self.heads

    @property
    def prunes(self) -> bool:
        """Whether steps can be pruned at all."""
        return self.has_rule or self.plans_pruning

    def without_pruning(self) -> ProPDConfig:
        """Returns these settings with ``pruning`` off."""
        of_pruning = {key for key, (other, _) in ONLY_WITH.items() if other == "pruning"}
        keys = self.model_dump(exclude_unset=True, exclude=of_pruning)
        return ProPDConfig.model_validate({**keys, "pruning": "off"})

    def without_heads(self) -> ProPDConfig:
        """Returns these settings without heads, and without what only heads need."""
        keys = self.model_dump(exclude_unset=True, exclude={*OF_HEADS, "pruning"})
        return ProPDConfig.model_validate({**keys, "heads": False})

    @property
    def ranks(self) -> int:
        """How many candidates of each head growth may use."""
        return 1 if self.tree == "chain" else self.num_candidates


def _preset(path: Any) -> dict[str, Any]:
    where = f"speculative_config 'config': {path}"
    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{where} cannot be read: {error}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{where} is not a table of keys")
    if (method := loaded.pop("method", METHOD)) != METHOD:
        raise ValueError(f"{where} is for method {method!r}, not '{METHOD}'")
    return loaded


def parse_config(keys: dict[str, Any]) -> ProPDConfig:
    """Returns the config behind a ``--speculative-config`` of method propd.

    Args:
        keys: the user's keys without ``method``. ``config`` names a YAML preset; keys
            given beside it win, and a key of the preset that they leave without effect
            is dropped (``num_candidates`` where they say ``tree: chain``). A given key
            that the preset leaves without effect is an error.

    Raises:
        ValueError: an unknown, contradictory or impossible setting, or a preset that
            cannot be read, named.
    """
    keys = dict(keys)
    if (path := keys.pop("config", None)) is not None:
        preset = _preset(path)
        for key, (other, values) in ONLY_WITH.items():
            if keys.get(other, values[0]) not in values:
                preset.pop(key, None)
        keys = {**preset, **keys}
    try:
        return ProPDConfig.model_validate(keys)
    except ValidationError as error:
        known = ", ".join(["config", *ProPDConfig.model_fields])
        problems = []
        for item in error.errors():
            name = ".".join(map(str, item["loc"]))
            if item["type"] == "extra_forbidden":
                problems.append(f"unknown key '{name}' (known: {known})")
            else:
                message = item["msg"].removeprefix("Value error, ")
                problems.append(f"{name}: {message}" if name else message)
        raise ValueError(
            f"invalid speculative_config of method '{METHOD}': {'; '.join(problems)}"
        ) from None
