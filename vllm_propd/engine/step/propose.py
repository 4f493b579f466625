"""The proposer: Medusa heads on the target's last hidden states, and all other sources."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger

from vllm_propd.config import ProPDConfig
from vllm_propd.core.drafting.candidates import Candidates
from vllm_propd.core.drafting.drafter import Drafter
from vllm_propd.core.sources.combined import Said, Sources
from vllm_propd.core.sources.successors import RANKS
from vllm_propd.core.tree import Ints
from vllm_propd.engine.integration.find_heads import engine_config
from vllm_propd.engine.step.draft_batch import DraftBatch
from vllm_propd.engine.step.draft_vocabulary import DraftVocabulary
from vllm_propd.engine.step.served_heads import ServedHeads, draft_dtype
from vllm_propd.heads.calibration import calibration_for
from vllm_propd.heads.checkpoint import load_heads
from vllm_propd.heads.known_prices import known_prices
from vllm_propd.kernels.best_tokens import best_tokens
from vllm_propd.kernels.transfer import to_device, to_host

logger = init_logger("vllm.propd.proposer")


ROWS_AT_ONCE = 256
"""About how many rows of head logits (sequences times heads) are alive at once."""


class MedusaTreeProposer:
    """Asks the heads, and the target's logits, for what a token tree may hold.

    vLLM builds it (method ``custom_class``) and loads it with the target model.

    Attributes:
        promised: tokens per step by nodes of a tree, as training has measured them.
        trees: makes the trees.
    """

    promised: dict[int, float]
    trees: Drafter

    def __init__(self, vllm_config: VllmConfig):
        self.config = engine_config(vllm_config)
        self.model_config = vllm_config.model_config
        self.device = vllm_config.device_config.device

    def load_model(self, target: Any) -> None:
        """Reads the heads, if any; ``target`` is vLLM's model, whose layers they share."""
        if not self.config.heads:
            self._learn_anew(None)
            return
        assert self.config.model is not None
        folder = Path(self.config.model)
        checkpoint = load_heads(folder)
        device = self.device
        dtype = draft_dtype(self.model_config.dtype, device)
        self.heads = ServedHeads(checkpoint, dtype, device)
        self.target = target
        self.vocabulary = DraftVocabulary(
            checkpoint, self.model_config, target, dtype, device
        )
        logger.info(
            "Loaded %d Medusa heads (%d residual block(s) each%s, %s)",
            checkpoint.num_heads,
            checkpoint.num_layers,
            ", which read the root" if checkpoint.knows_root else "",
            self.vocabulary,
        )
        self._learn_anew(folder)

    def _learn_anew(self, folder: Path | None) -> None:
        """Sets up what values nodes, from what training has measured, if anything."""
        config = self.config
        vocabulary = self.model_config.get_vocab_size()
        sources = Sources(vocabulary, config.looks_up, config.shares, config.recycles)
        self.trees, self.promised = Drafter(sources), {}
        if folder is None:
            return
        calibration = calibration_for(config, folder, self.num_heads)
        self.trees = Drafter(
            sources,
            known_prices(config, calibration, self.num_heads),
            learns=config.sizing == "dynamic",
        )
        if calibration is None:
            logger.info("%s has no calibration.json: nothing is known of its heads", folder)
            return
        self.promised = calibration.tokens_per_step
        nodes = config.num_speculative_tokens
        if config.tree == "best_first":
            logger.info(
                "Calibration: trees of %d nodes gave %.2f tokens per step on held-out text",
                nodes,
                calibration.expected_tokens(nodes),
            )

    def with_settings(self, config: ProPDConfig) -> MedusaTreeProposer:
        """Returns a proposer with the same heads, other settings, and nothing learned."""
        other = copy.copy(self)
        other.config = config
        other._learn_anew(Path(config.model) if config.model is not None else None)
        return other

    @property
    def num_heads(self) -> int:
        """The number of heads K, which is the deepest that a node of theirs can be."""
        return self.heads.num_heads

    def propose(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        """Raises RuntimeError: vLLM wants this name; our runner calls ``candidates``."""
        raise RuntimeError("ProPD drafts from hidden states: its worker must be in use")

    @torch.inference_mode()
    def candidates(
        self, hidden_states: torch.Tensor, roots: Ints | None = None
    ) -> Candidates:
        """Returns each head's best tokens; they say -inf where logits are NaN.

        Args:
            hidden_states: ``[sequences, hidden]``, where each sequence's last token was
                predicted.
            roots: ``[sequences]`` int64, these last tokens; None: any, to see what it
                takes.
        """
        known, embedded = None, None
        if self.heads.knows_root or self.vocabulary.knows_before:
            if roots is None:
                roots = np.zeros(len(hidden_states), np.int64)
            known = to_device({"roots": roots}, hidden_states.device)["roots"]
        if self.heads.knows_root:
            embedded = self.target.embed_input_ids(known)
        # In parts: logits of many sequences are gigabytes.
        sequences = max(1, ROWS_AT_ONCE // self.num_heads)
        parts = []
        for first in range(0, len(hidden_states), sequences):
            some = slice(first, first + sequences)
            last = None if known is None else known[some]
            roots_of = None if embedded is None else embedded[some]
            states = self.heads(hidden_states[some], roots_of)
            parts.append(self.vocabulary.best(states, last, self.config.ranks))
        # All are on their way before the first is waited for.
        waiting = [to_host(torch.cat(tensors)) for tensors in zip(*parts, strict=True)]
        found = [tensor() for tensor in waiting]
        # One request's NaN would stay in accounts, and stop the engine.
        found[1][np.isnan(found[1])] = -np.inf
        return Candidates(*found) if len(found) > 2 else Candidates.independent(*found)

    def ask(self, sequences: int) -> None:
        """Asks the heads about nothing, for what that takes to be ready, or to be timed."""
        hidden_size, dtype = self.model_config.get_hidden_size(), self.model_config.dtype
        self.candidates(
            torch.zeros(sequences, hidden_size, dtype=dtype, device=self.device)
        )

    def said(self, texts: DraftBatch) -> Said:
        """Returns what the target has said in the step of what follows its tokens."""
        read, rows, logits = texts.read()
        best, log_share = best_tokens(logits, rows, RANKS)()
        return read, best, log_share
