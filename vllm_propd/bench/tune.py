"""``vllm-propd tune``: which early layer, which rule, how much to keep (paper section 4).

One engine takes turns with every setting on the user's own prompts, unpruned trees among
them. Text is the same in all; what differs is how much is verified, how much of it is
accepted, and how long a step takes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from vllm import SamplingParams

from vllm_propd.bench.arms import Arm
from vllm_propd.bench.points import cut_prompts
from vllm_propd.bench.results import this_machine
from vllm_propd.bench.run import engine_options, tokenizer_of
from vllm_propd.bench.settings import BenchSettings
from vllm_propd.bench.turn import ArmEngine, Turn
from vllm_propd.heads.early import early_layers

TOP_K = (2, 5, 10, 20, 50)
KEEP = (4, 8, 16, 24, 32)
OFF: dict[str, Any] = {"pruning": "off"}


@dataclass
class Tried:
    """One setting and its turns.

    Attributes:
        keys: of the config.
        turns: one a round, on the same prompts.
    """

    keys: dict[str, Any]
    turns: list[Turn] = field(default_factory=list)

    @property
    def name(self) -> str:
        """As a column of the table."""
        if self.keys["pruning"] == "off":
            return "off"
        amount = self.keys.get("top_k", self.keys.get("keep_nodes"))
        return f"layer {self.keys['early_layer']}, {self.keys['pruning']} {amount}"

    @property
    def last(self) -> Turn:
        """Counts are the same in every round; times are not."""
        return self.turns[-1]

    @property
    def tokens_per_s(self) -> float:
        """Median over rounds."""
        return median(turn.tokens_per_s for turn in self.turns)

    @property
    def step_ms(self) -> float:
        """Median step, of the median round."""
        return median(1e3 * median(turn.step_seconds) for turn in self.turns)


def settings_to_try(layers: list[int], nodes: int) -> list[dict[str, Any]]:
    """Every layer with every rule; and no pruning, which comes first."""
    tried = [OFF]
    for layer in layers:
        tried += [{"pruning": "top_k", "early_layer": layer, "top_k": k} for k in TOP_K]
        tried += [
            {"pruning": "path_probability", "early_layer": layer, "keep_nodes": m}
            for m in KEEP
            if m < nodes
        ]
    return tried


def run_tune(
    model: Path,
    heads: Path,
    prompts: list[Path],
    out: Path,
    nodes: int,
    num_prompts: int,
    settings: BenchSettings,
) -> list[Tried]:
    """Measures, prints a table, writes the best setting as a preset, and a plot beside it.

    Args:
        model: folder of the target.
        heads: with early heads.
        prompts: files to cut prompts from; none: held-out files of Python's library.
        out: YAML file, for ``--speculative-config '{"method": "propd", "config": OUT}'``.
        nodes: of a tree, before pruning.
        num_prompts: of each turn; as many at a time as a batch holds.
        settings: prompts, tokens, rounds; its first batch size is the one measured.

    Raises:
        ValueError: the heads have no early heads, or there is too little text.
    """
    if not (layers := early_layers(heads)):
        raise ValueError(f"{heads} has no early heads: nothing to tune")
    size = settings.batch_sizes[0]
    length, seed = settings.prompt_tokens, settings.seed
    ids = cut_prompts(tokenizer_of(model), prompts, num_prompts, length, seed)
    params = SamplingParams(
        temperature=0.0, max_tokens=settings.max_tokens, ignore_eos=True, detokenize=False
    )
    keys = {"method": "propd", "model": str(heads), "num_speculative_tokens": nodes}
    # Started with pruning: what an engine with pruning refuses is refused at once.
    first = {**keys, "pruning": "top_k", "early_layer": layers[0]}
    engine = ArmEngine(Arm("tune", first), engine_options(model, settings))
    tried = [Tried(wanted) for wanted in settings_to_try(layers, nodes)]
    console = Console()
    with Progress(console=console) as bar:
        task = bar.add_task("measuring", total=len(tried) * (settings.rounds + 1))
        for round_ in range(settings.rounds + 1):
            for one in tried:
                bar.update(task, description=one.name)
                engine.llm.collective_rpc("use_pruning", args=(one.keys,))
                engine.watch()
                turn = engine.run_all(ids, size, params)
                if round_:  # the first one warms up
                    one.turns.append(turn)
                bar.advance(task)
    engine.close()
    best = max(tried, key=lambda one: one.tokens_per_s)
    _show(tried, best, console)
    _write_preset(out, nodes, best, tried[0], size)
    picture = out.with_suffix(".png")
    plot(tried, best, picture)
    console.print(f"{out}: {best.name}; {picture}")
    return tried


def _show(tried: list[Tried], best: Tried, console: Console) -> None:
    table = Table(
        "layer", "rule", "K or m", "kept", "tokens per step", "of unpruned", "work",
        "step, ms", "tokens/s",
        title="early pruning, medians over rounds",
    )  # fmt: skip
    whole = tried[0].last.tokens_per_step
    for one in tried:
        keys = one.keys
        amount = keys.get("top_k", keys.get("keep_nodes", ""))
        table.add_row(
            str(keys.get("early_layer", "")),
            keys["pruning"],
            str(amount),
            f"{one.last.kept_per_step:.1f}",
            f"{one.last.tokens_per_step:.2f}",
            f"{one.last.tokens_per_step / whole:.1%}",
            f"{one.last.work.ratio:.2f}",
            f"{one.step_ms:.1f}",
            f"{one.tokens_per_s:.1f}",
            style="bold" if one is best else None,
        )
    console.print(table)


def _write_preset(out: Path, nodes: int, best: Tried, off: Tried, batch_size: int) -> None:
    speed = best.tokens_per_s / off.tokens_per_s
    accepted = best.last.tokens_per_step / off.last.tokens_per_step
    kept, of = best.last.kept_per_step, off.last.kept_per_step
    keys = {"num_speculative_tokens": nodes, **best.keys}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(
        f"# Written by `vllm-propd tune`: batch size {batch_size}, "
        f"{this_machine().processor}.\n"
        f"# Against unpruned trees: {speed:.2f}x the tokens/s, {accepted:.1%} of the "
        f"tokens\n# per step, {kept:.1f} of {of:.1f} nodes kept.\n"
        + yaml.safe_dump(keys, sort_keys=False)
    )


def plot(tried: list[Tried], best: Tried, path: Path) -> None:
    """Kept nodes against kept acceptance, and against a step's time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    off = tried[0].last
    families: dict[str, list[Tried]] = {}
    for one in tried[1:]:
        name = f"layer {one.keys['early_layer']}, {one.keys['pruning']}"
        families.setdefault(name, []).append(one)
    for name, members in families.items():
        line = "o-" if "top_k" in name else "s--"
        kept = [one.last.kept_per_step for one in members]
        share = [one.last.tokens_per_step / off.tokens_per_step for one in members]
        left.plot(kept, share, line, label=name)
        right.plot(kept, [one.step_ms for one in members], line, label=name)
    for axes, value in ((left, 1.0), (right, tried[0].step_ms)):
        axes.axhline(value, color="black", linestyle=":", label="unpruned")
        axes.set_xlabel("nodes kept per tree")
        axes.grid(alpha=0.3)
    chosen = best.last.kept_per_step
    left.plot(chosen, best.last.tokens_per_step / off.tokens_per_step, "k*", markersize=14)
    right.plot(chosen, best.step_ms, "k*", markersize=14, label="chosen")
    left.set(title="tokens per step, of the unpruned tree's")
    right.set(title="a step's time, ms")
    right.legend()
    figure.savefig(path, dpi=120)
