"""What all items of the first run share: a device's options, notes, prompts, texts."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 48, 64
TEXT_DTYPE, SPEED_DTYPE = "float16", "bfloat16"
"""On a GPU. vLLM computes logits in the model's type, and the demo's reach 17: there the
last bit is 0.125 in bfloat16, more than ``texts.TIE``, and 0.016 in float16."""

BLOCKS = 8192
"""Of a GPU's cache: what a small model's could be takes seconds to list at each start."""

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_PROPD_UNTESTED_CUDA": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


@dataclass
class Setting:
    """Where and how items run.

    Attributes:
        device: ``cuda`` or ``cpu``.
        model: folder of the target, heads in ``propd/``.
        folder: for what one item leaves to the next.
        patience: times each item's time-out.
        short: without large batches.
        log: gets the output of all items; none: each has one in ``folder``.
    """

    device: str
    model: Path
    folder: Path
    patience: float = 1.0
    short: bool = False
    log: Path | None = None

    @property
    def on_gpu(self) -> bool:
        """Else a rehearsal."""
        return self.device == "cuda"

    def to_json(self) -> str:
        """For a child's environment."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> Setting:
        """Its way back."""
        fields = json.loads(text)
        paths = {name: fields[name] for name in ("model", "folder", "log")}
        return cls(**{**fields, **{name: x and Path(x) for name, x in paths.items()}})

    def public(self) -> dict[str, Any]:
        """What a report says of it."""
        return {"device": self.device, "model": self.model.name, "patience": self.patience}

    def prepare_process(self, interpreted: bool) -> None:
        """Before anything of vLLM or Triton is imported."""
        os.environ.update(ENVIRONMENT)
        if interpreted and not self.on_gpu:
            os.environ["TRITON_INTERPRET"] = "1"

    def speed_options(self) -> dict[str, Any]:
        """Of ``engine``, where texts are not compared."""
        return {"dtype": SPEED_DTYPE} if self.on_gpu else {}

    def notes(self, item: str) -> Notes:
        """An item's."""
        return Notes(self.folder / f"{item}.json")

    def found(self, item: str) -> dict[str, Any]:
        """What an item has noted so far."""
        path = self.folder / f"{item}.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    def forget(self, item: str) -> None:
        """What an item has noted in an earlier run."""
        (self.folder / f"{item}.json").unlink(missing_ok=True)

    def options(self, compiled: bool, **others: Any) -> dict[str, Any]:
        """Of ``vllm.LLM``."""
        own: dict[str, Any] = {"kv_cache_memory_bytes": 1 << 28, "dtype": "float32"}
        if self.on_gpu:
            own = {
                "dtype": TEXT_DTYPE,
                "num_gpu_blocks_override": BLOCKS,
                "gpu_memory_utilization": 0.3,
                "attention_backend": "FLASH_ATTN",
                # Its warm-up raises on PyTorch 2.11.
                "kernel_config": {
                    "enable_jit_warmup": False,
                    "enable_cutedsl_warmup": False,
                },
            }
        return {
            "model": str(self.model), "max_model_len": 1024, "max_num_seqs": 64, "seed": 0,
            "enforce_eager": not compiled, "disable_log_stats": False, **own, **others,
        }  # fmt: skip

    @contextmanager
    def engine(
        self, propd: dict[str, Any] | None = None, compiled: bool = False, **others: Any
    ) -> Iterator[Any]:
        """An engine of this process: plain, or with settings of method ``propd``."""
        import gc

        import torch
        from vllm import LLM

        if propd is not None:
            others["speculative_config"] = {"method": "propd", **propd}
        llm = LLM(**self.options(compiled, **others))
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()
            if self.on_gpu:
                torch.cuda.empty_cache()


class Notes:
    """What an item finds, on disk as soon as it is known."""

    def __init__(self, path: Path):
        self._path, self._found = path, dict[str, Any]()

    def __setitem__(self, name: str, value: Any) -> None:
        self.update({name: value})

    def update(self, found: dict[str, Any]) -> None:
        """Several at once."""
        self._found.update(found)
        partly = self._path.with_suffix(".part")  # an item may be killed at any time
        partly.write_text(json.dumps(self._found, default=str))
        partly.replace(self._path)


def prompts(setting: Setting, count: int = PROMPTS, tokens: int = PROMPT_TOKENS) -> Any:
    """Token ids of places in Python's own library."""
    from transformers import AutoTokenizer

    from vllm_propd.corpus import held_out_snippets

    tokenizer = AutoTokenizer.from_pretrained(setting.model)
    texts = held_out_snippets(count, seed=1, min_chars=2000)
    return [{"prompt_token_ids": tokenizer(text)["input_ids"][:tokens]} for text in texts]


def greedy(tokens: int = NEW_TOKENS, logprobs: int | None = None) -> Any:
    """As many tokens, always."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0.0, max_tokens=tokens, ignore_eos=True, logprobs=logprobs
    )


def generate(llm: Any, inputs: Any, params: Any) -> tuple[list[list[int]], float]:
    """Each prompt's tokens, and the seconds of all."""
    began = time.perf_counter()
    outputs = llm.generate(inputs, params, use_tqdm=False)
    seconds = time.perf_counter() - began
    return [list(output.outputs[0].token_ids) for output in outputs], seconds


def margins(outputs: Any) -> list[list[float]]:
    """By how much each token's log probability was above the next best's."""
    found = []
    for output in outputs:
        of_one = []
        for place in output.outputs[0].logprobs:
            best = sorted((entry.logprob for entry in place.values()), reverse=True)
            of_one.append(best[0] - best[1])
        found.append(of_one)
    return found
