"""``vllm-propd simulate``: settings predicted from one recording (``simulation``)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import AutoConfig
from vllm import SamplingParams

from vllm_propd.bench.arms import Arm, Heads, arm_texts, parse_arm, settings_of
from vllm_propd.bench.engines import NEVER_FULL, ArmEngine, Engine
from vllm_propd.bench.report import wide_console
from vllm_propd.bench.settings import BenchSettings
from vllm_propd.bench.setup import engine_options, prompt_texts, tokenizer_of
from vllm_propd.bench.workloads.points import cut_prompts
from vllm_propd.config import ProPDConfig
from vllm_propd.core.drafting.drafter import Drafter
from vllm_propd.core.sizing.controller import DynamicSizing
from vllm_propd.core.sizing.planner import Planner
from vllm_propd.core.sizing.pruning_recall import PruningRecall
from vllm_propd.core.sizing.step_cost import StepCost
from vllm_propd.core.sources.combined import Sources
from vllm_propd.engine.startup.cost_table import CostTable
from vllm_propd.heads.calibration import calibration_for
from vllm_propd.heads.checkpoint import load_heads
from vllm_propd.heads.early import early_layers
from vllm_propd.heads.known_prices import known_prices
from vllm_propd.simulation.drafted_replay import Clock, replay_drafted
from vllm_propd.simulation.planned_replay import replay_planned
from vllm_propd.simulation.recordings import answers_of, texts_of
from vllm_propd.simulation.replay import Replayed, replay


@dataclass(frozen=True)
class Predicted:
    """What is predicted of one setting at one batch size.

    Attributes:
        arm: the setting's name.
        batch_size: sequences generated together.
        replayed: what the recording says.
        step_s: seconds of a step by the cost table, drafting included.
        plain_s: seconds of a step without drafts, by the same table.
    """

    arm: str
    batch_size: int
    replayed: Replayed
    step_s: float
    plain_s: float

    @property
    def tokens_per_s(self) -> float:
        """New tokens per second, over all sequences."""
        return self.batch_size * self.replayed.tokens_per_step / self.step_s

    @property
    def ratio_to_plain(self) -> float:
        """Predicted tokens/s divided by plain vLLM's."""
        return self.replayed.tokens_per_step * self.plain_s / self.step_s


@dataclass(frozen=True)
class Costs:
    """How long steps and drafting take.

    Attributes:
        step: seconds of steps, by tokens.
        draft: seconds of drafting, by sequences.
    """

    step: StepCost
    draft: StepCost

    def step_s(self, tokens: float, left: float | None = None) -> float:
        """Returns the seconds of a step; with ``left`` only so many pass all layers."""
        return self.step.seconds_of(tokens, left=left)

    def planner(self, config: ProPDConfig) -> Planner:
        """Returns a planner with these costs that has learned nothing yet."""
        recall = PruningRecall() if config.plans_pruning else None
        return Planner(self.step, recall)

    def sizing(
        self, config: ProPDConfig, promised: dict[int, float]
    ) -> Callable[[Clock], DynamicSizing]:
        """Returns what makes a sizing with these costs that has learned nothing yet."""

        def made(clock: Clock) -> DynamicSizing:
            draft = copy.deepcopy(self.draft) if config.heads else None
            return DynamicSizing(
                copy.deepcopy(self.step), draft, config.num_speculative_tokens,
                NEVER_FULL, promised=promised, clock=clock,
            )  # fmt: skip

        return made

    def tree_step_s(self, config: ProPDConfig, found: Replayed, batch_size: int) -> float:
        """Returns the seconds of a step with trees, drafting included."""
        draft = self.draft.seconds_of(batch_size)
        left = batch_size * (1 + found.kept) if config.has_rule else None
        return draft + self.step_s(batch_size * (1 + found.drafted), left)


