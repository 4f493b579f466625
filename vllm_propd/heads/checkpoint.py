"""Reading and writing heads: the checkpoint formats that exist.

1. FasterDecoding (also TGI, TensorRT-LLM): ``medusa_lm_head.pt`` or ``.safetensors`` with
   ``{head}.{layer}.linear.weight|bias`` and ``{head}.{layers}.weight``.
2. vLLM: ``model.safetensors`` with ``blocks.{head}.layers.{layer}.weight|bias`` and
   ``lm_heads.{head}.weight``, maybe prefixed ``medusa_heads.``, maybe a ``token_map``.
   Ours are these without ``lm_heads``: the target's output layer serves all heads, or with
   a ``token_map`` those of its rows. ``roots.{head}.weight`` read the root's embedding
   (``heads.medusa``); by ``transition.before|after`` heads know the token before
   (``heads.transition``).

Each head has an output layer, or none has. One for all is ``lm_head.weight``, or with
``"original_lm_head": true`` in ``config.json`` ``lm_heads.0.weight``.

Sizes and the number of heads come from the tensors: published configs are wrong about
them. A tensor that nothing uses, or that is missing, is an error: read past, it is the
usual cause of heads that never get a token accepted.
"""

from __future__ import annotations

import json
import math
import pickle
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

WEIGHT_FILES = (
    "model.safetensors",
    "medusa_lm_head.safetensors",
    "medusa_lm_head.pt",
)
EARLY_FILE = "early_heads.safetensors"

BEFORE, AFTER = "transition.before", "transition.after"

_PREFIX = re.compile(r"^medusa_heads?\.")
_BLOCK = re.compile(r"blocks\.(\d+)\.layers\.(\d+)\.(weight|bias)")
_OUTPUT = re.compile(r"lm_heads\.(\d+)\.weight")
_ROOT = re.compile(r"roots\.(\d+)\.weight")
_FASTER_BLOCK = re.compile(r"(\d+)\.(\d+)\.linear\.(weight|bias)")
_FASTER_OUTPUT = re.compile(r"(\d+)\.(\d+)\.weight")
_BACKBONE = re.compile(r"(model\.)?(layers|embed_tokens|norm)\.|transformer\.|lm_head\.")


class HeadsError(ValueError):
    """A folder of heads that cannot be used; the message says why and what to do."""


