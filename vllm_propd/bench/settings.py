"""What a benchmark is asked to measure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vllm_propd.bench.timing.paired import FEWEST

PASSES = 6
"""How often a benchmark goes through all points.

A machine that others share may be slow for minutes: such minutes should hit all points."""

OF_CUT_TEXT = (
    "prompt_tokens", "workload", "lengths", "trace_requests", "trace_rate", "rounds",
    "chunks", "most_chunks",
)  # fmt: skip
"""Settings without effect on chats, each of which is one chunk of its own length."""

OF_CHATS = ("prompts_each", "longest_chat")
"""Settings without effect on prompts that are cut from text."""


@dataclass(frozen=True)
class BenchSettings:
    """What to measure.

    Attributes:
        arms: as ``parse_arms`` takes them.
        batch_sizes: sequences generated together.
        max_tokens: new tokens of each; of chunks at most, where texts end by themselves.
        prompt_tokens: tokens of each prompt.
        rounds: the fewest turns of each arm after a warm-up; there is at least one with
            each group of prompts. 0: chunks only.
        seconds: the least time that each arm runs at each point.
        chunks: the fewest chunks, in each of which all arms have the same prompts
            (``bench.timing.paired``); 0: none.
        most_chunks: the most chunks, where medians are not known to ``precision`` before.
        starts: how often all engines are started, at most; each start runs chunks of its
            own.
        in_turn: whether chunks are a step of each arm in turn, in one process, and each
            of other prompts; there are no rounds then.
        precision: how far apart the quartiles of each median may be, relatively.
        temperature: 0: greedy.
        dtype: of weights and activations, as vLLM names it.
        enforce_eager: run without torch.compile.
        seed: of the prompts, of sampled requests, each of which has a seed of its own that
            is the same for all arms, and of the trace.
        workload: also measure by prompt length, by task, and on a trace of requests.
        lengths: prompt tokens, of the axis of length and of the trace's requests.
        prompts_each: prompts of each task, where prompts are chats.
        longest_chat: tokens of the longest chat; longer ones are left out, and those after
            which the model has no ``max_tokens`` positions.
        trace_requests: requests of the trace; None: twice the largest batch size.
        trace_rate: requests per second; None: as many as plain vLLM finishes at the
            largest batch size.

    Raises:
        ValueError: there are neither rounds nor chunks.
    """

    arms: str = "plain medusa ngram chain static propd"
    batch_sizes: tuple[int, ...] = (1, 4, 16)
    max_tokens: int = 128
    prompt_tokens: int = 128
    rounds: int = 3
    seconds: float = 0.0
    chunks: int = FEWEST
    most_chunks: int = 2 * FEWEST
    starts: int = 1
    in_turn: bool = False
    precision: float = 0.02
    temperature: float = 0.0
    dtype: str = "bfloat16"
    enforce_eager: bool = True
    seed: int = 0
    workload: bool = False
    lengths: tuple[int, ...] = (64, 256, 512)
    prompts_each: int = 8
    longest_chat: int = 2048
    trace_requests: int | None = None
    trace_rate: float | None = None

    def __post_init__(self) -> None:
        if not self.chunks and (self.in_turn or not self.rounds):
            other = "--in-turn (without rounds)" if self.in_turn else "--rounds 0"
            raise ValueError(
                f"{other} and --chunks 0: nothing is left to measure; give --chunks 1 or "
                "more"
            )

    def unused_by_chats(self) -> list[str]:
        """Returns the options that were set, as far as that shows, and chats ignore."""
        # Rounds that --in-turn leaves out are none of theirs.
        return self._unusual(
            name for name in OF_CUT_TEXT if not (name == "rounds" and self.in_turn)
        )

    def unused_by_text(self) -> list[str]:
        """Returns the options that were set, as far as that shows, and text ignores."""
        return self._unusual(OF_CHATS)

    def _unusual(self, names: Iterable[str]) -> list[str]:
        usual = BenchSettings()
        return [
            "--" + name.replace("_", "-")
            for name in names
            if getattr(self, name) != getattr(usual, name)
        ]

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt that is measured."""
        lengths = self.lengths if self.workload else ()
        return max((self.prompt_tokens, *lengths))