def run_simulate(
    model: Path,
    heads: Path,
    prompts: list[Path],
    early_layer: int | None,
    nodes: int,
    num_prompts: int,
    settings: BenchSettings,
) -> list[Predicted]:
    """Records, replays every arm at every batch size, prints a table.

    Args:
        model: folder of the target.
        heads: folder of the heads, in ProPD's format.
        prompts: files or folders to cut prompts from; none: held-out files of Python's
            library.
        early_layer: the one whose early head is recorded; None: the heads' first.
        nodes: how many nodes recorded trees have; settings may have at most as many.
        num_prompts: how many prompts are recorded in all.
        settings: arms, batch sizes, prompts; rounds are not needed.

    Raises:
        ValueError: an arm that is not ProPD's or that a recording cannot tell of, or too
            little text.
    """
    known = early_layers(heads)
    layer = early_layer if early_layer is not None else next(iter(known), None)
    console = wide_console()
    configs = _configs(settings, heads, layer, num_prompts, nodes)
    keys: dict[str, Any] = {"model": str(heads), "num_speculative_tokens": nodes}
    if layer is not None:
        everything = {"pruning": "path_probability", "keep_nodes": 255}
        keys |= {**everything, "early_layer": layer}
    arm = Arm("recording", {"method": "propd", "sizing": "fixed", **keys})
    length, seed = settings.prompt_tokens, settings.seed
    given = prompt_texts(model, prompts)
    ids = cut_prompts(tokenizer_of(model), given, num_prompts, length, seed)
    size = max(settings.batch_sizes)
    with Progress(console=console) as bar:
        task = bar.add_task("recording", total=None)
        engine = Engine(arm.speculative_config, engine_options(model, settings, nodes))
        llm = engine.llm
        llm.collective_rpc("start_recording", args=(NEVER_FULL, False))
        params = SamplingParams(
            temperature=0.0, max_tokens=settings.max_tokens, ignore_eos=True,
            detokenize=False,
        )  # fmt: skip
        ArmEngine(arm, engine).run_all(ids, size, params)
        answers = answers_of(llm.collective_rpc("recorded_answers")[0])
        texts = texts_of(llm.collective_rpc("take_recording")[0])
        bar.update(task, description="timing steps")
        table = CostTable.model_validate(llm.collective_rpc("step_costs")[0])
        draft = table.draft_cost()
        assert draft is not None  # recorded trees are of heads
        costs = Costs(table.step_cost(), draft)
        engine.close()
    found = []
    for name, config in configs.items():
        fixed = replay(texts, config) if config.sizing == "fixed" else None
        for size in settings.batch_sizes:
            plain = costs.step_s(size)
            if config.looks_up or config.recycles:
                drafter, promised = drafter_of(config, model, heads)
                sizing = costs.sizing(config, promised)
                asked = [answer.of_ranks(config.ranks) for answer in answers]
                planned = replay_drafted(
                    asked, drafter, sizing, costs.step, costs.draft, size
                )
                found.append(Predicted(name, size, planned, planned.step_s, plain))
            elif fixed is None:
                planned = replay_planned(
                    texts, config, costs.planner(config), costs.draft, size
                )
                found.append(Predicted(name, size, planned, planned.step_s, plain))
            else:
                seconds = costs.tree_step_s(config, fixed, size)
                found.append(Predicted(name, size, fixed, seconds, plain))
    show(found, console)
    return found


def _configs(
    settings: BenchSettings, heads: Path, layer: int | None, num_prompts: int, nodes: int
) -> dict[str, ProPDConfig]:
    """Returns the arms' configs, by name; refuses what a recording cannot tell of.

    Args:
        settings: arms and batch sizes.
        heads: folder of the heads.
        layer: the early layer that is recorded; None: the heads have no early head.
        num_prompts: how many prompts are recorded.
        nodes: how many nodes recorded trees have.

    Raises:
        ValueError: an arm is unknown, not ProPD's, or asks for what is not recorded.
    """
    configs = {}
    of_all = Heads(heads, heads, load_heads(heads).num_heads)
    for text in arm_texts(settings.arms):
        arm = parse_arm(text, of_all)
        if not arm.is_ours:
            raise ValueError(f"--arms {text}: only ProPD's own arms can be simulated")
        config = settings_of(arm)
        if config.sizing == "dynamic" and config.has_rule:
            raise ValueError(
                f"--arms {text}: with dynamic sizes a recording knows pruning 'auto' and "
                "'off' only"
            )
        beside = config.looks_up or config.recycles
        if beside and (size := max(settings.batch_sizes)) > num_prompts:
            raise ValueError(
                f"--batch-sizes {size}: {arm.name} learns from text to text, and needs as "
                f"many prompts: --num-prompts {size} or more"
            )
        if missing := _not_recorded(config, heads, layer, nodes):
            raise ValueError(f"--arms {text}: {missing}")
        # What the early head says is recorded of the heads' own trees only.
        if config.plans_pruning and (beside or layer is None):
            config = config.without_pruning()
        if config.prunes:
            if config.early_layer not in (None, layer):
                raise ValueError(f"--arms {text}: recorded is early layer {layer}")
            config = config.model_copy(update={"early_layer": layer})
        configs[arm.name] = config
    return configs


