"""Reading and writing heads: the checkpoint formats that exist.

1. FasterDecoding (also TGI, TensorRT-LLM): ``medusa_lm_head.pt`` or ``.safetensors`` with
   ``{head}.{layer}.linear.weight|bias`` and ``{head}.{layers}.weight``.
2. vLLM: ``model.safetensors`` with ``blocks.{head}.layers.{layer}.weight|bias`` and
   ``lm_heads.{head}.weight``, maybe prefixed ``medusa_heads.``, maybe a ``token_map``.
   Ours are these without ``lm_heads``: the target's output layer serves all heads.

Sizes and the number of heads come from the tensors: published configs are wrong about
them. A tensor that nothing uses, or that is missing, is an error: read past, it is the
usual cause of heads that never get a token accepted.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

WEIGHT_FILES = (
    "model.safetensors",
    "medusa_lm_head.safetensors",
    "medusa_lm_head.pt",
)
EARLY_FILE = "early_heads.safetensors"

_BLOCK = re.compile(r"blocks\.(\d+)\.layers\.(\d+)\.(weight|bias)")
_OUTPUT = re.compile(r"lm_heads\.(\d+)\.weight")
_FASTER_BLOCK = re.compile(r"(\d+)\.(\d+)\.linear\.(weight|bias)")
_FASTER_OUTPUT = re.compile(r"(\d+)\.(\d+)\.weight")
_BACKBONE = re.compile(r"(model\.)?(layers|embed_tokens|norm)\.|transformer\.|lm_head\.")


class HeadsError(ValueError):
    """A folder of heads that cannot be used; the message says why and what to do."""


@dataclass
class HeadsCheckpoint:
    """The tensors of Medusa heads under vLLM's names, checked for completeness.

    Attributes:
        tensors: ``blocks.*`` ``[hidden, hidden]`` or ``[hidden]``, ``lm_heads.*``
            ``[vocabulary, hidden]``, ``token_map`` ``[vocabulary]``.
        num_heads, num_layers, hidden_size, has_bias: as the tensors say.
        num_outputs: own output layers: 0 (the target's serves), 1 (shared) or one a head.
        logit_scale: factor of the own output layers' logits.
    """

    folder: Path
    tensors: dict[str, torch.Tensor]
    num_heads: int = field(init=False)
    num_layers: int = field(init=False)
    hidden_size: int = field(init=False)
    has_bias: bool = field(init=False)
    num_outputs: int = field(init=False)
    logit_scale: float = 1.0

    def __post_init__(self) -> None:
        blocks = [m for name in self.tensors if (m := _BLOCK.fullmatch(name))]
        if not blocks:
            raise self._error("it has no Medusa head (blocks.0.layers.0.weight)")
        self.num_heads = 1 + max(int(m[1]) for m in blocks)
        self.num_layers = 1 + max(int(m[2]) for m in blocks)
        self.has_bias = any(m[3] == "bias" for m in blocks)
        self.hidden_size = self.tensors[blocks[0][0]].shape[-1]
        outputs = sum(bool(_OUTPUT.fullmatch(name)) for name in self.tensors)
        if outputs not in (0, 1, self.num_heads):
            raise self._error(
                f"it has output layers for {outputs} of its {self.num_heads} heads"
            )
        self.num_outputs = outputs
        self._check_tensors()

    def _error(self, what: str) -> HeadsError:
        return HeadsError(f"cannot use the heads in {self.folder}: {what}")

    def _expected(self) -> dict[str, tuple[int, ...]]:
        size = self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {}
        for head in range(self.num_heads):
            for layer in range(self.num_layers):
                shapes[f"blocks.{head}.layers.{layer}.weight"] = (size, size)
                if self.has_bias:
                    shapes[f"blocks.{head}.layers.{layer}.bias"] = (size,)
        for head in range(self.num_outputs):
            shapes[f"lm_heads.{head}.weight"] = (self.output_size, size)
        if "token_map" in self.tensors:
            shapes["token_map"] = (self.output_size,)
        return shapes

    def _check_tensors(self) -> None:
        expected = self._expected()
        if missing := sorted(expected.keys() - self.tensors.keys()):
            raise self._error(f"missing tensors: {', '.join(missing)}")
        if unused := sorted(self.tensors.keys() - expected.keys()):
            raise self._error(
                f"it has tensors that no head uses: {', '.join(unused[:8])}"
                + (f" and {len(unused) - 8} more" if len(unused) > 8 else "")
            )
        for name, shape in expected.items():
            found = tuple(self.tensors[name].shape)
            if found != shape:
                raise self._error(f"{name} has shape {found}, expected {shape}")

    @property
    def output_size(self) -> int:
        """Tokens that the own output layers know; 0 without any."""
        if not self.num_outputs:
            return 0
        return self.tensors["lm_heads.0.weight"].shape[0]

    def block(self, head: int, layer: int, kind: str) -> torch.Tensor:
        """One block's ``weight`` or ``bias``."""
        return self.tensors[f"blocks.{head}.layers.{layer}.{kind}"]

    def check_fits(self, hidden_size: int, vocab_size: int) -> None:
        """Raises HeadsError where the heads were made for another target."""
        if self.hidden_size != hidden_size:
            raise self._error(
                f"their hidden size is {self.hidden_size}, the target's {hidden_size}: "
                "they belong to another model"
            )
        mapped = "token_map" in self.tensors
        # Published output layers are often padded or left unpadded by a few rows.
        if self.num_outputs and not mapped and self.output_size > vocab_size + 1024:
            raise self._error(
                f"their vocabulary is {self.output_size}, the target's {vocab_size}: "
                "they belong to another model"
            )


def _vllm_name(name: str, num_layers: int) -> str:
    """A tensor's name in vLLM's format."""
    name = name.removeprefix("medusa_heads.").removeprefix("medusa_head.")
    if m := _FASTER_BLOCK.fullmatch(name):
        return f"blocks.{m[1]}.layers.{m[2]}.{m[3]}"
    if (m := _FASTER_OUTPUT.fullmatch(name)) and int(m[2]) == num_layers:
        return f"lm_heads.{m[1]}.weight"
    return "lm_heads.0.weight" if name == "lm_head.weight" else name


def _read_tensors(path: Path, shapes_only: bool) -> dict[str, torch.Tensor]:
    if path.suffix == ".pt":
        # weights_only: a pickle may otherwise run code.
        device = "meta" if shapes_only else "cpu"
        return dict(torch.load(path, map_location=device, weights_only=True))
    if not shapes_only:
        return load_file(path)
    with safe_open(path, framework="pt") as file:
        return {
            name: torch.empty(file.get_slice(name).get_shape(), device="meta")
            for name in file.keys()  # noqa: SIM118 (not a mapping)
        }


def load_heads(folder: Path, shapes_only: bool = False) -> HeadsCheckpoint:
    """Reads and checks the Medusa heads in ``folder``.

    Args:
        folder: with one of ``WEIGHT_FILES``.
        shapes_only: leave the data on disk (tensors on the device ``meta``).

    Raises:
        HeadsError: no weights, a Medusa-2 model, or tensors missing, unused or misshapen.
    """
    path = next((p for n in WEIGHT_FILES if (p := folder / n).is_file()), None)
    if path is None:
        raise HeadsError(
            f"cannot use the heads in {folder}: it has none of {', '.join(WEIGHT_FILES)}"
        )
    raw = _read_tensors(path, shapes_only)
    if any(_BACKBONE.match(name) and name != "lm_head.weight" for name in raw):
        raise HeadsError(
            f"cannot use the heads in {folder}: this is a Medusa-2 checkpoint, a whole "
            "model whose backbone was trained together with its heads. Its heads do not "
            "fit the base model; serve heads trained on a frozen target (Medusa-1)"
        )
    bare = [name.removeprefix("medusa_heads.").removeprefix("medusa_head.") for name in raw]
    layers = [int(m[2]) + 1 for name in bare if (m := _FASTER_BLOCK.fullmatch(name))]
    tensors = {
        _vllm_name(name, max(layers, default=0)): tensor for name, tensor in raw.items()
    }
    if (token_map := tensors.get("token_map")) is not None:
        # Full output layers beside a map: only the mapped rows are drafted from.
        for name in [name for name in tensors if _OUTPUT.fullmatch(name)]:
            if len(tensors[name]) > len(token_map):
                tensors[name] = (
                    tensors[name][: len(token_map)]
                    if shapes_only
                    else (tensors[name][token_map.long()])
                )
    config_path = folder / "config.json"
    config = json.loads(config_path.read_text()) if config_path.is_file() else {}
    return HeadsCheckpoint(
        folder, tensors, logit_scale=float(config.get("logit_scale", 1.0))
    )


def save_heads(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    early: dict[str, torch.Tensor],
    vocab_size: int,
    dtype: torch.dtype,
) -> None:
    """Writes heads that share the target's output layer, and their early heads.

    Args:
        folder: made if it is not there.
        tensors: ``blocks.*``, as ``MedusaHeads.tensors`` gives them.
        early: ``early.{layer}.*``, may be empty.
        vocab_size: the target's.
        dtype: of the stored tensors.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def store(named: dict[str, torch.Tensor], name: str) -> None:
        stored = {key: t.detach().to(dtype).contiguous() for key, t in named.items()}
        save_file(stored, folder / name, metadata={"format": "pt"})

    store(tensors, "model.safetensors")
    if early:
        store(early, EARLY_FILE)
    checkpoint = HeadsCheckpoint(folder, tensors)
    config = {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "hidden_size": checkpoint.hidden_size,
        "vocab_size": vocab_size,
        "truncated_vocab_size": vocab_size,
        "num_heads": checkpoint.num_heads,
        "num_hidden_layers": checkpoint.num_layers,
        "medusa_fc_bias": checkpoint.has_bias,
        "original_lm_head": True,
        "early_layers": sorted({int(name.split(".")[1]) for name in early}),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