def heads_error(place: Path, what: object) -> HeadsError:
    """Makes the error that names a folder or file of heads, and what is wrong with it."""
    return HeadsError(f"cannot use the heads in {place}: {what}")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns whatever a reader raises over a damaged ``path`` into HeadsError."""
    try:
        yield
    except pickle.UnpicklingError:
        # Torch's own text advises to let the pickle run its code.
        raise heads_error(path, "it is damaged, or holds more than tensors") from None
    except Exception as error:
        raise heads_error(path, str(error) or type(error).__name__) from error


@dataclass
class HeadsCheckpoint:
    """The tensors of Medusa heads under vLLM's names, checked for completeness.

    Attributes:
        tensors: ``blocks.*`` ``[hidden, hidden]`` or ``[hidden]``, ``lm_heads.*``
            ``[vocabulary, hidden]``, ``token_map`` ``[vocabulary]`` (rows of the output
            layers that it does not name are dropped), ``roots.*`` ``[hidden, hidden]``,
            ``transition.*`` ``[vocabulary, rank]``.
        num_heads, num_layers, hidden_size, has_bias: as the tensors say.
        num_outputs: own output layers: 0 (the target's serves), 1 (shared) or one a head.
        output_size: tokens that the own output layers, or the token map, know; 0 where
            that is all of the target's.
        knows_root: whether heads read the root's embedding.
        transition_rank: columns of the transition's tables; 0 without any.
        logit_scale: factor of the own output layers' logits.
        shared_output: whether an own output layer serves all heads.
    """

    folder: Path
    tensors: dict[str, torch.Tensor]
    num_heads: int = field(init=False)
    num_layers: int = field(init=False)
    hidden_size: int = field(init=False)
    has_bias: bool = field(init=False)
    num_outputs: int = field(init=False)
    output_size: int = field(init=False)
    knows_root: bool = field(init=False)
    transition_rank: int = field(init=False)
    logit_scale: float = 1.0
    shared_output: bool = False

    def __post_init__(self) -> None:
        for name, tensor in self.tensors.items():
            if not tensor.ndim or not tensor.numel():
                shape = tuple(tensor.shape)
                raise heads_error(
                    self.folder, f"{name} has shape {shape}: no rows or columns"
                )
        blocks = [m for name in self.tensors if (m := _BLOCK.fullmatch(name))]
        if not blocks:
            raise heads_error(
                self.folder, "it has no Medusa head (blocks.0.layers.0.weight)"
            )
        # Counted, so that a gap in the numbers is a missing tensor.
        self.num_heads = len({m[1] for m in blocks})
        self.num_layers = len({m[2] for m in blocks})
        self.has_bias = any(m[3] == "bias" for m in blocks)
        self.hidden_size = self.tensors[blocks[0][0]].shape[-1]
        self._apply_map()
        sizes = [len(t) for name, t in self.tensors.items() if _OUTPUT.fullmatch(name)]
        own = 1 if self.shared_output else self.num_heads
        self.num_outputs, self.output_size = (own, sizes[0]) if sizes else (0, 0)
        if not sizes and "token_map" in self.tensors:
            self.output_size = len(self.tensors["token_map"])
        self.knows_root = any(map(_ROOT.fullmatch, self.tensors))
        table = self.tensors.get(BEFORE)
        self.transition_rank = 0 if table is None else table.shape[-1]
        self._check_tensors()

    def _apply_map(self) -> None:
        """Cuts full output layers beside a ``token_map`` to the rows that it names."""
        token_map = self.tensors.get("token_map")
        if token_map is None:
            return
        if (
            token_map.dtype not in (torch.int32, torch.int64)
            or token_map.ndim != 1
            or token_map.min() < 0
            or len(token_map.unique()) < len(token_map)
        ):
            raise heads_error(self.folder, "token_map is no list of distinct token ids")
        for name, rows in self.tensors.items():
            if _OUTPUT.fullmatch(name) and len(rows) > len(token_map):
                if token_map.max() >= len(rows):
                    raise heads_error(
                        self.folder,
                        f"token_map names token {token_map.max()}, {name} has {len(rows)}",
                    )
                self.tensors[name] = rows[token_map.long()]

    def _expected(self) -> dict[str, tuple[int, ...]]:
        size = self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {}
        for head in range(self.num_heads):
            for layer in range(self.num_layers):
                shapes[f"blocks.{head}.layers.{layer}.weight"] = (size, size)
                if self.has_bias:
                    shapes[f"blocks.{head}.layers.{layer}.bias"] = (size,)
            if self.knows_root:
                shapes[f"roots.{head}.weight"] = (size, size)
        for head in range(self.num_outputs):
            shapes[f"lm_heads.{head}.weight"] = (self.output_size, size)
        if "token_map" in self.tensors:
            shapes["token_map"] = (self.output_size,)
        if self.transition_rank:
            tokens = self.output_size or len(self.tensors[BEFORE])
            shapes |= {name: (tokens, self.transition_rank) for name in (BEFORE, AFTER)}
        return shapes

    def _check_tensors(self) -> None:
        expected = self._expected()
        if missing := sorted(expected.keys() - self.tensors.keys()):
            raise heads_error(self.folder, f"missing tensors: {', '.join(missing)}")
        if unused := sorted(self.tensors.keys() - expected.keys()):
            raise heads_error(
                self.folder,
                f"it has tensors that no head uses: {', '.join(unused[:8])}"
                + (f" and {len(unused) - 8} more" if len(unused) > 8 else ""),
            )
        for name, shape in expected.items():
            found = tuple(self.tensors[name].shape)
            if found != shape:
                raise heads_error(
                    self.folder, f"{name} has shape {found}, expected {shape}"
                )

    def block(self, head: int, layer: int, kind: str) -> torch.Tensor:
        """Returns a block's ``weight`` ``[hidden, hidden]`` or ``bias`` ``[hidden]``."""
        return self.tensors[f"blocks.{head}.layers.{layer}.{kind}"]

    def root(self, head: int) -> torch.Tensor:
        """Returns what a head reads the root's embedding with, ``[hidden, hidden]``."""
        return self.tensors[f"roots.{head}.weight"]

    def config(self, vocab_size: int) -> dict[str, object]:
        """Returns the heads' ``config.json``, as vLLM's own ``medusa`` reads it."""
        return {
            "model_type": "medusa",
            "architectures": ["MedusaModel"],
            "hidden_size": self.hidden_size,
            "vocab_size": vocab_size,
            "truncated_vocab_size": self.output_size or vocab_size,
            "num_heads": self.num_heads,
            "num_hidden_layers": self.num_layers,
            "medusa_fc_bias": self.has_bias,
            "original_lm_head": self.num_outputs < 2,
            "logit_scale": self.logit_scale,
        }

    def check_fits(self, hidden_size: int, vocab_size: int) -> None:
        """Raises HeadsError where the heads were made for another target."""
        # Published output layers may lack some padding, or have as much as vLLM adds.
        least, most = vocab_size - 1024, -(-vocab_size // 64) * 64
        size, rows = self.output_size, len(self.tensors.get(BEFORE, ()))
        if (token_map := self.tensors.get("token_map")) is not None:
            least, most, size = 0, vocab_size, int(token_map.max()) + 1
        if self.hidden_size != hidden_size:
            problem = f"hidden size is {self.hidden_size}, the target's {hidden_size}"
        elif size and not least <= size <= most:
            problem = f"vocabulary is {size}, the target's {vocab_size}"
        elif self.transition_rank and token_map is None and rows != vocab_size:
            problem = f"transition knows {rows} tokens, the target {vocab_size}"
        else:
            return
        raise heads_error(self.folder, f"their {problem}: they belong to another model")


def _vllm_name(name: str, num_layers: int) -> str:
    """Returns the name in vLLM's format of a tensor whose name has no prefix."""
    if m := _FASTER_BLOCK.fullmatch(name):
        return f"blocks.{m[1]}.layers.{m[2]}.{m[3]}"
    if (m := _FASTER_OUTPUT.fullmatch(name)) and int(m[2]) == num_layers:
        return f"lm_heads.{m[1]}.weight"
    return "lm_heads.0.weight" if name == "lm_head.weight" else name


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Reads a file's tensors, mapped: data that nothing uses is not read."""
    if path.suffix != ".pt":
        return load_file(path)
    # weights_only: a pickle may otherwise run code. Only zip files can be mapped.
    mapped = zipfile.is_zipfile(path)
    named = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    if not isinstance(named, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor)
        for name, tensor in named.items()
    ):
        raise ValueError("it is not a table of named tensors")
    return named


def _read_config(path: Path) -> tuple[float, bool]:
    """Reads ``logit_scale``, and whether an own output layer serves all heads."""
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not isinstance(config, dict):
        raise ValueError("it is not a table of keys")
    scale = config.get("logit_scale", 1.0)
    if type(scale) not in (int, float) or not 0 < scale < math.inf:
        raise ValueError(f"logit_scale is {scale!r}, not a positive number")
    return float(scale), bool(config.get("original_lm_head"))


def has_heads(folder: Path) -> bool:
    """Whether a folder has a file of heads' weights."""
    return any((folder / name).is_file() for name in WEIGHT_FILES)


def load_heads(folder: Path, shapes_only: bool = False) -> HeadsCheckpoint:
    """Reads and checks the Medusa heads in ``folder``.

    Args:
        folder: a folder with one of ``WEIGHT_FILES``.
        shapes_only: leave the data on disk (tensors on the device ``meta``), all but the
            token map's.

    Raises:
        HeadsError: no weights, unreadable files, a Medusa-2 model, or tensors missing,
            unused, ambiguous or misshapen.
    """
    path = next((p for n in WEIGHT_FILES if (p := folder / n).is_file()), None)
    if path is None:
        raise heads_error(folder, f"it has none of {', '.join(WEIGHT_FILES)}")
    with reading(path):
        raw = _read_tensors(path)
    if any(_BACKBONE.match(name) and name != "lm_head.weight" for name in raw):
        raise heads_error(
            folder,
            "this is a Medusa-2 checkpoint, a whole model whose backbone was trained "
            "together with its heads. Its heads do not fit the base model; serve heads "
            "trained on a frozen target (Medusa-1)",
        )
    bare = [_PREFIX.sub("", name) for name in raw]
    layers = [int(m[2]) + 1 for name in bare if (m := _FASTER_BLOCK.fullmatch(name))]
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in zip(bare, raw.values(), strict=True):
        name = _vllm_name(name, max(layers, default=0))
        if name in tensors:
            raise heads_error(path, f"two of its tensors mean {name}")
        tensors[name] = tensor.to("meta") if shapes_only and name != "token_map" else tensor
    config_path = folder / "config.json"
    with reading(config_path):
        logit_scale, shared = _read_config(config_path)
    shared |= "lm_head.weight" in bare
    return HeadsCheckpoint(folder, tensors, logit_scale, shared)


def save_heads(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    early: dict[str, torch.Tensor],
    vocab_size: int,
    dtype: torch.dtype,
) -> None:
    """Writes heads and their early heads.

    Args:
        folder: made if it is not there.
        tensors: ``blocks.*``, as ``MedusaHeads.tensors`` gives them; ``lm_heads.*`` where
            each head has an output layer of its own, else the target's serves; maybe
            ``roots.*``, ``token_map`` and ``transition.*``.
        early: ``early.{layer}.*``, may be empty.
        vocab_size: the target's.
        dtype: dtype of the stored tensors.

    Raises:
        HeadsError: tensors missing, unused or misshapen; nothing is written then.
    """
    checkpoint = HeadsCheckpoint(folder, dict(tensors))
    config = checkpoint.config(vocab_size)
    config["early_layers"] = sorted({int(name.split(".")[1]) for name in early})

    def store(named: dict[str, torch.Tensor], name: str) -> None:
        stored = {
            key: (t.to(dtype) if t.is_floating_point() else t).detach().contiguous()
            for key, t in named.items()
        }
        save_file(stored, folder / name, metadata={"format": "pt"})

    folder.mkdir(parents=True, exist_ok=True)
    store(tensors, "model.safetensors")
    (folder / EARLY_FILE).unlink(missing_ok=True)  # of earlier heads
    if early:
        store(early, EARLY_FILE)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
