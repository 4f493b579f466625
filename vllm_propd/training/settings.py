"""Every setting of training, in one class: the options of ``vllm-propd train``."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from vllm_propd.fast_dtype import fast_dtype


class TrainSettings(BaseModel):
    """How to train heads on a frozen target."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    exclusive: ClassVar[tuple[str, ...]] = ("minutes", "steps")
    """One of these on the command line takes the place of any in a recipe."""

    num_heads: int = Field(4, ge=1, le=16, description="Medusa heads.")
    num_layers: int = Field(2, ge=1, description="Residual blocks of a head.")
    output_layer: Literal["target", "own"] = Field(
        "target",
        description="The target's output layer for all heads, or one of each head's own "
        "(started from the target's; larger and slower).",
    )
    draft_tokens: int = Field(
        16384,
        ge=0,
        description="Tokens that Medusa heads may draft, the most frequent ones in the "
        "training text: fewer make heads cheaper to ask (FR-Spec); 0: all.",
    )
    knows_root: bool = Field(
        True,
        description="Heads read the embedding of the root, the target's last token, which "
        "is known when they are asked; Medusa's do not.",
    )
    transition_rank: int = Field(
        64,
        ge=0,
        description="Rank of the transition term, by which heads know the token before the "
        "one that they predict; 0: without.",
    )
    early_layers: tuple[int, ...] = Field(
        (1, 2, 3), description="Layers with an early head after them, counted from 1."
    )
    early_rank: int = Field(
        0,
        ge=0,
        description="Rank of the early heads' own output layers, for large "
        "vocabularies; 0: the target's output layer.",
    )
    minutes: float | None = Field(
        None, gt=0, description="Training time; 10 where no number of steps is given."
    )
    steps: int | None = Field(None, ge=1, description="Training steps, not minutes.")
    batch_size: int = Field(8, ge=1, description="Sequences a step, over all workers.")
    accumulate: int = Field(1, ge=1, description="Parts that a step's batch is cut into.")
    length: int = Field(256, ge=8, description="Tokens of a training sequence.")
    labels: Literal["kl", "hard"] = Field(
        "kl", description="The target's distribution, or its most probable token."
    )
    sampled_tokens: int = Field(
        1200,
        ge=0,
        description="The loss is among the target's best tokens in a worker's part of the "
        "batch and so many random ones, which stand for the rest; 0: the whole vocabulary, "
        "which is exact, slow and large.",
    )
    kept_gib: float = Field(
        16.0,
        ge=0,
        description="Most disk for the target's hidden states, which are computed once; "
        "they are removed at the end.",
    )
    learning_rate: float = Field(3e-3, gt=0, description="Peak, of a cosine schedule.")
    precision: Literal["auto", "bfloat16", "float32"] = Field(
        "auto",
        description="Of the products (autocast); weights stay float32. auto: bfloat16, but "
        "float32 on CPUs without AVX-512, where that is faster.",
    )
    save_every: float = Field(60.0, gt=0, description="Seconds between checkpoints.")
    seed: int = Field(0, ge=0, description="Seed of the batches.")

    @field_validator("early_layers", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """Splits the value of an option, one word like ``1,2,3``."""
        return (
            [part for part in value.split(",") if part] if isinstance(value, str) else value
        )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.minutes is not None and self.steps is not None:
            raise ValueError("--minutes and --steps are two ways to say when to stop")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"--batch-size {self.batch_size} is not a multiple of --accumulate "
                f"{self.accumulate}"
            )
        if len(set(self.early_layers)) < len(self.early_layers) or any(
            layer < 1 for layer in self.early_layers
        ):
            raise ValueError(
                f"--early-layers {self.early_layers}: distinct layers, counted from 1"
            )
        return self

    @property
    def seconds(self) -> float | None:
        """The training time in seconds, ten minutes by default; None where steps decide."""
        if self.steps is not None:
            return None
        return 60 * (10.0 if self.minutes is None else self.minutes)

    def precision_on(self, device_type: str) -> Literal["bfloat16", "float32"]:
        """Returns the type of the products on a device, as PyTorch names it."""
        return fast_dtype(device_type) if self.precision == "auto" else self.precision

    @property
    def longest_prompt(self) -> int:
        """The most tokens of a prompt: the rest of a sequence is for what it answers."""
        return self.length * 3 // 4

    @property
    def tokens_per_step(self) -> int:
        """The tokens of a step, over all workers."""
        return self.batch_size * self.length

    def progress(self, step: int, seconds: float) -> float:
        """Returns the share of the training that is done, 0 to 1."""
        if self.steps is not None:
            return min(1.0, step / self.steps)
        assert self.seconds is not None
        return min(1.0, seconds / self.seconds)
