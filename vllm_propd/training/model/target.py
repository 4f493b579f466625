"""The frozen target on its device, and the trainee built on it."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from vllm_propd.heads.checkpoint import AFTER, BEFORE, load_heads
from vllm_propd.heads.early import early_layers, load_early_head
from vllm_propd.heads.medusa import MedusaHeads
from vllm_propd.training.data.batches import TokenData
from vllm_propd.training.model.trainee import Trainee
from vllm_propd.training.settings import TrainSettings


def stored_dtype(model: str) -> torch.dtype:
    """Returns the dtype of the target's weights on disk."""
    return AutoConfig.from_pretrained(model).dtype or torch.bfloat16


def heads_dtype(model: str) -> torch.dtype:
    """Returns the dtype in which heads are stored: 16 bits are enough for drafts."""
    stored = stored_dtype(model)
    return torch.bfloat16 if stored == torch.float32 else stored


def load_trainee(
    model: str, settings: TrainSettings, data: TokenData | None = None
) -> Trainee:
    """Loads a target and puts untrained heads on it.

    Args:
        model: Hugging Face folder or name. It is loaded in the type of its products, on
            GPUs as it is stored.
        settings: the heads' settings.
        data: what is trained on; its most frequent tokens are those that heads may draft.

    Raises:
        ValueError: heads cannot share this target's output layer.
    """
    target = _load_target(model, settings)
    torch.manual_seed(settings.seed)
    tokens = None
    vocabulary = len(target.get_output_embeddings().weight)
    if data is not None and 0 < settings.draft_tokens < vocabulary:
        tokens = torch.from_numpy(data.frequent(settings.draft_tokens, vocabulary))
    return _checked(Trainee(target, settings, tokens))


def check_trained(model: str, heads: Path) -> None:
    """Refuses heads that ``load_trained`` could not put on a target, without loading it.

    Args:
        model: Hugging Face folder or name.
        heads: the folder.

    Raises:
        HeadsError: the heads cannot be read, or belong to another model.
    """
    config = AutoConfig.from_pretrained(model).get_text_config()
    found = load_heads(heads, shapes_only=True)
    found.check_fits(config.hidden_size, config.vocab_size)
    for layer in early_layers(heads):
        load_early_head(heads, layer, config)


def load_trained(model: str, heads: Path) -> Trainee:
    """Loads a target and the heads in a folder, of any format, to be measured.

    Args:
        model: Hugging Face folder or name.
        heads: the folder.

    Raises:
        HeadsError: the heads cannot be read, or belong to another model.
        ValueError: heads cannot share this target's output layer.
    """
    found = load_heads(heads)
    settings = TrainSettings(
        num_heads=found.num_heads,
        num_layers=found.num_layers,
        output_layer="own" if found.num_outputs else "target",
        knows_root=found.knows_root,
        transition_rank=found.transition_rank,
        early_layers=tuple(early_layers(heads)),
    )
    target = _load_target(model, settings)
    config = target.config.get_text_config()
    found.check_fits(config.hidden_size, config.vocab_size)
    tokens = found.tensors.get("token_map")
    if tokens is None and found.output_size:
        tokens = torch.arange(min(found.output_size, config.vocab_size))
    trainee = Trainee(target, settings, None if tokens is None else tokens.long())
    trainee.medusa = MedusaHeads.from_checkpoint(found).float()
    if trainee.own_output is not None:
        size = len(trainee.tokens)
        rows = [found.tensors[f"lm_heads.{k}.weight"] for k in range(found.num_outputs)]
        scaled = [found.logit_scale * one[:size].float() for one in rows]
        trainee.own_output.data = torch.stack(scaled).expand(found.num_heads, -1, -1)
    if trainee.transition is not None:
        trainee.transition.before.data = found.tensors[BEFORE].float()
        trainee.transition.after.data = found.tensors[AFTER].float()
    for layer in settings.early_layers:
        trainee.early[str(layer)] = load_early_head(heads, layer, config).float()
    return _checked(trainee)


def check_output_layer(model: str) -> None:
    """Refuses a target whose output layer heads cannot share; loads it on the CPU for that.

    Args:
        model: Hugging Face folder or name.

    Raises:
        ValueError: its logits are more than its output layer's.
    """
    least = TrainSettings(num_heads=1, num_layers=1, transition_rank=0, early_layers=())
    _checked(Trainee(_load_target(model, least, "cpu"), least))


def _load_target(
    model: str, settings: TrainSettings, kind: str | None = None
) -> PreTrainedModel:
    device = torch.device(kind or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.float32
    if settings.precision_on(device.type) == "bfloat16":
        dtype = torch.bfloat16 if device.type == "cpu" else stored_dtype(model)
    target: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    return target.to(device)


def _checked(trainee: Trainee) -> Trainee:
    trainee = trainee.to(trainee.device)
    trainee.check_output_layer()
    return trainee
