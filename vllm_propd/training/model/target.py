"""The frozen target on its device, and the trainee built on it."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from vllm_propd.training.model.trainee import Trainee
from vllm_propd.training.settings import TrainSettings


def stored_dtype(model: str) -> torch.dtype:
    """Returns the dtype of the target's weights on disk."""
    return AutoConfig.from_pretrained(model).dtype or torch.bfloat16


def load_trainee(model: str, settings: TrainSettings) -> Trainee:
    """Loads a target and puts untrained heads on it.

    Args:
        model: Hugging Face folder or name. It is loaded in float32 on the CPU, or with
            ``precision`` float32; else as it is stored.
        settings: the heads' settings.

    Raises:
        ValueError: heads cannot share this target's output layer.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    full = device.type == "cpu" or settings.precision == "float32"
    dtype = torch.float32 if full else stored_dtype(model)
    target = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device)
    torch.manual_seed(settings.seed)
    trainee = Trainee(target, settings).to(device)
    trainee.check_output_layer()
    return trainee
