"""The tokens that heads may draft, and what heads say of them in a worker."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import ModelConfig
from vllm.logger import init_logger

from vllm_propd.engine.step.served_heads import OutputRows, own_output, part_of_target
from vllm_propd.heads.checkpoint import AFTER, BEFORE, HeadsCheckpoint
from vllm_propd.heads.transition import Transition

logger = init_logger("vllm.propd.proposer")


class DraftVocabulary:
    """Turns heads' states into their best tokens; the same on all tensor-parallel ranks.

    Args:
        checkpoint: the heads.
        model_config: the target's.
        target: vLLM's model, whose output layer heads share that have none of their own.
        dtype, device: the heads' dtype and the target's device.
    """

    def __init__(
        self,
        checkpoint: HeadsCheckpoint,
        model_config: ModelConfig,
        target: Any,
        dtype: torch.dtype,
        device: Any,
    ):
        self._target, self._own = target, checkpoint.num_outputs > 0
        self._size = vocabulary = model_config.get_vocab_size()
        self._dtype = model_config.dtype
        self.tokens: torch.Tensor | None = None
        self._output: OutputRows | None = None
        if (token_map := checkpoint.tensors.get("token_map")) is not None:
            self.tokens = token_map.to(device, torch.int64)
            self._size = len(token_map)
        if self._own:
            self._output = own_output(checkpoint, vocabulary, dtype, device)
        elif self.tokens is not None:
            self._output = self._part_of_target(model_config, dtype, device)
        self._transition: Transition | None = None
        if checkpoint.transition_rank:
            self._transition = self._load_transition(checkpoint, vocabulary, device)
            if dtype == torch.int8:
                self._transition.pack()

    def _part_of_target(
        self, model_config: ModelConfig, dtype: torch.dtype, device: Any
    ) -> OutputRows | None:
        """Returns rows of the target's output layer; None where all have to be computed."""
        assert self.tokens is not None
        if getattr(model_config.hf_text_config, "final_logit_softcapping", None):
            logger.warning(
                "The target caps its logits: heads that draft %d tokens are asked for all",
                len(self.tokens),
            )
            return None
        return part_of_target(
            self._target.compute_logits,
            self.tokens,
            model_config.get_hidden_size(),
            model_config.dtype,
            dtype,
            device,
        )

    def _load_transition(
        self, checkpoint: HeadsCheckpoint, vocabulary: int, device: Any
    ) -> Transition:
        found = Transition(self._size, checkpoint.transition_rank)
        for parameter, name in ((found.before, BEFORE), (found.after, AFTER)):
            parameter.data = checkpoint.tensors[name].float()
        found = found.to(device).requires_grad_(False)
        found.successors()
        self._place = torch.full((vocabulary,), self._size, device=device)
        every = torch.arange(self._size, device=device)
        self._place[every if self.tokens is None else self.tokens] = every
        return found

    @property
    def knows_before(self) -> bool:
        """Whether heads know the token before the one that they predict."""
        return self._transition is not None

    def __str__(self) -> str:
        which = "their own" if self._own else "the target's"
        some = "" if self.tokens is None else f", {self._size} tokens of it"
        knows = "" if self._transition is None else "; they know the token before"
        return f"output layer: {which}{some}{knows}"

    def best(
        self, states: torch.Tensor, roots: torch.Tensor | None, ranks: int
    ) -> tuple[torch.Tensor, ...]:
        """Returns the heads' best tokens and their log probabilities.

        Args:
            states: ``[heads, sequences, hidden]``.
            roots: ``[sequences]`` int64 the sequences' last tokens; None unless heads know
                the token before.
            ranks: how many candidates of each head.

        Returns:
            Tokens int64 and log probabilities float32, ``[sequences, heads, ranks]``; where
            heads know the token before, the three tensors of ``Candidates``.
        """
        logits = self._logits(states).float()
        if self._transition is None:
            best, places = logits.topk(min(ranks, logits.shape[-1]), dim=-1)
            said = best - logits.logsumexp(-1, keepdim=True)
            return self._ids(places).transpose(0, 1), said.transpose(0, 1)
        assert roots is not None
        found = self._transition.couple(logits, self._place[roots], ranks)
        return self._ids(found.tokens), found.log_probs, found.next_row

    def _ids(self, places: torch.Tensor) -> torch.Tensor:
        return places if self.tokens is None else self.tokens[places]

    def _logits(self, states: torch.Tensor) -> torch.Tensor:
        """Computes ``[heads, sequences, tokens]`` logits, the same on all ranks."""
        if self._output is not None:
            return self._output(states)
        # One product for all heads, gathered over the tensor-parallel ranks.
        logits = self._target.compute_logits(states.flatten(0, 1).to(self._dtype))
        logits = logits.view(*states.shape[:2], -1)
        return logits if self.tokens is None else logits[..., self.tokens]
