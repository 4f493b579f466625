"""A frozen target with the heads that learn from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel

from vllm_propd.heads.checkpoint import AFTER, BEFORE
from vllm_propd.heads.early import EarlyHead, norm_eps
from vllm_propd.heads.medusa import MedusaHeads, root_input
from vllm_propd.heads.transition import Transition
from vllm_propd.training.model.losses import (
    HEAD_DECAY,
    Labels,
    distillation,
    exact_labels,
    labels_of,
    learnt,
)
from vllm_propd.training.model.states import BEST, States
from vllm_propd.training.settings import TrainSettings


@dataclass
class Predictions:
    """Logits of a batch of token ids ``[batch, length]``.

    Attributes:
        medusa: ``[heads, batch, length, draft tokens]``, without the transition term; the
            root of a position is the next one's token, the last position's has none.
        early: per layer ``[batch, length, vocabulary]``.
    """

    medusa: torch.Tensor
    early: dict[int, torch.Tensor]


class Trainee(nn.Module):
    """The heads of one target, trained together.

    Args:
        target: a Hugging Face causal LM; stays frozen.
        settings: what to train.
        tokens: ``[draft tokens]`` int64, ascending, what heads may draft; None: all.

    Attributes:
        tokens: the same.
        place: ``[vocabulary]`` int64, each token's place in ``tokens``; of others, their
            count.

    Raises:
        ValueError: an early layer that the target does not have, or too large a rank.
    """

    tokens: torch.Tensor
    place: torch.Tensor

    def __init__(
        self,
        target: PreTrainedModel,
        settings: TrainSettings,
        tokens: torch.Tensor | None = None,
    ):
        super().__init__()
        config = target.config.get_text_config()
        check_early_layers(settings.early_layers, config.num_hidden_layers)
        check_early_rank(settings.early_rank, config)
        # In a list, so that the target's weights are no weights of this module.
        self._target = [target.eval().requires_grad_(False)]
        self._settings = settings
        self._softcap = getattr(config, "final_logit_softcapping", None)
        self.output = target.get_output_embeddings()
        self._mixed = settings.precision_on(self.device.type) == "bfloat16"
        hidden, vocabulary = config.hidden_size, len(self.output.weight)
        self.medusa = MedusaHeads(
            settings.num_heads, settings.num_layers, hidden, True, settings.knows_root
        )
        self._drafts_all = tokens is None
        if tokens is None:
            tokens = torch.arange(vocabulary)
        place = torch.full((vocabulary,), len(tokens))
        place[tokens] = torch.arange(len(tokens))
        self.register_buffer("tokens", tokens.to(self.device), persistent=False)
        self.register_buffer("place", place.to(self.device), persistent=False)
        self.transition: Transition | None = None
        if settings.transition_rank:
            self.transition = Transition(len(tokens), settings.transition_rank)
        self.own_output: nn.Parameter | None = None
        if settings.output_layer == "own":
            weight = self.output.weight.detach().float()[self.tokens]
            self.own_output = nn.Parameter(weight.repeat(settings.num_heads, 1, 1))
        eps = norm_eps(config)
        self.early = nn.ModuleDict()
        for layer in settings.early_layers:
            head = EarlyHead(hidden, eps, settings.early_rank, vocabulary)
            if settings.early_rank:
                head.factorise(self.output.weight)
            self.early[str(layer)] = head

    @property
    def target(self) -> PreTrainedModel:
        """The frozen target."""
        return self._target[0]

    @property
    def device(self) -> torch.device:
        """The device of target and heads."""
        return self.output.weight.device

    def autocast(self) -> torch.autocast:
        """Returns the context to predict in: bfloat16 where the settings say so."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._mixed)

    def trained(self) -> list[nn.Parameter]:
        """Returns the parameters that are trained: those of the heads."""
        return [p for p in self.parameters() if p.requires_grad]

    @torch.no_grad()
    def states(self, ids: torch.Tensor) -> States:
        """Runs the target on token ids ``[rows, length]`` int64."""
        base = self.target.base_model
        out = base(input_ids=ids, output_hidden_states=True, use_cache=False)
        last, layers = out.last_hidden_state, out.hidden_states
        early = [layers[int(layer)] for layer in self.early]
        # A row at a time: the logits of all would be the largest thing in memory.
        best = [
            self._cap(self.output(row).float()).log_softmax(-1).topk(BEST) for row in last
        ]
        return States(
            last,
            torch.stack(early) if early else last.new_empty(0, *last.shape),
            torch.stack([one.indices for one in best]).int(),
            torch.stack([one.values for one in best]),
        )

    @torch.no_grad()
    def predict(self, ids: torch.Tensor) -> Predictions:
        """Predicts what comes after each token of ``ids``, ``[batch, length]`` int64."""
        states = self.states(ids)
        return Predictions(
            self.draft_logits(states.last, ids, self.tokens),
            {
                int(layer): self._early_logits(head, states.early[i], None)
                for i, (layer, head) in enumerate(self.early.items())
            },
        )

    def positions(self, learn: torch.Tensor) -> torch.Tensor:
        """Counts where each head learns: ``[1 + heads]`` float32, early heads' first.

        Args:
            learn: ``[rows, length]`` bool, where to learn.
        """
        heads = range(1 + self.medusa.num_heads)
        return torch.stack([learnt(learn, later).sum().float() for later in heads])

    def forward(
        self,
        ids: torch.Tensor,
        learn: torch.Tensor,
        states: States,
        seed: int,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns the training loss, a float32 scalar: the weighted sum of the heads'.

        Args:
            ids: ``[rows, length]`` int64 token ids.
            learn: ``[rows, length]`` bool, where to learn.
            states: what the target says of them.
            seed: of the random tokens that the loss is computed among.
            positions: ``[1 + heads]`` float32 in how many positions of the whole batch
                each head learns, where this is a part; None: it is the whole.
        """
        if positions is None:
            positions = self.positions(learn)
        labels = self._labels_of(states, learn, seed)
        drafts = self.draft_logits(states.last, ids, labels.columns)
        loss = drafts.new_zeros((), dtype=torch.float32)
        places, columns = self.place[ids], self.place[labels.columns]
        for k in range(1, len(drafts) + 1):
            logits = drafts[k - 1][:, :-k]
            if self.transition is not None:  # the text's own token stands before
                logits = logits + self.transition(places[:, k:], columns)
            of_head = distillation(logits, labels, learn, k, positions[k])
            loss = loss + HEAD_DECAY**k * of_head
        for i, head in enumerate(self.early.values()):
            logits = self._early_logits(head, states.early[i], labels.columns)
            loss = loss + distillation(logits, labels, learn, 0, positions[0])
        return loss

    def _labels_of(self, states: States, learn: torch.Tensor, seed: int) -> Labels:
        settings, tokens = self._settings, self.tokens
        if not settings.sampled_tokens:
            with torch.no_grad():
                target = self._cap(self.output(states.last.to(self.output.weight.dtype)))
            return exact_labels(target, tokens, settings.labels)
        return labels_of(
            states.best,
            states.log_probs,
            learn,
            tokens,
            settings.sampled_tokens,
            settings.labels,
            torch.Generator().manual_seed(seed),
        )

    def draft_logits(
        self, last: torch.Tensor, ids: torch.Tensor, columns: torch.Tensor
    ) -> torch.Tensor:
        """Returns the Medusa heads' own logits, ``[heads, rows, length, columns]``.

        Args:
            last: ``[rows, length, hidden]`` states of the target.
            ids: ``[rows, length]`` int64 token ids; a position's root is the next one's.
            columns: ``[columns]`` int64 token ids.
        """
        roots = None
        if self.medusa.roots is not None:
            with torch.no_grad():
                embedded = self.target.get_input_embeddings()(ids.roll(-1, 1).flatten())
                roots = root_input(embedded)
        drafts = self.medusa(last.float().flatten(0, 1), roots)
        if self.own_output is None:
            logits = self._shared(drafts, columns)
        else:
            own = self.own_output[:, self.place[columns]]
            logits = torch.matmul(drafts, own.mT.to(drafts.dtype))
        return logits.unflatten(1, last.shape[:2])

    def _early_logits(
        self, head: nn.Module, states: torch.Tensor, columns: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns an early head's logits, ``[rows, length, columns or all]``."""
        assert isinstance(head, EarlyHead)
        if head.up is None or head.down is None:
            return self._shared(head(states.float()), columns)
        up = head.up.weight if columns is None else head.up.weight[columns]
        return self._cap(functional.linear(head.down(head(states.float())), up))

    def _shared(self, states: torch.Tensor, columns: torch.Tensor | None) -> torch.Tensor:
        """Puts states through the target's output layer, or some of its rows."""
        weight, bias = self.output.weight, self.output.bias
        if columns is not None:
            weight = weight[columns]
            bias = None if bias is None else bias[columns]
        return self._cap(functional.linear(states.to(weight.dtype), weight, bias))

    def _cap(self, logits: torch.Tensor) -> torch.Tensor:
        """Caps logits softly, as Gemma-type targets do; others' stay as they are."""
        if self._softcap is None:
            return logits
        return self._softcap * torch.tanh(logits / self._softcap)

    @torch.no_grad()
    def check_output_layer(self) -> None:
        """Refuses a target whose logits are more than its output layer's.

        Heads share that layer, so what else a model does to its logits (a scale, say)
        would be missing from theirs.

        Raises:
            ValueError: the logits differ.
        """
        ids = torch.arange(8, device=self.device)[None]
        out = self.target(input_ids=ids, use_cache=False)
        rebuilt = self._cap(self.output(self.states(ids).last))
        if not torch.allclose(rebuilt.float(), out.logits.float(), rtol=1e-2, atol=1e-2):
            kind = self.target.config.model_type
            raise ValueError(
                f"a model of type '{kind}' does more to its logits than its output layer "
                "does; heads that share this layer cannot be trained for it (without heads "
                "it can be served)"
            )

    def medusa_tensors(self) -> dict[str, torch.Tensor]:
        """Returns the Medusa heads' tensors by their names in a checkpoint."""
        named = self.medusa.tensors()
        if self.own_output is not None:
            for k, rows in enumerate(self.own_output.data):
                named[f"lm_heads.{k}.weight"] = rows
        if not self._drafts_all:
            named["token_map"] = self.tokens
        if self.transition is not None:
            named |= {BEFORE: self.transition.before, AFTER: self.transition.after}
        return named

    def early_tensors(self) -> dict[str, torch.Tensor]:
        """Returns the early heads' tensors by their names in a checkpoint."""
        return {f"early.{name}": t for name, t in self.early.state_dict().items()}

    def state(self) -> dict[str, torch.Tensor]:
        """Returns the heads' weights, for a checkpoint of the training."""
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        return {name: t for name, t in self.state_dict().items() if name in trained}


def check_early_layers(layers: tuple[int, ...], num_hidden_layers: int) -> None:
    """Refuses early heads after the last layer or beyond it.

    Raises:
        ValueError: a layer is too deep; the message says how many the model has.
    """
    if max(layers, default=0) >= num_hidden_layers:
        raise ValueError(
            f"--early-layers {','.join(map(str, layers))}: the model has "
            f"{num_hidden_layers} layers, and an early head must leave some after it"
        )


def check_early_rank(rank: int, config: PretrainedConfig) -> None:
    """Refuses early heads whose own output layer's rank is above the target's.

    Raises:
        ValueError: the rank is too high; the message says what it may be.
    """
    most, what = config.hidden_size, "hidden size"
    if config.vocab_size < most:
        most, what = config.vocab_size, "vocabulary"
    if rank > most:
        raise ValueError(f"--early-rank {rank}: at most the {what}, {most}")
