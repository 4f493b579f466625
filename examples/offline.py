"""Some prompts at once with ProPD, and what became of its trees.

python examples/offline.py demo/model $'class Stack:\n' $'def main():\n'
"""

from pathlib import Path
from typing import Annotated

import typer
from vllm import LLM, SamplingParams

PROMPTS = ["class Stack:\n", "def read(self, size):\n    ", "import os\n"]


def main(
    model: Annotated[Path, typer.Argument(help="Folder of the target.")],
    prompts: Annotated[
        list[str] | None, typer.Argument(help="What it goes on with.")
    ] = None,
    heads: Annotated[Path | None, typer.Option(help="Default: MODEL/propd.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens of each.")] = 64,
    dtype: Annotated[
        str, typer.Option(help="In float32 greedy text is exact.")
    ] = "float32",
    eager: Annotated[bool, typer.Option("--eager", help="Compile nothing.")] = False,
) -> None:
    """Generate with ProPD."""
    speculative = {"method": "propd"}  # more keys: docs/settings.md
    if heads is not None:
        speculative["model"] = str(heads)
    llm = LLM(
        str(model), dtype=dtype, speculative_config=speculative,
        max_model_len=1024, enforce_eager=eager,
        disable_log_stats=False,  # LLM counts nothing by default
    )  # fmt: skip
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    for output in llm.generate(prompts or PROMPTS, params):
        print("-" * 40, output.prompt + output.outputs[0].text, sep="\n")
    # vLLM's counters of speculative decoding, and our own (docs/metrics.md).
    count = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    drafted = count["vllm:spec_decode_num_draft_tokens"]
    accepted = count["vllm:spec_decode_num_accepted_tokens"]
    emitted, steps = count["vllm:propd_emitted_tokens"], count["vllm:propd_sequences"]
    print("-" * 40)
    print(f"{accepted:.0f} of {drafted:.0f} drafted nodes were accepted:")
    print(f"{emitted / steps:.2f} tokens per step and sequence.")


if __name__ == "__main__":  # vLLM's workers import this file
    typer.run(main)
