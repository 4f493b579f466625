"""vLLM's model runner with trees: what each hook adds to a step.

One direction: scheduled drafts -> rows, positions and slots (`_prepare_inputs`) ->
attention (`_build_attention_metadata`) -> lower half, pruning, upper half
(`_model_forward`) -> verification and commit (`_sample`) -> next trees
(`propose_draft_token_ids`) -> the step's output (`sample_tokens`) -> the scheduler.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from vllm.logger import init_logger
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.outputs import SamplerOutput
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from vllm_propd.core.drafting.growth import nodes_per_sequence
from vllm_propd.core.drafting.next_trees import NONE, next_trees
from vllm_propd.core.sizing.fixed import FixedSizing
from vllm_propd.core.sizing.protocol import Sizing
from vllm_propd.core.tree import Bools, Ints, TokenTree
from vllm_propd.engine.attention.tree_split import TreeBuilder, attending_to_trees
from vllm_propd.engine.integration.draft_delivery import attach_drafts
from vllm_propd.engine.integration.find_heads import engine_config
from vllm_propd.engine.integration.logits_processors import all_logits_processors
from vllm_propd.engine.integration.patches import replaced
from vllm_propd.engine.measuring import Measuring
from vllm_propd.engine.metrics import StepMetrics
from vllm_propd.engine.pruning.splitting import Splitting
from vllm_propd.engine.startup.cost_table import dynamic_sizing, most_nodes
from vllm_propd.engine.step.commit import commit
from vllm_propd.engine.step.draft_batch import DraftBatch, keeps_all_rows, step_load
from vllm_propd.engine.step.propose import MedusaTreeProposer
from vllm_propd.engine.step.request_ends import RequestEnds
from vllm_propd.engine.step.sampling import without_drafts
from vllm_propd.engine.step.states import PreparedStep, Verified, VerifiedStep
from vllm_propd.engine.step.tree_step import TreeStep, build_step
from vllm_propd.engine.step.verify import draw, verify
from vllm_propd.kernels.transfer import Arrays, to_device

logger = init_logger("vllm.propd.runner")


class ProPDRunner(Measuring, Splitting):
    """vLLM's V1 model runner; each method adds what trees need to the one it overrides."""

    drafter: MedusaTreeProposer
    speculative_config: Any

    def __init__(self, vllm_config: Any, device: torch.device):
        with all_logits_processors():
            super().__init__(vllm_config, device)
        self.propd = engine_config(vllm_config)
        self.ends = RequestEnds(self.max_model_len)
        self._trees: dict[str, TokenTree] = {}
        self._prepared: PreparedStep | None = None
        self._verified: VerifiedStep | None = None
        self._keep: int | None = None
        self.sizing: Sizing
        self.metrics = StepMetrics(vllm_config)

    def start_sizing(self) -> None:
        """Times steps, where the trees' sizes are to follow what they cost."""
        nodes, budget = most_nodes(self.propd, self.scheduler_config)
        has_room = nodes_per_sequence(nodes, budget, sequences=1) > 0
        if not has_room:
            logger.warning_once(
                "ProPD: steps have no room for drafts, which take at most half of one: "
                "decoding as plain vLLM does. Set max_num_batched_tokens (and "
                "max_num_scheduled_tokens) to 4 or more, and "
                "long_prefill_token_threshold to 0 or above 1"
            )
        if self.propd.sizing == "dynamic" and has_room:
            self.sizing = dynamic_sizing(self, nodes, budget)
        else:
            self.sizing = FixedSizing(nodes, budget)

    def _prepare_inputs(
        self, scheduler_output: SchedulerOutput, num_scheduled_tokens: np.ndarray
    ) -> Any:
        """Gives tree nodes the position root + depth, and no slot in the cache.

        Those of paths keep what vLLM gives its own drafts.
        """
        began = time.perf_counter()
        scheduled = scheduler_output.scheduled_spec_decode_tokens
        # Lets vLLM prepare a step without drafts as one that knows of none.
        config = self.speculative_config if scheduled else None
        with replaced(self, "speculative_config", config):
            prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        step = self._built(scheduled, num_scheduled_tokens) if scheduled else None
        timer = self.sizing.begin(began, step_load(self, num_scheduled_tokens, step))
        requests = len(num_scheduled_tokens)
        rows = np.arange(requests) if step is None else step.root_rows(requests)
        ready = PreparedStep(step, prepared[0], rows, timer)
        if (branching := ready.branching) is not None:
            ready = replace(ready, trees=self._laid_out(branching))
        self._prepared = ready
        return prepared

    def _built(
        self, scheduled: dict[str, list[int]], num_scheduled: np.ndarray
    ) -> TreeStep | None:
        """Returns the trees behind the scheduled draft lists."""
        batch = self.input_batch
        return build_step(
            scheduled,
            self._trees,
            batch.req_id_to_index,
            np.cumsum(num_scheduled),
            batch.num_computed_tokens_cpu,
            num_scheduled,
            split=self._prunes(),
        )

    def _laid_out(self, step: TreeStep) -> TreeStep:
        """Sends a branching step to the device, and sets its nodes' positions and slots."""
        here = to_device(self._arrays(step), self.device)
        self.positions[here["rows"]] = here["positions"]
        tables = self.input_batch.block_table.block_tables
        slots = tuple(table.slot_mapping.gpu[here["rows"]] for table in tables)
        for table in tables:
            table.slot_mapping.gpu.index_fill_(0, here["drafted"], -1)
        return step.on_device(here, slots)

    def _arrays(self, step: TreeStep) -> Arrays:
        """Returns all arrays that the device needs of a step before its forward pass."""
        arrays = step.arrays()
        if self._pruned_forward is None or not step.split:
            return arrays
        return {**arrays, **self._pruned_forward.arrays(step, self._keep)}

    def _build_attention_metadata(self, *args: Any, **kwargs: Any) -> Any:
        """Hands the step to the builders for the time they build, if it has trees."""
        step = self._prepared.branching if self._prepared is not None else None
        if step is None:
            return super()._build_attention_metadata(*args, **kwargs)
        builders = [
            builder
            for group in self._attn_group_iterator()
            for builder in group.metadata_builders
            if isinstance(builder, TreeBuilder)
        ]
        for builder in builders:
            builder.step = step
        try:
            return super()._build_attention_metadata(*args, **kwargs)
        finally:
            for builder in builders:
                builder.step = None

    def _model_forward(
        self,
        input_ids: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """Runs a step with trees in two halves, the upper one without pruned rows."""
        prepared, pruned_forward = self._prepared, self._pruned_forward
        vllms = super()._model_forward
        inputs = input_ids, positions, intermediate_tensors, inputs_embeds
        step = prepared.branching if prepared is not None else None
        if step is None:
            return vllms(*inputs, **model_kwargs)
        with attending_to_trees(self._attention_layers):
            if pruned_forward is None or not step.split:
                return vllms(*inputs, **model_kwargs)
            assert positions is not None and prepared is not None
            hidden_states, left = pruned_forward.run(
                step, input_ids, positions, inputs_embeds, self._keep, **model_kwargs
            )
        self._prepared = self._without_pruned(prepared, step, left)
        return hidden_states

    @cached_property
    def _attention_layers(self) -> list[Any]:
        layers = self.compilation_config.static_forward_context
        return [layers[name] for name in self._group_of_layer]

    def _prunes(self) -> bool:
        """Whether the trees of this step are to be pruned."""
        if self._pruned_forward is None or (
            self._keep is None and self.propd.plans_pruning
        ):
            return False
        return not keeps_all_rows(self)

    def _without_pruned(
        self, prepared: PreparedStep, step: TreeStep, left: TreeStep
    ) -> PreparedStep:
        """Takes the pruned rows out of vLLM's list of logits rows, in place."""
        indices = prepared.logits_indices
        rows = prepared.root_row[step.request].repeat(step.sizes) + step.node
        needed = np.ones(len(indices), np.bool_)
        needed[np.delete(rows, left.kept)] = False
        arrays = {"kept": np.flatnonzero(needed), "slots": left.slot_rows}
        here = to_device(arrays, self.device)
        indices.set_(indices[here["kept"]])
        left = left.on_device({}, tuple(slots[here["slots"]] for slots in step.slots))
        root_row = left.root_rows(len(prepared.root_row))
        return PreparedStep(left, indices, root_row, prepared.timer)

    def _sample(
        self,
        logits: torch.Tensor | None,
        spec_decode_metadata: SpecDecodeMetadata | None,
    ) -> SamplerOutput:
        """Verifies the trees and commits what was accepted."""
        prepared, self._prepared = self._prepared, None
        assert prepared is not None
        step, pruned = prepared.trees, None
        if self.propd.plans_pruning and step is not None and step.whole is not None:
            ids = [self.input_batch.req_ids[i] for i in step.request.tolist()]
            places = [len(self.requests[i].output_token_ids) for i in ids]
            pruned = step.as_pruned(ids, places)
        kept = 0 if step is None else len(step.rows) - len(step.sizes)
        root_row, timer = prepared.root_row, prepared.timer
        outcome = self._verify(logits, step, root_row)
        self._verified = VerifiedStep(outcome, root_row, kept, pruned, timer, logits)
        return outcome.output

    def _verify(
        self, logits: torch.Tensor | None, step: TreeStep | None, root_row: Ints
    ) -> Verified:
        metadata = without_drafts(self.input_batch.sampling_metadata)
        sampler, putting_out = self.sampler, ~self._prompts_that_go_on
        if step is None:
            keeps = self.propd.recycles
            return draw(logits, root_row, sampler, metadata, putting_out, keeps)
        assert logits is not None
        step = self._as_recorded(step)
        answers = self.ends.answers(self.input_batch, self.requests)
        found = verify(
            logits, step, root_row, sampler, metadata, putting_out, answers, self.propd
        )
        commit(step, found.accepted, self._group_of_layer)
        self._record(step, found)
        return found

    @property
    def _prompts_that_go_on(self) -> Bools:
        """``[requests]`` bool whose prompt is not over with this step."""
        going_on: Bools = self.discard_request_mask.np[: self.input_batch.num_reqs]
        return going_on

    def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> Any:
        """Leaves the generators of prompts that go on: nothing has been drawn from them.

        vLLM would set them back by one token, which a CPU's do not know.
        """
        batch, going_on = self.input_batch, self._prompts_that_go_on
        own = {i: one for i, one in batch.generators.items() if not going_on[i]}
        with replaced(batch, "generators", own):
            return super()._bookkeeping_sync(*args, **kwargs)

    def _get_nans_in_logits(self, logits: torch.Tensor | None) -> dict[str, int]:
        """Counts NaNs in each request's root row: vLLM takes row i for request i's."""
        if logits is not None:
            assert self._verified is not None
            logits = logits[self._on_device(self._verified.root_row)]
        found: dict[str, int] = super()._get_nans_in_logits(logits)
        return found

    def _on_device(self, rows: Ints) -> torch.Tensor:
        return to_device({"rows": rows}, self.device)["rows"]

    @cached_property
    def _group_of_layer(self) -> dict[str, int]:
        groups = self.kv_cache_config.kv_cache_groups
        return {name: g for g, group in enumerate(groups) for name in group.layer_names}

    def _input_fits_in_drafter(self, common_attn_metadata: Any) -> bool:
        """Says yes: heads have no context of their own, and the scheduler cuts drafts."""
        return True

    def propose_draft_token_ids(
        self,
        scheduler_output: SchedulerOutput,
        sampled_token_ids: torch.Tensor | list[list[int]],
        sampling_metadata: Any,
        hidden_states: torch.Tensor,
        sample_hidden_states: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> list[list[int]]:
        """Drafts the next trees from the hidden states of the last accepted nodes."""
        verified, self._verified = self._verified, None
        assert isinstance(sampled_token_ids, list) and verified is not None
        # Only now has vLLM waited for the device: `_sample` may be back before it is over.
        drafting = verified.timer.verified(verified.pruned)
        most, found = self.sizing.most(len(sampled_token_ids)), NONE
        if most and any(sampled_token_ids):
            batch = DraftBatch(self, sampled_token_ids, verified)
            found = next_trees(
                self.drafter.trees,
                drafting,
                batch,
                lambda: self.drafter.said(batch),
                lambda: self._candidates(batch, verified, sample_hidden_states),
                time.perf_counter,
                most,
                self._extra_nodes,
                self.parallel_config.tensor_parallel_size,
            )
        self._trees.update(found.trees)
        self._keep = found.keep
        put_out = verified.outcome.put_out[list(map(bool, sampled_token_ids))]
        record = drafting.end(verified.kept, int(put_out.sum()))
        self.metrics.count(record)
        self._note(record)
        return found.drafts(self.input_batch.req_ids)

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> Any:
        """Puts the next drafts into the step's output."""
        output = super().sample_tokens(grammar_output)
        if output.req_ids:  # Not vLLM's one empty output, which all steps share.
            attach_drafts(output, self.take_draft_token_ids())
        return output

    def _on_request_state_removed(self, req_id: str, req_state: Any) -> None:
        """Ends the answer of a request that has ended."""
        super()._on_request_state_removed(req_id, req_state)
        self._end(req_id, [] if req_state is None else req_state.output_token_ids)

    def _update_streaming_request(self, req_id: str, new_req_data: Any) -> Any:
        """Ends the answer of a session's turn, which the next turn does not go on with."""
        self._end(req_id, self.requests[req_id].output_token_ids)
        return super()._update_streaming_request(req_id, new_req_data)

    def _end(self, req_id: str, answer: list[int]) -> None:
        """Forgets the tree and the candidates of an answer that is over."""
        self._trees.pop(req_id, None)
        self.drafter.trees.end(req_id, answer)
