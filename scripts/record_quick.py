"""Records what plain vLLM writes, for the engine of `make quick` to compare with.

    python scripts/record_quick.py    # after a change of the model or of vLLM

Prompts are kept whose tokens are all far ahead of the next best: no order of summation
turns them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from gpu_first_run.setting import margins
from vllm import LLM, SamplingParams

from vllm_propd.corpus import held_out_snippets

ROOT = Path(__file__).parents[1]
MODEL, OUT = ROOT / "demo" / "model", ROOT / "tests" / "integration" / "quick.json"
PROMPTS, NEW_TOKENS, LONGEST = 12, 32, 160
AHEAD = 1e-2
"""Between the best two log probabilities."""


def main() -> None:
    llm = LLM(
        str(MODEL), dtype="float32", max_model_len=1024, enforce_eager=True, seed=0,
        kv_cache_memory_bytes=1 << 28,
    )  # fmt: skip
    tokenizer = llm.get_tokenizer()
    texts = held_out_snippets(4 * PROMPTS, seed=3, min_chars=2000)
    prompts = [
        {"prompt_token_ids": tokenizer(text)["input_ids"][: 1 + LONGEST * at // len(texts)]}
        for at, text in enumerate(texts)
    ]
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, logprobs=2)
    kept = []
    outputs = llm.generate(prompts, params)
    for output, ahead in zip(outputs, margins(outputs), strict=True):
        if min(ahead) > AHEAD:
            kept.append([output.prompt_token_ids, list(output.outputs[0].token_ids)])
    if len(kept) < PROMPTS:
        raise SystemExit(f"only {len(kept)} prompts are decided by {AHEAD}")
    step = len(kept) / PROMPTS
    chosen = [kept[int(step * at)] for at in range(PROMPTS)]
    OUT.write_text("[\n" + ",\n".join(map(json.dumps, chosen)) + "\n]\n")
    print(f"{OUT.relative_to(ROOT)}: {PROMPTS} of {len(kept)} prompts")


if __name__ == "__main__":
    main()
