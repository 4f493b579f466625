"""Early pruning: a model in two halves, and the early head between them."""

from __future__ import annotations

from vllm_propd.engine.symbols.symbol import Symbol

_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"

SYMBOLS = (
    Symbol(
        f"{_RUNNER}._model_forward",
        "overridden",
        "self input_ids positions intermediate_tensors inputs_embeds model_kwargs",
        "runs a step with trees in two halves, and shortens the list of logits rows",
        "what is pruned must not enter the upper layers or the output layer",
        "nothing: vLLM made this method to be overridden",
    ),
    Symbol(
        "vllm.v1.worker.cpu_model_runner:CPUModelRunner.load_model",
        "overridden",
        "self load_dummy_weights",
        "splits the model that it has loaded",
        "this is where the runner's model appears",
        "nothing: this is the place for it",
    ),
    Symbol(
        "vllm.distributed.parallel_state:get_pp_group",
        "replaced",
        "",
        "its group, _PP, answers for one of two stages while a half runs",
        "models ask it whether they embed tokens, and whether they end with the norm",
        "a forward pass between given layers in vLLM's model interface",
    ),
    Symbol(
        "vllm.sequence:IntermediateTensors",
        "called",
        "tensors",
        "what passes between the halves; pruned rows are taken out",
        "see get_pp_group",
        "see get_pp_group",
    ),
    Symbol(
        "vllm.compilation.wrapper:TorchCompileWithNoGuardsWrapper.__init__",
        "called",
        "self compile_prefix is_encoder",
        "gives each half a compiled forward of its own",
        "the copies would otherwise run the whole model's",
        "see get_pp_group",
    ),
    Symbol(
        "vllm.compilation.backends:set_model_tag",
        "called",
        "tag is_encoder",
        "names the halves in vLLM's compilation cache and log",
        "see TorchCompileWithNoGuardsWrapper",
        "see get_pp_group",
    ),
    Symbol(
        "vllm.forward_context:ForwardContext",
        "read",
        "attn_metadata slot_mapping cudagraph_runtime_mode batch_descriptor",
        "gets the metadata of what is left for the upper half, and its graph",
        "vLLM sets it once for a whole forward pass",
        "see get_pp_group",
    ),
    Symbol(
        "vllm.forward_context:set_forward_context",
        "called",
        "attn_metadata vllm_config num_tokens cudagraph_runtime_mode batch_descriptor",
        "surrounds the halves' warm-up",
        "vLLM's own warm-up runs the whole model",
        "see get_pp_group",
    ),
    Symbol(
        "vllm.config:CUDAGraphMode",
        "read",
        "",
        "tells a half whether to replay a graph",
        "each half has graphs of its own, or none",
        "see get_pp_group",
    ),
    Symbol(
        "vllm.forward_context:BatchDescriptor",
        "called",
        "num_tokens",
        "names a graph by its size",
        "see CUDAGraphMode",
        "see get_pp_group",
    ),
    Symbol(
        "vllm.v1.cudagraph_dispatcher:CudagraphDispatcher.dispatch",
        "called",
        "self num_tokens valid_modes",
        "chooses the upper half's graph",
        "fewer rows go on than vLLM has chosen one for",
        "see get_pp_group",
    ),
    Symbol(
        "vllm.model_executor.layers.logits_processor:LogitsProcessor.forward",
        "called",
        "self lm_head hidden_states embedding_bias skip_gather",
        "the early head's logits, of this rank's share of the vocabulary",
        "a rank test needs counts, not logits, from the other ranks",
        "nothing",
    ),
    Symbol(
        "vllm.model_executor.layers.vocab_parallel_embedding:VocabParallelEmbedding",
        "read",
        "",
        "which tokens this rank's share of the output layer has",
        "see LogitsProcessor",
        "nothing",
        "shard_indices",
    ),
    Symbol(
        "vllm.distributed:tensor_model_parallel_all_reduce",
        "called",
        "input_",
        "sums the counts over the ranks",
        "all ranks must keep the same nodes",
        "nothing",
    ),
)
