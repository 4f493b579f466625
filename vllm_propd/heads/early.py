"""Early heads: what a shallow layer already knows about the next token.

After layer n of the target, ``RMSNorm -> x + SiLU(W x + b) -> an output layer`` predicts
the next token (paper section 3.2). Early pruning ranks a node's children by it. The output
layer is the target's, or with a large vocabulary a product of two thin ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from vllm_propd.heads.checkpoint import EARLY_FILE, heads_error, reading


class EarlyHead(nn.Module):
    """One early head.

    Args:
        hidden_size: hidden size of the target.
        eps: epsilon of the norm; the target's.
        rank: rank of the head's own output layer ``up(down(x))``; 0: the target's serves.
        vocab_size: rows of its own output layer.
    """

    def __init__(self, hidden_size: int, eps: float, rank: int = 0, vocab_size: int = 0):
        super().__init__()
        self.norm = nn.RMSNorm(hidden_size, eps=eps)
        self.linear = nn.Linear(hidden_size, hidden_size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.down = nn.Linear(hidden_size, rank, bias=False) if rank else None
        self.up = nn.Linear(rank, vocab_size, bias=False) if rank else None

    @torch.no_grad()
    def factorise(self, output: torch.Tensor) -> None:
        """Starts the own output layer as nearly the best one of its rank.

        Args:
            output: the target's output layer, ``[vocabulary, hidden]``.
        """
        assert self.down is not None and self.up is not None
        rank = self.down.out_features
        sampled = min(rank + 16, *output.shape)
        left, scale, right = torch.svd_lowrank(output.float(), q=sampled, niter=4)
        root = scale[:rank].sqrt()
        self.up.weight.copy_(left[:, :rank] * root)
        self.down.weight.copy_((right[:, :rank] * root).T)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Turns the residual stream after the layer, ``[..., hidden]``, into new states."""
        states = self.norm(hidden_states)
        return states + nn.functional.silu(self.linear(states))

    def logits(self, hidden_states: torch.Tensor, output: nn.Module) -> torch.Tensor:
        """Computes logits: ``[..., hidden]`` to ``[..., vocabulary]``.

        ``output`` is the target's output layer, for heads without one of their own.
        """
        if self.up is None:
            return output(self(hidden_states))
        return self.own_logits(hidden_states)

    def own_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Computes the own output layer's logits, or a share's, of ``[..., hidden]``."""
        assert self.down is not None and self.up is not None
        return self.up(self.down(self(hidden_states)))

    def keep_share(self, rank: int, world: int) -> int:
        """Keeps one tensor-parallel rank's rows of its own output layer.

        Returns:
            The first token of the share.
        """
        assert self.up is not None
        share = -(-self.up.out_features // world)
        rows = self.up.weight.detach()[rank * share : (rank + 1) * share]
        self.up.weight = nn.Parameter(rows.clone(), requires_grad=False)
        return rank * share


def early_layers(folder: Path) -> list[int]:
    """Returns the layers that the heads in ``folder`` have early heads for, ascending."""
    path = folder / EARLY_FILE
    if not path.is_file():
        return []
    with reading(path), safe_open(path, "pt") as file:
        return sorted({int(name.split(".")[1]) for name in file.keys()})  # noqa: SIM118


def load_early_head(folder: Path, layer: int, target: Any) -> EarlyHead:
    """Loads one of the early heads in ``folder``.

    Args:
        folder: folder of the heads.
        layer: layer that the head follows, counted from 1.
        target: the target's Hugging Face text config.

    Raises:
        HeadsError: there is none for this layer, it cannot be read, or tensors are
            missing, unused or misshapen.
    """
    path = folder / EARLY_FILE
    if layer not in (known := early_layers(folder)):
        have = ", ".join(map(str, known)) or "none"
        raise heads_error(folder, f"no early head after layer {layer}; they have {have}")
    prefix = f"early.{layer}."
    with reading(path), safe_open(path, "pt") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
        tensors = {name.removeprefix(prefix): file.get_tensor(name) for name in names}
    down = tensors.get("down.weight")
    rank = len(down) if down is not None and down.ndim else 0
    head = EarlyHead(target.hidden_size, norm_eps(target), rank, target.vocab_size)
    expected = head.state_dict()
    problems = [f"missing tensor {prefix}{n}" for n in sorted(expected.keys() - tensors)]
    problems += [f"unused tensor {prefix}{n}" for n in sorted(tensors.keys() - expected)]
    problems += [
        f"{prefix}{n} has shape {tuple(tensors[n].shape)}, expected {tuple(t.shape)}"
        for n, t in expected.items()
        if n in tensors and tensors[n].shape != t.shape
    ]
    if problems:
        raise heads_error(path, "; ".join(problems))
    head.load_state_dict(tensors)
    return head.requires_grad_(False)


def norm_eps(target: Any) -> float:
    """Returns the epsilon of the early heads' norms: the target's."""
    return getattr(target, "rms_norm_eps", None) or 1e-6
