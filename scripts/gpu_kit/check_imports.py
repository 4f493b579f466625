"""Does the unpacked kit import beside that machine's PyTorch? No GPU is needed.

``PYTHONPATH=SITE python scripts/gpu_kit/check_imports.py``
"""

from __future__ import annotations

import importlib
import sys

MODULES = (
    "torch",
    "triton",
    "transformers",
    "vllm",
    "vllm.v1.engine.core",
    "vllm.v1.worker.gpu_model_runner",
    "vllm.v1.worker.gpu_worker",
    "vllm.v1.attention.backends.flash_attn",
    "vllm.model_executor.models.llama",
    "vllm.entrypoints.llm",
    "vllm_propd.plugin",
    "vllm_propd.engine.cuda_worker",
    "vllm_propd.engine.attention.cuda",
    "vllm_propd.kernels.tree_attention_triton",
    "vllm_propd.kernels.pruning_triton",
)


def main() -> None:
    failed = 0
    for name in MODULES:
        try:
            module = importlib.import_module(name)
            print(f"{name}: {getattr(module, '__version__', 'imports')}")
        except Exception as error:
            failed += 1
            print(f"{name}: {type(error).__name__}: {error}")
    from importlib.metadata import entry_points

    plugins = [point.name for point in entry_points(group="vllm.general_plugins")]
    print(f"plugins of vLLM: {plugins}")
    sys.exit(bool(failed) or "propd" not in plugins)


if __name__ == "__main__":
    main()
