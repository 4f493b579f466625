"""What a batch job is: its files, its engines, how answers are sampled."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vllm_propd.batch.hosts import shared_cores
from vllm_propd.batch.prompts import digest
from vllm_propd.batch.rows import SAMPLING, RowError, sampling_of
from vllm_propd.batch.tokenizer import TokenizerSource
from vllm_propd.config import METHOD, REQUEST_METRICS

SETTLED = {
    "model": "it is the command's first argument",
    "tensor_parallel_size": "use --tensor-parallel-size",
    "speculative_config": "use --speculative-config",
}


class BatchJob(BaseModel):
    """A batch job.

    Attributes:
        model: folder or hub name of the target.
        prompts: JSON lines, Parquet, or folders of them.
        out: folder of the answers; on a cluster all hosts must share it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    prompts: list[Path] = Field(min_length=1)
    out: Path
    format: Literal["jsonl", "parquet"] = "jsonl"
    engines: int = Field(1, ge=1)
    tensor_parallel_size: int = Field(1, ge=1)
    speculative_config: str | dict[str, Any] | None = METHOD
    engine_kwargs: dict[str, Any] = {}
    sampling: dict[str, Any] = {}
    rows_at_once: int = Field(32, ge=1)
    address: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, remedy in SETTLED.items():
            if name in self.engine_kwargs:
                raise ValueError(f"--engine-kwargs has '{name}': {remedy}")
        if unknown := sorted(self.sampling.keys() - SAMPLING.keys()):
            raise ValueError(
                f"--sampling has {', '.join(unknown)}: a batch knows {', '.join(SAMPLING)}"
            )
        try:
            typed = sampling_of(self.sampling)
        except RowError as error:
            raise ValueError(f"--sampling: {error}") from error
        object.__setattr__(self, "sampling", typed)
        return self

    @property
    def target(self) -> str:
        """The target's absolute path or, where there is no such folder, its hub name."""
        return _absolute(self.model)

    @property
    def tokenizer(self) -> TokenizerSource:
        """The tokenizer of the engines, which ``engine_kwargs`` name as vLLM has it."""
        given = self.engine_kwargs
        return TokenizerSource(
            _absolute(given.get("tokenizer") or self.model),
            given.get("tokenizer_revision") or given.get("revision"),
            bool(given.get("trust_remote_code")),
        )

    def decides(self) -> dict[str, Any]:
        """Returns what a job that goes on must have in common with the one before."""
        return {
            "model": self.target,
            "prompts": [str(path.resolve()) for path in self.prompts],
            "their contents": digest(self.prompts),
            "sampling": self.sampling,
            "format": self.format,
        }

    def engine(self) -> dict[str, Any]:
        """Returns the keyword arguments of each engine."""
        # Within Ray's actor: the workers of an engine are its own processes.
        executor = "uni" if self.tensor_parallel_size == 1 else "mp"
        found = {
            "tensor_parallel_size": self.tensor_parallel_size,
            "distributed_executor_backend": executor,
            **self.engine_kwargs,
        }
        if "tokenizer" in found:
            found["tokenizer"] = self.tokenizer.name
        if self.speculative_config is not None:
            found["speculative_config"] = self.speculative_config
            found.setdefault("per_request_spec_decode_metrics", "summary")
        return found

    def engine_env(self, on_cpu: bool) -> dict[str, str]:
        """Returns the environment of each engine.

        Args:
            on_cpu: whether no host of the cluster, which is joined, has a GPU.
        """
        level = os.environ.get("VLLM_LOGGING_LEVEL", "ERROR")
        found = {REQUEST_METRICS: "1", "VLLM_LOGGING_LEVEL": level}
        if on_cpu:
            found |= shared_cores(self.engines, self.tensor_parallel_size)
        return found


def _absolute(name: str) -> str:
    """Returns a folder's absolute path: Ray's workers are in other ones. Else the name."""
    path = Path(name)
    return str(path.resolve()) if path.exists() else name
