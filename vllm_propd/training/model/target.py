"""The frozen target on its device, and the trainee built on it."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

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
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32
    if settings.precision_on(device.type) == "bfloat16":
        dtype = torch.bfloat16 if device.type == "cpu" else stored_dtype(model)
    target = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device)
    torch.manual_seed(settings.seed)
    tokens = None
    vocabulary = len(target.get_output_embeddings().weight)
    if data is not None and 0 < settings.draft_tokens < vocabulary:
        tokens = torch.from_numpy(data.frequent(settings.draft_tokens, vocabulary))
    trainee = Trainee(target, settings, tokens).to(device)
    trainee.check_output_layer()
    return trainee
