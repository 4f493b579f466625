"""``vllm-propd tune``: which early layer, which rule, how much to keep (paper section 4).

One engine takes turns with every setting on the user's own prompts, unpruned trees among
them. Text is the same in all; what differs is how much is verified, how much of it is
accepted, and how long a step takes.
"""

from __future__ import annotations

import json
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
from vllm_propd.bench.engines import ArmEngine, Engine
from vllm_propd.bench.report import wide_console
from vllm_propd.bench.results import this_machine
from vllm_propd.bench.settings import BenchSettings
from vllm_propd.bench.setup import engine_options, prompt_texts, tokenizer_of
from vllm_propd.bench.timing.turn import Turn
from vllm_propd.bench.workloads.points import cut_prompts
from vllm_propd.heads.early import early_layers
from vllm_propd.outputs import check_writable

OFF: dict[str, Any] = {"pruning": "off"}
PRESETS = (".yaml", ".yml")
WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class Search:
    """What to try, and which of it may be the best.

    Attributes:
        layers: early layers; empty: all with an early head.
        top_k: K of rule ``top_k``.
        keep_nodes: m of rule ``path_probability``.
        nodes: nodes of a tree, before pruning.
        num_prompts: prompts of each turn; as many run at a time as a batch holds.
        least_acceptance: the share of the unpruned trees' tokens per step below which
            no setting is the best one.
    """

    layers: tuple[int, ...]
    top_k: tuple[int, ...]
    keep_nodes: tuple[int, ...]
    nodes: int
    num_prompts: int
    least_acceptance: float

    @property
    def too_many(self) -> list[int]:
        """Those of ``keep_nodes`` that would prune nothing."""
        return [m for m in self.keep_nodes if m >= self.nodes]

    def tried(self, heads: Path) -> list[dict[str, Any]]:
        """Returns the config's keys to try: no pruning, then every layer with every rule.

        Raises:
            ValueError: ``heads`` has no early head after a wanted layer, or nothing is left
                to try.
        """
        trained = early_layers(heads)
        if not trained:
            raise ValueError(f"{heads} has no early heads: nothing to tune")
        if missing := set(self.layers) - set(trained):
            raise ValueError(
                f"--layers: {heads} has no early head after layer {min(missing)}; "
                f"it has some after layers {', '.join(map(str, trained))}"
            )
        tried = [OFF]
        for layer in self.layers or trained:
            at = {"early_layer": layer}
            tried += [{"pruning": "top_k", **at, "top_k": k} for k in self.top_k]
            tried += [
                {"pruning": "path_probability", **at, "keep_nodes": m}
                for m in self.keep_nodes
                if m not in self.too_many
            ]
        if tried == [OFF]:
            raise ValueError(
                f"--top-k has no K, and --keep-nodes none below --nodes {self.nodes}: "
                "nothing to tune; give some"
            )
        return tried


@dataclass
class Trial:
    """One setting and its turns.

    Attributes:
        keys: the setting's keys of the config.
        turns: one a round, on the same prompts.
    """

    keys: dict[str, Any]
    turns: list[Turn] = field(default_factory=list)

    @property
    def amount(self) -> int | None:
        """How much the setting's rule keeps: K or m; None without pruning."""
        return self.keys.get("top_k", self.keys.get("keep_nodes"))

    @property
    def name(self) -> str:
        """The setting's readable name, like ``layer 2, top_k 20``."""
        if self.keys["pruning"] == "off":
            return "off"
        return f"layer {self.keys['early_layer']}, {self.keys['pruning']} {self.amount}"

    @property
    def last(self) -> Turn:
        """The last turn, for its counts: unlike times they are the same in every round."""
        return self.turns[-1]

    @property
    def tokens_per_s(self) -> float:
        """New tokens per second, the median over rounds."""
        return median(turn.tokens_per_s for turn in self.turns)

    @property
    def step_ms(self) -> float:
        """Milliseconds of the median step, in the median round."""
        return median(1e3 * median(turn.step_seconds) for turn in self.turns)


