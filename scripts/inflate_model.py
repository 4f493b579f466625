"""Makes a model of large cost out of a small one, exactly: the same text, more arithmetic.

The hidden dimensions are scattered among zero ones; heads, neurons and layers are added
whose outputs are zero. What the added weights compute never reaches the result, so they
are filled with noise. RMSNorm sees the same vector among zeros: its weights are divided by
the square root of the factor, its epsilon by the factor. Medusa heads and early heads are
inflated along.

    python scripts/inflate_model.py demo/model build/inflated --factor 8 --layers 16

The result is for measuring cost with real acceptance. It is an inflated small model, not
a published one, and no figure of it should be shown as a real model's.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file, save_file

KNOWN = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose layers are built as below."""

Tensors = dict[str, torch.Tensor]


def layer_places(real: int, total: int) -> list[int]:
    """Where the real layers stand among all: evenly spread, the first one first."""
    return [i * total // real for i in range(real)]


class Inflation:
    """What is where in the large model.

    Args:
        config: the small model's ``config.json``.
        factor: of hidden size, neurons and attention heads.
        layers: of the large model.
        seed: of the noise.

    Raises:
        ValueError: a model type or a size that cannot be inflated.
    """

    def __init__(self, config: dict[str, Any], factor: int, layers: int, seed: int):
        kind, real = config["model_type"], config["num_hidden_layers"]
        if kind not in KNOWN:
            raise ValueError(f"model type '{kind}': known are {', '.join(KNOWN)}")
        if layers < real:
            raise ValueError(f"--layers {layers}: the model has {real} already")
        self.factor, self.hidden = factor, config["hidden_size"]
        self.heads, self.kv_heads = (
            config["num_attention_heads"],
            config["num_key_value_heads"],
        )
        self.head_dim = config.get("head_dim") or self.hidden // self.heads
        self.neurons = config["intermediate_size"]
        self.places = layer_places(real, layers)
        self.layers = layers
        self.noise = torch.Generator().manual_seed(seed)
        # Real dimensions stand at the beginning of each run of ``factor``.
        self.dims = torch.arange(self.hidden) * factor
        self.kv_rows = torch.arange(self.kv_heads * self.head_dim)
        # Grouped-query attention as published models of that size have it: 8 KV heads.
        eight = self.kv_heads <= 8 <= self.kv_heads * factor
        self.large_kv = 8 if eight and self.heads * factor % 8 == 0 else 0
        self.large_kv = self.large_kv or self.kv_heads * factor
        # A real KV head keeps its own query heads: they open its (larger) group.
        group, large_group = self.heads // self.kv_heads, self.heads * factor
        large_group //= self.large_kv
        starts = [
            (kv * large_group + q) * self.head_dim
            for kv in range(self.kv_heads)
            for q in range(group)
        ]
        self.q_rows = torch.cat(
            [torch.arange(start, start + self.head_dim) for start in starts]
        )

    def config(self, config: dict[str, Any]) -> dict[str, Any]:
        """The large model's ``config.json``."""
        large = {
            **config,
            "hidden_size": self.hidden * self.factor,
            "intermediate_size": self.neurons * self.factor,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads * self.factor,
            "num_key_value_heads": self.large_kv,
            "head_dim": self.head_dim,
            "rms_norm_eps": config["rms_norm_eps"] / self.factor,
            "inflated": {"factor": self.factor, "real_layers": self.places},
        }
        if "layer_types" in config:
            large["layer_types"] = [config["layer_types"][0]] * self.layers
        return large

    @staticmethod
    def _spread(small: torch.Tensor, places: torch.Tensor, size: int) -> torch.Tensor:
        """A vector at ``places`` of ``size`` zeros."""
        large = torch.zeros(size, dtype=small.dtype)
        large[places] = small
        return large

    def _scatter(
        self,
        small: torch.Tensor,
        rows: torch.Tensor,
        columns: torch.Tensor,
        shape: tuple[int, int],
        noisy: bool,
    ) -> torch.Tensor:
        """``small`` at ``rows`` x ``columns`` of zeros, or of noise on other rows.

        Noise also stands in columns that read zero dimensions.
        """
        large = torch.zeros(shape, dtype=small.dtype)
        if noisy:
            noise = torch.empty(shape).normal_(0, 0.02, generator=self.noise)
            large.copy_(noise)
        large[rows[:, None], columns] = small
        return large

    def norm(self, weight: torch.Tensor) -> torch.Tensor:
        """An RMSNorm's weight."""
        scaled = (weight.float() / math.sqrt(self.factor)).to(weight.dtype)
        return self._spread(scaled, self.dims, self.hidden * self.factor)

    def square(self, weight: torch.Tensor) -> torch.Tensor:
        """A head's weight ``[hidden, hidden]``, or its bias ``[hidden]``."""
        size = self.hidden * self.factor
        if weight.ndim == 1:
            return self._spread(weight, self.dims, size)
        return self._scatter(weight, self.dims, self.dims, (size, size), noisy=False)

    def root(self, weight: torch.Tensor) -> torch.Tensor:
        """What a head reads the root's embedding with, ``[hidden, hidden]``.

        Heads read it scaled to a mean square of 1 (``heads.medusa.root_input``), and zero
        dimensions are in that mean.
        """
        return self.square((weight.float() / math.sqrt(self.factor)).to(weight.dtype))

    def head(self, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A tensor of Medusa heads, by its name; what is by tokens only stays as it is."""
        if name == "token_map":
            return tensor
        tensor = tensor.to(dtype)
        if name.startswith("transition."):
            return tensor
        if name.startswith("roots."):
            return self.root(tensor)
        return (self.embedding if name.startswith("lm_head") else self.square)(tensor)

    def embedding(self, weight: torch.Tensor) -> torch.Tensor:
        """Embedding or output layer, ``[vocabulary, hidden]``."""
        rows = torch.arange(len(weight))
        shape = (len(weight), self.hidden * self.factor)
        return self._scatter(weight, rows, self.dims, shape, noisy=False)

    def projection(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """One of a layer's projections, by its name."""
        size, dims = self.hidden * self.factor, self.dims
        neurons = torch.arange(self.neurons)
        queries = self.heads * self.factor * self.head_dim
        rows, count = {
            "q_proj": (self.q_rows, queries),
            "k_proj": (self.kv_rows, self.large_kv * self.head_dim),
            "v_proj": (self.kv_rows, self.large_kv * self.head_dim),
            "o_proj": (self.q_rows, queries),
            "gate_proj": (neurons, self.neurons * self.factor),
            "up_proj": (neurons, self.neurons * self.factor),
            "down_proj": (neurons, self.neurons * self.factor),
        }[name]
        if weight.ndim == 1:  # a bias
            return self._spread(weight, rows, count)
        if name in ("o_proj", "down_proj"):  # these write: nothing but the real values
            return self._scatter(weight, dims, rows, (size, count), noisy=False)
        return self._scatter(weight, rows, dims, (count, size), noisy=True)

    def layer(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """A layer's tensor, by its name inside the layer."""
        part = name.split(".")[-2]
        if part in ("q_norm", "k_norm"):  # per head, of unchanged width
            return weight
        if part.endswith("layernorm"):
            return self.norm(weight)
        return self.projection(part, weight)

    def model(self, small: Tensors) -> Tensors:
        """All tensors of the large model."""
        large: Tensors = {}
        first: Tensors = {}
        for name, tensor in small.items():
            if not name.startswith("model.layers."):
                inflate = self.norm if name == "model.norm.weight" else self.embedding
                large[name] = inflate(tensor)
                continue
            _, _, index, inner = name.split(".", 3)
            place = self.places[int(index)]
            large[f"model.layers.{place}.{inner}"] = self.layer(inner, tensor)
            if index == "0":
                first[inner] = tensor
        for place in sorted(set(range(self.layers)) - set(self.places)):
            for inner, tensor in first.items():
                added = self.layer(inner, tensor)
                if inner.split(".")[-2] in ("o_proj", "down_proj"):
                    added = torch.zeros_like(added)
                large[f"model.layers.{place}.{inner}"] = added
        return large

    def after(self, layer: int) -> int:
        """Which layer of the large model (from 1) ends what ``layer`` of the small does."""
        return self.places[layer - 1] + 1


def inflate_heads(
    folder: Path, out: Path, inflation: Inflation, dtype: torch.dtype
) -> None:
    """Medusa heads and early heads; what was measured of them stays true."""
    out.mkdir(parents=True, exist_ok=True)
    large = {
        name: inflation.head(name, tensor, dtype)
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(large, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["hidden_size"] *= inflation.factor
    config["early_layers"] = [inflation.after(n) for n in config.get("early_layers", [])]
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    early: Tensors = {}
    stored = folder / "early_heads.safetensors"
    for name, tensor in load_file(stored).items() if stored.exists() else ():
        tensor = tensor.to(dtype)
        _, layer, part, _ = name.split(".")
        place = f"early.{inflation.after(int(layer))}.{name.split('.', 2)[2]}"
        if part == "norm":
            early[place] = inflation.norm(tensor)
        elif part == "down":  # [rank, hidden]
            early[place] = inflation.embedding(tensor)
        else:
            early[place] = tensor if part == "up" else inflation.square(tensor)
    if early:
        save_file(early, out / stored.name, metadata={"format": "pt"})
    calibration = folder / "calibration.json"
    if calibration.exists():
        known = json.loads(calibration.read_text())
        known["early_recall"] = {
            str(inflation.after(int(layer))): recall
            for layer, recall in known["early_recall"].items()
        }
        (out / calibration.name).write_text(json.dumps(known, indent=1) + "\n")


def main(
    model: Annotated[Path, typer.Argument(help="Small model, with heads in propd/.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    factor: Annotated[int, typer.Option(help="4, 8 or 16.")] = 8,
    layers: Annotated[int, typer.Option(help="Layers of the large model.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    dtype: Annotated[
        str, typer.Option(help="Of the weights; bfloat16 rounds norms unless 4 or 16.")
    ] = "bfloat16",
) -> None:
    """Inflate a model and its heads."""
    kind = {"bfloat16": torch.bfloat16, "float32": torch.float32}[dtype]
    config = json.loads((model / "config.json").read_text())
    inflation = Inflation(config, factor, layers, seed)
    out.mkdir(parents=True, exist_ok=True)
    small = load_file(model / "model.safetensors")
    tensors = inflation.model({name: t.to(kind) for name, t in small.items()})
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    large = json.dumps({**inflation.config(config), "dtype": dtype}, indent=2)
    (out / "config.json").write_text(large + "\n")
    for path in model.iterdir():
        if path.is_file() and path.name not in ("config.json", "model.safetensors"):
            shutil.copy(path, out)
    if (model / "propd").is_dir():
        inflate_heads(model / "propd", out / "propd", inflation, kind)
    size = sum(tensor.numel() for tensor in tensors.values())
    places = ", ".join(str(place + 1) for place in inflation.places)
    typer.echo(
        f"{size:,} parameters; the small model's layers are layers {places} of {layers}"
    )


if __name__ == "__main__":
    typer.run(main)
