"""A frozen target with the heads that learn from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from vllm_propd.fast_dtype import fast_dtype
from vllm_propd.heads.early import EarlyHead, norm_eps
from vllm_propd.heads.medusa import MedusaHeads
from vllm_propd.training.model.losses import distillation, labels_of, medusa_loss
from vllm_propd.training.settings import TrainSettings


@dataclass
class Predictions:
    """Logits of a batch of token ids ``[batch, length]``.

    Attributes:
        target: ``[batch, length, vocabulary]``.
        medusa: ``[heads, batch, length, vocabulary]``.
        early: per layer ``[batch, length, vocabulary]``.
    """

    target: torch.Tensor
    medusa: torch.Tensor
    early: dict[int, torch.Tensor]


class Trainee(nn.Module):
    """The heads of one target, trained together.

    Args:
        target: a Hugging Face causal LM; stays frozen.
        settings: what to train.

    Raises:
        ValueError: an early layer that the target does not have, or too large a rank.
    """

    def __init__(self, target: PreTrainedModel, settings: TrainSettings):
        super().__init__()
        config = target.config.get_text_config()
        check_early_layers(settings.early_layers, config.num_hidden_layers)
        # In a list, so that the target's weights are no weights of this module.
        self._target = [target.eval().requires_grad_(False)]
        self._labels = settings.labels
        self._softcap = getattr(config, "final_logit_softcapping", None)
        self.output = target.get_output_embeddings()
        auto = settings.precision == "auto"
        precision = fast_dtype(self.device.type) if auto else settings.precision
        self._mixed = precision == "bfloat16"
        hidden, vocabulary = config.hidden_size, len(self.output.weight)
        self.medusa = MedusaHeads(settings.num_heads, settings.num_layers, hidden, True)
        self.own_output: nn.Parameter | None = None
        if settings.output_layer == "own":
            weight = self.output.weight.detach().float()
            self.own_output = nn.Parameter(weight.repeat(settings.num_heads, 1, 1))
        eps = norm_eps(config)
        self.early = nn.ModuleDict()
        if settings.early_rank > min(hidden, vocabulary):
            raise ValueError(
                f"--early-rank {settings.early_rank}: at most the hidden size, {hidden}"
            )
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

    def predict(self, ids: torch.Tensor) -> Predictions:
        """Predicts what comes after each token of ``ids``, ``[batch, length]`` int64."""
        with torch.no_grad():
            out = self.target(input_ids=ids, output_hidden_states=True, use_cache=False)
        states = out.hidden_states
        hidden = states[-1]
        medusa = self.medusa(hidden.flatten(0, 1)).unflatten(1, hidden.shape[:2])
        if self.own_output is None:
            drafts = self._cap(self.output(medusa))
        else:
            drafts = torch.matmul(medusa, self.own_output.mT[:, None].to(medusa.dtype))
        early = {
            int(layer): self._cap(head.logits(states[int(layer)], self.output))
            for layer, head in self.early.items()
        }
        return Predictions(out.logits, drafts, early)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns the training loss, a scalar, of ``[batch, length]`` int64 token ids."""
        predicted = self.predict(ids)
        labels = labels_of(predicted.target, self._labels)
        loss = medusa_loss(predicted.medusa, labels)
        for logits in predicted.early.values():
            loss = loss + distillation(logits, labels)
        return loss

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
        out = self.target(input_ids=ids, output_hidden_states=True, use_cache=False)
        rebuilt = self._cap(self.output(out.hidden_states[-1]))
        if not torch.allclose(rebuilt.float(), out.logits.float(), rtol=1e-2, atol=1e-2):
            kind = self.target.config.model_type
            raise ValueError(
                f"a model of type '{kind}' does more to its logits than its output layer "
                "does; heads that share this layer cannot be trained for it"
            )

    def medusa_tensors(self) -> dict[str, torch.Tensor]:
        """Returns the Medusa heads' tensors by their names in a checkpoint."""
        named = self.medusa.tensors()
        if self.own_output is not None:
            for k, rows in enumerate(self.own_output.data):
                named[f"lm_heads.{k}.weight"] = rows
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
