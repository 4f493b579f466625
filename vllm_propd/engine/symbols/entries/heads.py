"""Medusa heads on vLLM's layers."""

from __future__ import annotations

from vllm_propd.engine.symbols.symbol import Symbol

_LINEAR = "vllm.model_executor.layers.linear"

SYMBOLS = (
    Symbol(
        f"{_LINEAR}:ReplicatedLinear",
        "called",
        "input_size output_size bias params_dtype return_bias disable_tp",
        "holds the heads' weights, and multiplies with them, but for few rows on CPUs",
        "vLLM's matrix products are the platform's fastest",
        "nothing",
        "bias",
    ),
    Symbol(
        f"{_LINEAR}:LinearBase",
        "read",
        "",
        "what packs a layer's weights",
        "see UnquantizedLinearMethod.process_weights_after_loading",
        "see there",
        "quant_method",
    ),
    Symbol(
        f"{_LINEAR}:ReplicatedLinear.weight_loader",
        "called",
        "self param loaded_weight",
        "copies a checkpoint's weights",
        "see ReplicatedLinear",
        "nothing",
    ),
    Symbol(
        f"{_LINEAR}:UnquantizedLinearMethod.process_weights_after_loading",
        "called",
        "self layer",
        "packs them",
        "vLLM's loader calls it for its own layers only",
        "a loader that also calls it for a proposer's",
    ),
    Symbol(
        "vllm.model_executor.models.interfaces_base:VllmModel.embed_input_ids",
        "called",
        "self input_ids",
        "gives the root's embedding to heads that read it",
        "all models of vLLM have it; with tensor parallelism, all ranks get the sum",
        "nothing",
    ),
    Symbol(
        "vllm.distributed:tensor_model_parallel_all_gather",
        "called",
        "input_ dim",
        "gathers the logits of heads with output layers of their own",
        "all ranks must grow the same tree",
        "nothing",
    ),
)