def _not_recorded(
    config: ProPDConfig, heads: Path, layer: int | None, nodes: int
) -> str | None:
    """Says what an arm needs of a recording and it lacks, with the remedy; or None.

    Arms with other sources than heads are not replayed from trees, but grown anew from the
    candidates.
    """
    if config.heads and Path(config.model or heads).resolve() != heads.resolve():
        return f"recorded are the heads in {heads}: give --heads {config.model}"
    whole = ProPDConfig().num_candidates
    if config.looks_up or config.recycles:
        if config.ranks <= whole:
            return None
        return f"recorded are {whole} candidates of each head: num_candidates={whole}"
    if config.has_rule and layer is None:
        return (
            f"pruning '{config.pruning}' needs an early head, and {heads} has none: leave "
            "the arm out, or train heads with some (`vllm-propd train --early-layers`)"
        )
    if config.node_values != "head_probability":
        return (
            f"a recording knows what heads said, not node_values '{config.node_values}': "
            "leave the arm out, or add node_values=head_probability"
        )
    if config.tree == "chain":  # of which only its depth counts
        if config.sizing == "fixed":
            return None
        return "chains of dynamic sizes are not replayed: add sizing=fixed to the arm"
    if config.num_candidates != whole:
        return (
            f"recorded are trees of {whole} candidates of each head, not of "
            f"{config.num_candidates}: leave num_candidates out"
        )
    if (wanted := config.num_speculative_tokens) > nodes:
        return (
            f"its trees have up to {wanted} nodes, and recorded are {nodes}: --nodes "
            f"{wanted}, or add num_speculative_tokens={nodes} to the arm"
        )
    return None


def drafter_of(
    config: ProPDConfig, model: Path, heads: Path
) -> tuple[Drafter, dict[int, float]]:
    """Returns a drafter that knows what training knows, and the tokens per step promised.

    Args:
        config: its sources.
        model: folder of the target.
        heads: folder of the heads.
    """
    vocabulary = AutoConfig.from_pretrained(model).get_text_config().vocab_size
    sources = Sources(vocabulary, config.looks_up, config.shares, config.recycles)
    if not config.heads:
        return Drafter(sources), {}
    count = load_heads(heads).num_heads
    known = calibration_for(config, heads, count)
    drafter = Drafter(sources, known_prices(config, known, count), learns=True)
    return drafter, {} if known is None else known.tokens_per_step


def show(found: list[Predicted], console: Console) -> None:
    """Prints the predictions as a table."""
    table = Table(
        "arm", "batch", "tokens/step", "drafted", "kept", "step, ms", "tokens/s",
        "against plain",
        title="predicted from a recording",
        caption="trees of several sources are not pruned; times: forward passes without "
        "context, and asking the heads",
    )  # fmt: skip
    for one in found:
        table.add_row(
            one.arm,
            str(one.batch_size),
            f"{one.replayed.tokens_per_step:.2f}",
            f"{one.replayed.drafted:.1f}",
            f"{one.replayed.kept:.1f}",
            f"{1e3 * one.step_s:.1f}",
            f"{one.tokens_per_s:.1f}",
            f"{one.ratio_to_plain:.2f}x",
        )
    console.print(table)
