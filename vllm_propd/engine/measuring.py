"""What a runner offers to those who measure: settings that change, records of steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from vllm_propd.config import ProPDConfig
from vllm_propd.core.drafting.candidates import Candidates
from vllm_propd.core.sizing.protocol import Sizing, StepRecord
from vllm_propd.engine.integration.find_heads import engine_config
from vllm_propd.engine.pruning.pruned_forward import PrunedForward
from vllm_propd.engine.step.draft_batch import DraftBatch
from vllm_propd.engine.step.propose import MedusaTreeProposer
from vllm_propd.engine.step.record import EXTRA_NODES, Recorder
from vllm_propd.engine.step.states import Verified, VerifiedStep
from vllm_propd.engine.step.tree_step import TreeStep

Settings = tuple[ProPDConfig, MedusaTreeProposer, Sizing, PrunedForward | None]
"""A runner's fields ``propd``, ``drafter``, ``sizing`` and ``_pruned_forward``."""


class Measuring:
    """The part of ``ProPDRunner`` that is there for measuring; no request needs it.

    Attributes:
        recorder: records trees; None while no trees are recorded.
        step_records: the records of steps so far; None while no steps are recorded.
    """

    recorder: Recorder | None = None
    step_records: list[StepRecord] | None = None

    _asked: ProPDConfig | None = None
    _others: dict[ProPDConfig | None, Settings]

    def use_settings(self: Any, config: ProPDConfig) -> None:
        """Switches settings from the next step on; keeps what was learned under the old.

        So one engine, with one copy of the weights, serves all settings.
        """
        assert config.num_speculative_tokens <= self.num_spec_tokens
        if self._asked is None:
            self._asked, self._others = engine_config(self.vllm_config), {}
        before = self.propd, self.drafter, self.sizing, self._pruned_forward
        self._others[self._asked], self._asked = before, config
        if known := self._others.pop(config, None):
            self.propd, self.drafter, self.sizing, self._pruned_forward = known
            return
        cuts = len(self._cuts)
        self.drafter = self.drafter.with_settings(config)
        self.propd, self._pruned_forward = self._split(config)
        if len(self._cuts) > cuts:
            self.warm_up_halves()
        self.start_sizing()

    def start_recording(self: Any, recorder: Recorder | None) -> None:
        """Records trees from the next step on; with None, no longer."""
        self.recorder = recorder
        if self._pruned_forward is not None:
            reading = recorder is not None and not recorder.accept
            self._pruned_forward.judge.reading = reading

    @property
    def _extra_nodes(self) -> int:
        """How many nodes to draft beyond a tree: a recording shows what it nearly held."""
        return EXTRA_NODES if self.recorder is not None else 0

    def _as_recorded(self, step: TreeStep) -> TreeStep:
        """Returns the step; a recording without acceptance lets no node be accepted."""
        if self.recorder is None or self.recorder.accept:
            return step
        return replace(step, token=np.full_like(step.token, -1))

    def _candidates(
        self: Any, batch: DraftBatch, verified: VerifiedStep, hidden_states: torch.Tensor
    ) -> Candidates:
        """Asks the heads; a recording without acceptance keeps what they say.

        Args:
            batch: the sequences.
            verified: the step.
            hidden_states: ``[logits rows, hidden]``.
        """
        rows = self._on_device(verified.outcome.final_row[batch.rows])
        found: Candidates = self.drafter.candidates(hidden_states[rows], batch.roots)
        if self.recorder is not None and not self.recorder.accept:
            self.recorder.keep(batch, found, self.drafter.said(batch))
        return found

    def _record(self: Any, step: TreeStep, verified: Verified) -> None:
        """Adds a step's trees to the recording, if there is one."""
        if self.recorder is None:
            return
        whole = step.whole or step
        roots = self.input_ids.gpu[self._on_device(whole.rows[whole.first])]
        emitted = verified.output.sampled_token_ids.tolist()
        self.recorder.add(
            step,
            verified.accepted,
            [[token for token in row if token >= 0] for row in emitted],
            self.input_batch.req_ids,
            [len(self.requests[i].output_token_ids) for i in self.input_batch.req_ids],
            roots.tolist(),
            self._trees,
        )

    def _note(self, record: StepRecord) -> None:
        """Adds a step's record to ``step_records``, if steps are recorded."""
        if self.step_records is not None:
            self.step_records.append(record)
