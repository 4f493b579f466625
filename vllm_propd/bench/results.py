"""What a benchmark found: ``results.json``."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field
from torch.backends.cpu import get_cpu_capability

from vllm_propd.bench.timing.turns import FAST, SHOWN

PACKAGES = ("vllm-propd", "torch", "transformers", "numba", "numpy")


BATCH, TRACE = "batch", "trace"
"""Names of workloads; the others are like ``length 256`` and ``task prose``."""

TASK = "task "
"""What the name of a workload begins with that is one task, or one category of chats."""


def point_name(workload: str, batch_size: int) -> str:
    """Returns the readable name of what arms are compared on, like ``batch 4``."""
    return f"batch {batch_size}" if workload == BATCH else workload


class Row(BaseModel):
    """The results of one arm at one point of a workload; medians over rounds."""

    arm: str
    workload: str = Field(
        description="What varies: `batch`, the batch size; `length N`, prompts of N "
        "tokens; `task NAME`, their text; `trace`, mixed requests arriving over time."
    )
    batch_size: int = Field(
        description="Sequences generated together; of a trace, the most at a time."
    )
    tokens_per_s: float = Field(
        description="New tokens per second, all sequences, from when each has its first "
        "(of a trace, from its start); the batch stays full until `max_tokens` for each "
        "have come out together. The median of rounds, the mean over groups of prompts."
    )
    tokens_per_s_min: float = Field(description="Of the slowest round.")
    tokens_per_s_max: float = Field(description="Of the fastest round.")
    ratio_to_plain: float = Field(
        description="Tokens/s over plain vLLM's, both undisturbed (other work on the "
        f"machine only slows): each step as long as quantile {FAST} in `step_times`, "
        "of rare kinds less (`turns.fast_steps`); the mean over groups "
        "of prompts. Of a trace: of both arms' fastest turns."
    )
    wall_ratio: float | None = Field(
        default=None,
        description="Tokens/s over plain vLLM's by whole wall clock, prompts included and "
        "texts to their natural ends: all tokens of the chunks over all their seconds "
        "(`bench/timing/paired.py`). None where there were no chunks.",
    )
    wall_ratio_median: float | None = Field(
        default=None, description="The same of each chunk; their median."
    )
    wall_ratio_quartiles: tuple[float, float] | None = Field(
        default=None, description="Likewise, their quartiles."
    )
    wall_ratio_median_quartiles: tuple[float, float] | None = Field(
        default=None,
        description="Between which the median of as many other chunks is half of the "
        "times (bootstrap).",
    )
    wall_tokens_per_step: float | None = Field(
        default=None, description="`tokens_per_step` of the chunks, all together."
    )
    heads_share: float | None = Field(
        default=None, description="Of the chunks' time, spent on asking the heads."
    )
    in_vain_share: float | None = Field(
        default=None,
        description="Likewise, where each sequence put out no more than one token.",
    )
    num_chunks: int | None = Field(
        default=None,
        description="How many chunks these are of. None where there were none, and in "
        "older results, where `rounds` counts them.",
    )
    chunks: list[tuple[int, float]] = Field(
        default=[], description="Tokens and seconds of each chunk."
    )
    rounds: int = Field(description="Turns that count.")
    turns: list[tuple[float, int, float]] = Field(
        default=[],
        description="Of each: when half of it was over, seconds from the point's begin; "
        "its group of prompts; tokens/s. Without those whose texts all ended with their "
        "first tokens, which have no speed.",
    )
    step_times: list[tuple[int, int, int, list[float]]] = Field(
        default=[],
        description="Sequences of a step; draft tokens over all of them; how many such "
        f"steps there were; milliseconds: quantiles {', '.join(map(str, SHOWN))}.",
    )
    tokens_per_step: float = Field(description="New tokens of a sequence per decode step.")
    drafted_per_step: float = Field(description="Draft tokens of a step that has drafts.")
    kept_per_step: float | None = Field(
        default=None,
        description="Of these, let through by early pruning. None, as all that stopwatches "
        "in the worker tell, where engines have none: without `rounds`.",
    )
    work_ratio: float | None = Field(
        default=None,
        description="Node-layers run over those of the unpruned trees, roots included; "
        "None likewise.",
    )
    acceptance_by_depth: list[float] = Field(
        description="Share of such steps that accepted a draft of depth 1, 2, ..."
    )
    accepted_by_rank: list[list[float]] = Field(
        default=[],
        description="Share of trees whose accepted node of depth 1, 2, ... was its "
        "parent's best child, second, ...; from a turn of its own at the smallest batch "
        "size.",
    )
    tokens_by_size: list[float] = Field(
        default=[],
        description="From the same turn: tokens per step, had only the best 0, 1, ... "
        "nodes of each tree been verified; empty where sizes change.",
    )
    reliability: list[list[tuple[float, float]]] = Field(
        default=[],
        description="Of each head: what it says of its candidates, and how often that has "
        "come true after the whole benchmark; empty where nothing is learned.",
    )
    step_ms: dict[str, float] = Field(
        description="Means by part of a step (`bench/timing/step_profiler.py`), in "
        "milliseconds; `rest`: what no part explains; `step`: all of it, seen from "
        "outside. Empty without `rounds`."
    )
    host_ms_per_step: float | None = Field(
        default=None,
        description="Of `step`, all but the forward passes: on GPUs, asynchronous "
        "scheduling hides some of it in plain vLLM, and speculation shows it. None without "
        "`rounds`.",
    )
    measured_step_ms: list[float] = Field(
        description="Steps of the last round, drafting left out, where sizing is dynamic."
    )
    estimated_step_ms: list[float] = Field(description="The same, as estimated before.")
    tree_sizes: list[float] = Field(description="Nodes per sequence at the same steps.")
    peak_rss_mib: float = Field(
        description="Of the engine's workers together; ProPD's arms share one."
    )
    requests_per_s: float | None = Field(
        default=None,
        description="Of a trace: mean rate of arrivals. Below what an arm could serve, it "
        "bounds tokens/s; the latencies then tell the arms apart. None elsewhere.",
    )
    first_token_ms: float | None = Field(
        default=None,
        description="Of a trace: from a request's arrival to its first token; median over "
        "the requests of all rounds. None elsewhere.",
    )
    first_token_ms_p90: float | None = Field(
        default=None, description="Likewise, 90th percentile."
    )
    per_token_ms: float | None = Field(
        default=None,
        description="Of a trace: a request's time per token after its first; median over "
        "the requests of all rounds. None elsewhere.",
    )
    per_token_ms_p90: float | None = Field(
        default=None, description="Likewise, 90th percentile."
    )
    identical_to_plain: int = Field(
        description="Prompts whose text is plain vLLM's in every turn: whole; of rounds, "
        "as far as both go."
    )
    prompts: int = Field(description="Prompts compared.")
    config: dict[str, Any] | None = Field(description="The speculative config.")
    seed: int

    @property
    def ratio(self) -> float:
        """The speed against plain vLLM: by whole wall clock, or else by fast steps."""
        wall = self.wall_ratio_median
        return self.ratio_to_plain if wall is None else wall

    @property
    def per_step(self) -> float:
        """Tokens per step of what ``ratio`` is of: of chunks, or else of rounds."""
        wall = self.wall_tokens_per_step
        return self.tokens_per_step if wall is None else wall

    @property
    def point(self) -> str:
        """The readable name of what the arms were compared on; see ``point_name``."""
        return point_name(self.workload, self.batch_size)


class Machine(BaseModel):
    """The machine that a benchmark ran on."""

    processor: str
    cores: int
    system: str
    instructions: str = Field("", description="The widest that PyTorch uses on this CPU.")


class Results(BaseModel):
    """Everything that a benchmark found, as in ``results.json``."""

    model: str
    parameters: int = Field(description="Of the target.")
    inflated: bool = Field(description="Made large out of a small model.")
    dtype: str
    chats: list[str] = Field(
        default=[], description="Files of chats; empty: prompts are cut from text."
    )
    prompt_tokens: int = Field(
        description="Of each prompt, on the axis of batch size; of chats, at most."
    )
    max_tokens: int = Field(description="New ones of each sequence.")
    rounds: int = Field(description="Turns of each arm at each point; at least.")
    starts: int = Field(1, description="Of all engines, for the chunks.")
    in_turn: bool = Field(False, description="Chunks were a step of each arm in turn.")
    temperature: float
    measured: str = Field("", description="The day it began, as YYYY-MM-DD.")
    machine: Machine
    versions: dict[str, str]
    rows: list[Row] = Field(default_factory=list)

    def row(self, arm: str, batch_size: int) -> Row | None:
        """Returns an arm's row at a batch size; None where it was not measured."""
        wanted = (arm, batch_size)
        found = [row for row in self.by_batch if (row.arm, row.batch_size) == wanted]
        return found[0] if found else None

    @property
    def by_batch(self) -> list[Row]:
        """The rows of workload ``batch``, in which the batch size varies."""
        return [row for row in self.rows if row.workload == BATCH]

    @property
    def arms(self) -> list[str]:
        """The arms' names, in the order of measurement."""
        return list(dict.fromkeys(row.arm for row in self.rows))

    @property
    def batch_sizes(self) -> list[int]:
        """The batch sizes of workload ``batch``, in ascending order."""
        return sorted({row.batch_size for row in self.by_batch})

    @property
    def workloads(self) -> list[str]:
        """The workloads other than ``batch``, in the order of measurement."""
        names = dict.fromkeys(row.workload for row in self.rows)
        return [name for name in names if name != BATCH]

    def caption(self) -> str:
        """Returns one line that says what was measured, where and how."""
        kind = "an inflated small model, not a published one" if self.inflated else ""
        size = f"{self.parameters / 1e9:.2f}B parameters" + (f" ({kind})" if kind else "")
        machine = f"{self.machine.cores} cores of {self.machine.processor}"
        if self.machine.instructions:
            machine += f" ({self.machine.instructions})"
        work = f"{self.max_tokens} new tokens after {self.prompt_tokens}"
        if self.chats:
            work = f"answers of at most {self.max_tokens} tokens, {', '.join(self.chats)}"
        return (
            f"{size}, {self.dtype}, {work}, temperature {self.temperature:g}; {machine}; "
            f"{self._measure()}"
        )

    def _measure(self) -> str:
        """Says how the ratios to plain vLLM were measured."""
        if any(row.wall_ratio_median is not None for row in self.rows):
            measure = (
                "whole wall clock, prompts included: the median of chunks, in which all "
                "arms have the same prompts"
                + (", a step of each in turn" if self.in_turn else " within seconds")
                + " (and its own quartiles)"
            )
            return measure + (f"; {self.starts} starts of all engines" * (self.starts > 1))
        return f"{self.rounds} or more rounds, of whose fast steps ratios are"


def this_machine() -> Machine:
    """Describes the machine that this process runs on."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if "model name" in line]
        name = lines[0].partition(":")[2].strip() if lines else name
    return Machine(
        processor=name,
        cores=os.cpu_count() or 1,
        system=platform.platform(),
        instructions=get_cpu_capability(),
    )


def installed_versions() -> dict[str, str]:
    """Returns the versions of Python, vLLM and the other packages that figures rest on."""
    import vllm

    found = {"python": platform.python_version(), "vllm": vllm.__version__}
    return found | {name: version(name) for name in PACKAGES}
