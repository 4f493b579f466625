"""Early pruning: a model in two halves, and the early head between them."""

from __future__ import annotations

from vllm_propd.engine.symbols.behaviour import OWN, Behaviour
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
        "vllm.distributed.parallel_state:_PP",
        "replaced",
        "",
        "see get_pp_group",
        "see get_pp_group",
        "see get_pp_group",
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
        "vllm.compilation.decorators:_support_torch_compile",
        "replaced",
        "cls dynamic_arg_dims",
        "what it has set of a model's layers is set anew in each half",
        "a half would run, or be saved as, what the whole model has compiled",
        "see get_pp_group",
        "aot_compiled_fn was_aot_compile_fn_loaded_from_disk _compile_tag do_not_compile",
    ),
    Symbol(
        f"{_RUNNER}.get_model",
        "called",
        "self",
        "is what is split",
        "graphs may be wrapped around it",
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
    Symbol(
        "vllm.model_executor.models.utils:PPMissingLayer",
        "called",
        "",
        "on the Transformers backend, stands in each half for the other's layers",
        "that backend makes its stages so, and keeps no bounds",
        "see get_pp_group",
    ),
    Symbol(
        "vllm.model_executor.models.transformers.base:Base",
        "read",
        "vllm_config prefix",
        "its pp_group is that of a half's stage; its model's decoder owns the layers",
        "it asks the group that it was built with whether it is first or last "
        "(tests/integration/test_transformers_backend.py)",
        "see get_pp_group",
        "pp_group model",
    ),
)

BEHAVIOURS = (
    Behaviour(
        "vllm.distributed.parallel_state:get_pp_group",
        "looks at parallel_state._PP at each call",
        "a half runs while another group stands there",
        "see get_pp_group",
        "tests/integration/test_symbols.py::"
        "test_the_pipeline_group_is_where_the_halves_swap_it",
    ),
    Behaviour(
        "vllm.model_executor.models.llama:LlamaModel.forward",
        "asks the pipeline group, as it runs, whether to embed tokens and whether to end "
        "with the norm; runs its layers between start_layer and end_layer",
        "two shallow copies with other bounds are two stages",
        "see get_pp_group",
        "tests/integration/test_early_pruning.py::test_eager",
    ),
    Behaviour(
        "vllm.model_executor.models.transformers.base:Base.forward",
        "asks the group that it keeps, and runs the layers of its model's list",
        "a copy with another group and list is a stage",
        "see get_pp_group",
        "tests/integration/test_transformers_backend.py::"
        "test_it_prunes_and_gives_plain_vllms_text",
    ),
    Behaviour(
        "vllm.compilation.wrapper:TorchCompileWithNoGuardsWrapper.__call__",
        "runs what the instance's own __init__ has compiled",
        "each half has a compiled forward of its own",
        "see get_pp_group",
        "tests/integration/test_early_pruning.py::test_compiled",
    ),
    Behaviour(
        "vllm.config.vllm:VllmConfig.compute_hash",
        "is another where additional_config is",
        "the halves do not take each other's compiled artifacts (`_compile_anew`)",
        "see get_pp_group",
        f"{OWN}test_a_halfs_config_has_a_hash_of_its_own",
    ),
    Behaviour(
        "vllm.model_executor.layers.attention.attention:get_attention_context",
        "reads metadata and slots from the forward context when a layer runs, by the "
        "layer's name",
        "the context is changed between the halves",
        "early exits in vLLM",
        "tests/integration/test_early_pruning.py::test_eager",
    ),
    Behaviour(
        "vllm.model_executor.layers.logits_processor:LogitsProcessor.forward",
        "is called by compute_logits with the output layer first, then hidden states and "
        "the bias",
        "one call shows what an early head shares (`_TargetOutput`)",
        "the output layer in vLLM's model interface",
        "tests/integration/test_early_pruning.py::test_eager",
    ),
    Behaviour(
        "vllm.model_executor.layers.logits_processor:LogitsProcessor.forward",
        "gives a rank its own share of the vocabulary with skip_gather",
        "each rank counts in its share",
        "nothing",
        "tests/integration/test_tensor_parallel.py::test_text_is_plain_vllms",
    ),
)
