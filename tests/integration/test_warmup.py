"""No request waits for a kernel that is compiled: the start has met all of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import MODEL
from made_heads import heads_in

SCRIPT = """
import json, sys
from vllm_propd.core import numba_beside_vllm
from numba.core.registry import CPUDispatcher
from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams

def kernels():
    found = {}
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("vllm_propd."):
            for name, one in vars(module).items():
                if isinstance(one, CPUDispatcher):
                    found[f"{one.py_func.__module__}.{name}"] = len(one.signatures)
    return found

def main():
    llm = LLM(
        sys.argv[1], dtype="float32", enforce_eager=True, max_num_seqs=4, max_model_len=512,
        kv_cache_memory_bytes=1 << 27,
        speculative_config={"method": "propd", **json.loads(sys.argv[2])},
    )
    before = kernels()
    asked = StructuredOutputsParams(regex="[a-z ]{20,30}")
    params = [
        SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True),
        SamplingParams(temperature=0.8, max_tokens=64, ignore_eos=True),
        SamplingParams(temperature=0.0, max_tokens=30, structured_outputs=asked),
        SamplingParams(temperature=0.0, max_tokens=64, repetition_penalty=1.1),
    ]
    texts = ["def add(a, b):\\n    return a + b\\n\\ndef sub(a, b):\\n"] * 4
    for _ in range(3):
        llm.generate(texts, params, use_tqdm=False)
    new = {k: v for k, v in kernels().items() if v > before.get(k, 0)}
    print("COMPILED", json.dumps(new))
    llm.llm_engine.engine_core.shutdown()

if __name__ == "__main__":
    main()
"""
SETTINGS = {
    "all sources": {"lookup": "shared"},
    "fixed sizes, pruned, typical": {
        "sizing": "fixed", "pruning": "path_probability", "keep_nodes": 8,
        "acceptance": "typical",
    },
    "fixed sizes, the token before": {"sizing": "fixed"},
}  # fmt: skip
TERMS = {"fixed sizes, the token before": ("root", "transition")}
"""What made heads know, where the setting is not about the model's own."""


@pytest.mark.parametrize("setting", SETTINGS)
def test_requests_compile_nothing(setting: str, tmp_path: Path) -> None:
    settings: dict[str, object] = {**SETTINGS[setting]}
    if setting in TERMS:
        settings["model"] = str(heads_in(tmp_path, *TERMS[setting]))
    keys = json.dumps(settings)
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(MODEL), keys],
        env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [x for x in done.stdout.splitlines() if x.startswith("COMPILED")]
    assert json.loads(line.removeprefix("COMPILED ")) == {}