def run_tune(
    model: Path,
    heads: Path,
    prompts: list[Path],
    out: Path,
    settings: BenchSettings,
    search: Search,
) -> list[Trial]:
    """Measures, prints a table, writes the best setting as a preset, and a plot beside it.

    Args:
        model: folder of the target.
        heads: folder of the heads, with early heads.
        prompts: files or folders to cut prompts from; none: held-out files of Python's
            library.
        out: YAML file, for ``--speculative-config '{"method": "propd", "config": OUT}'``.
        settings: prompts, tokens, rounds; its first batch size is the one measured.
        search: what to try.

    Raises:
        ValueError: early heads that are wanted are not there, too little text, or ``out``
            has another suffix.
        OSError: ``out`` cannot be written.
    """
    _check_out(out)
    console = wide_console()
    tried = [Trial(keys) for keys in search.tried(heads)]
    if search.too_many:
        console.print(
            f"--keep-nodes {', '.join(map(str, search.too_many))}: left out, since nothing "
            f"of a tree of --nodes {search.nodes} would be pruned"
        )
    size = settings.batch_sizes[0]
    tokenize, length = tokenizer_of(model), settings.prompt_tokens
    texts = prompt_texts(model, prompts)
    ids = cut_prompts(tokenize, texts, search.num_prompts, length, settings.seed)
    params, warm_up = (
        SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True, detokenize=False)
        for n in (settings.max_tokens, min(settings.max_tokens, WARM_UP_TOKENS))
    )
    keys = {
        "method": "propd",
        "model": str(heads),
        "num_speculative_tokens": search.nodes,
        "sizing": "fixed",
    }
    # Started with pruning: what an engine with pruning refuses is refused at once.
    options = engine_options(model, settings, search.nodes)
    shared = Engine({**keys, **tried[-1].keys}, options, timed=True)
    engines = [ArmEngine(Arm(one.name, {**keys, **one.keys}), shared) for one in tried]
    with Progress(console=console) as bar:
        task = bar.add_task("warming up", total=len(tried) * (settings.rounds + 1))
        for round_ in range(settings.rounds + 1):
            for one, engine in zip(tried, engines, strict=True):
                if round_:
                    bar.update(task, description=one.name)
                    one.turns.append(engine.run_all(ids, size, params))
                else:
                    engine.run(ids[:size], warm_up)
                bar.advance(task)
    shared.close()
    whole = tried[0].last.tokens_per_step
    least = search.least_acceptance * whole
    good = [one for one in tried if one.last.tokens_per_step >= least]
    best = max(good, key=lambda one: one.tokens_per_s)
    show(tried, best, console)
    write_preset(out, search.nodes, best, tried[0], size)
    write_curve(tried, model.name, size, out.with_suffix(".json"))
    plot(tried, best, out.with_suffix(".png"))
    console.print(f"{out}: {best.name}; beside it the curve, .json and .png")
    return tried


def _check_out(out: Path) -> None:
    """Refuses a preset that cannot be written, or that its own curve would replace."""
    if out.suffix not in PRESETS or out.is_dir():
        raise ValueError(
            f"--out {out}: give a file that ends in {' or '.join(PRESETS)}; the curve is "
            "written beside it, as .json and .png"
        )
    check_writable(out.parent, f"--out {out}")


def show(tried: list[Trial], best: Trial, console: Console) -> None:
    """Prints a table of all settings, the best one in bold."""
    table = Table(
        "layer", "rule", "K, m", "kept", "tokens/step", "share", "work", "step, ms",
        "tokens/s",
        title="early pruning, medians over rounds",
        caption="share: of the unpruned trees' tokens per step; work: of their node-layers",
    )  # fmt: skip
    whole = tried[0].last.tokens_per_step
    for one in tried:
        table.add_row(
            str(one.keys.get("early_layer", "")),
            one.keys["pruning"],
            str(one.amount or ""),
            f"{one.last.kept_per_step:.1f}",
            f"{one.last.tokens_per_step:.2f}",
            f"{one.last.tokens_per_step / whole:.1%}",
            f"{one.last.work.ratio:.2f}",
            f"{one.step_ms:.1f}",
            f"{one.tokens_per_s:.1f}",
            style="bold" if one is best else None,
        )
    console.print(table)


def write_curve(tried: list[Trial], model: str, batch_size: int, path: Path) -> None:
    """Writes every setting's figures as JSON, with what they were measured on."""
    rows = [
        {
            "config": one.keys,
            "kept_per_step": one.last.kept_per_step,
            "tokens_per_step": one.last.tokens_per_step,
            "work_ratio": one.last.work.ratio,
            "step_ms": one.step_ms,
            "tokens_per_s": one.tokens_per_s,
        }
        for one in tried
    ]
    about = {
        "model": model,
        "batch_size": batch_size,
        "machine": this_machine().model_dump(),
    }
    path.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


def write_preset(out: Path, nodes: int, best: Trial, off: Trial, batch_size: int) -> None:
    """Writes the best setting as a YAML preset, with what it was worth in a comment."""
    speed = best.tokens_per_s / off.tokens_per_s
    accepted = best.last.tokens_per_step / off.last.tokens_per_step
    kept, of = best.last.kept_per_step, off.last.kept_per_step
    keys = {"num_speculative_tokens": nodes, "sizing": "fixed", **best.keys}
    out.write_text(
        f"# Written by `vllm-propd tune`: batch size {batch_size}, "
        f"{this_machine().processor}.\n"
        f"# Against unpruned trees: {speed:.2f}x the tokens/s, {accepted:.1%} of the "
        f"tokens\n# per step, {kept:.1f} of {of:.1f} nodes kept.\n"
        + yaml.safe_dump(keys, sort_keys=False)
    )


def plot(tried: list[Trial], best: Trial, path: Path) -> None:
    """Plots acceptance and a step's time against the number of nodes kept."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    off = tried[0].last
    families: dict[str, list[Trial]] = {}
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
